"""The graphs of one PixelLLM bundle, chained: pictures to scenes, prompts to cross caches, ids to logits and locations.

Everything here is arrays; `captioning` and `grounding` make tasks of it, `model` and `scene` the user's side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deixis.base_pipeline import BasePipeline
from deixis.batching import SceneFeatures, chunk_rows, group_indices, pad_ids, pick, stack_scenes
from deixis.bundle import Bundle, CacheSpec, DetectionSpec, LocationSpec, PromptSpec, TaskSpec
from deixis.caches import BLOCK, CrossCache, DecodeState, StepDecoder, StepHead
from deixis.detection import Detections, finish, propose
from deixis.engines import Engine
from deixis.errors import BundleFormatError, EngineError, PromptError, TaskError
from deixis.image import prepare
from deixis.options import Check
from deixis.prompts import PromptTokens
from deixis.readout import valid_positions

Floats = NDArray[np.float32]

_TEXT = ("semantic_encoder", "sam_encoder", "prompt_extractor", "text_encoder")
GRAPHS_OF_TASK: dict[str, tuple[str, ...]] = {
    "caption": (*_TEXT, "decoder_step"),
    "region_caption": (*_TEXT, "decoder_step"),
    "refer": (*_TEXT, "decoder_pass"),
    "trace": (*_TEXT, "decoder_pass"),
    "segment": ("sam_encoder", "mask_decoder"),
    "dense_captions": (*_TEXT, "box_proposals", "box_refine", "decoder_step"),
}
# The second stage samples 14 x 14 places of the pyramid for every proposal: 50 MB a picture at the published sizes.
_DETECT_TOGETHER = 4


class Pipeline(BasePipeline):
    """The graphs of a PixelLLM. See BasePipeline for what else it has."""

    family = "pixelllm"
    graphs_of_task = GRAPHS_OF_TASK
    without_spec = frozenset({"segment"})

    def __init__(self, bundle: Bundle, engine: Engine, cache_capacity: int | None = None) -> None:
        super().__init__(bundle, engine, cache_capacity)
        manifest = bundle.manifest
        prompts, location, cross = manifest.prompts, manifest.location, manifest.caches.cross_cache
        if prompts is None or location is None or cross is None:  # open_bundle refuses it; a Bundle made by hand may
            raise BundleFormatError(f"{bundle.path}: prompts, location or caches.cross_cache is missing")
        self.prompts: PromptSpec = prompts
        self.location: LocationSpec = location
        self.cross_cache: CacheSpec = cross
        for name, task in manifest.tasks.items():
            try:
                valid_positions(np.zeros(1, np.int64), task.points_at, manifest.tokenizer)
            except ValueError as error:
                raise BundleFormatError(f"{bundle.path}: tasks.{name}: {error}") from None

    def require_masks(self) -> None:
        if "mask_decoder" not in self.manifest.graphs:
            raise TaskError(
                f"bundle {self.manifest.model.name!r} makes no masks: no graph mask_decoder; pass mask=False"
            )

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[SceneFeatures]:
        """RGB pictures uint8 [H, W, 3] of any sizes to scenes, as many at once as the bundle allows."""
        most = self.range("B")[1]
        scenes: list[SceneFeatures] = []
        for start in range(0, len(images), most):
            scenes += self._encode(images[start : start + most])
        return scenes

    def _encode(self, images: Sequence[NDArray[np.uint8]]) -> list[SceneFeatures]:
        prepared = [prepare(image, self.manifest.image) for image in images]
        image = np.stack([image for image, _ in prepared])
        valid = np.array([geometry.valid for _, geometry in prepared])
        parts: list[NDArray[np.generic]] = []
        if "semantic_encoder" in self.manifest.graphs:  # a bundle that only segments has none
            parts.append(self._run_encoder("semantic_encoder", image, valid)["semantic"])
        sam = self._run_encoder("sam_encoder", image, valid)
        fused = np.concatenate([*parts, sam["sam_on_grid"]], axis=-1, dtype=np.float32)
        # Copies, so that a scene that is kept does not keep the others of its batch.
        return [
            SceneFeatures(fused[i].copy(), np.array(sam["sam"][i], np.float32), geometry)
            for i, (_, geometry) in enumerate(prepared)
        ]

    def _run_encoder(self, role: str, image: Floats, valid: NDArray[np.integer]) -> dict[str, NDArray[np.generic]]:
        dtype = self.manifest.graphs[role].inputs["valid_hw"].dtype
        return self.engine.run(role, {"image": image, "valid_hw": valid.astype(dtype)})

    def chunks(self, scenes: Sequence[SceneFeatures], beams: int = 1) -> list[list[int]]:
        """Indices in batches that the bundle's dimensions allow, for rows of `beams` hypotheses each."""
        rows = min(self.range("N")[1], self.range("R")[1] // beams)
        if rows < 1:
            raise PromptError(f"{beams} beams are more than the bundle allows ({self.range('R')[1]})")
        return chunk_rows(scenes, rows, self.range("B")[1])

    def checked(self, tokens: PromptTokens) -> PromptTokens:
        """The tokens, or PromptError when they are more than the bundle takes."""
        count, most = len(tokens.labels), self.range("P")[1]
        if count > most:
            raise PromptError(f"too many points: {count - 1}; this bundle takes at most {most - 1}")
        return tokens

    def prefix(self, scenes: Sequence[SceneFeatures], prompts: Sequence[PromptTokens]) -> Floats:
        """Visual prefix [R, Q, D] of every (scene, prompt) pair.

        That of the whole picture is computed once per scene and kept with it.
        """
        pairs = list(zip(scenes, prompts, strict=True))
        missing: list[int] = []
        first_of: dict[int, int] = {}
        for row, (scene, prompt) in enumerate(pairs):
            known = prompt.is_whole and (scene.whole_prefix is not None or first_of.setdefault(id(scene), row) != row)
            if not known:
                missing.append(row)
        found = dict(zip(missing, self._extract(pick(scenes, missing), pick(prompts, missing)), strict=True))
        rows: list[Floats] = []
        for row, (scene, prompt) in enumerate(pairs):
            if not prompt.is_whole:
                rows.append(found[row])
                continue
            if scene.whole_prefix is None:  # else another thread may have been faster: the same numbers
                scene.whole_prefix = found[row].copy()  # a copy, not to keep the others of its batch
            rows.append(scene.whole_prefix)
        return np.stack(rows)

    def _extract(self, scenes: Sequence[SceneFeatures], prompts: Sequence[PromptTokens]) -> list[Floats]:
        """Run the prompt extractor. It has no mask: equal token counts run together."""
        found: list[Floats] = [np.empty(0, np.float32)] * len(prompts)
        for group in group_indices(len(prompt.labels) for prompt in prompts):
            points, labels = stack_tokens(pick(prompts, group))
            features, index = stack_scenes(pick(scenes, group), lambda scene: scene.fused)
            inputs = {"features": features, "image_index": index, "points": points, "labels": labels}
            for row, output in zip(group, self.engine.run("prompt_extractor", inputs)["visual_prefix"], strict=True):
                found[row] = output
        return found

    def context_ids(self, task: TaskSpec, text: str = "") -> list[int]:
        """Context of the text encoder: the instruction and EOS, cut at the task's limit (a cut one has no EOS)."""
        if task.instruction_tokens == 0:
            return []
        instruction = task.instruction.replace("{text}", text)
        ids = self.tokenizer.encode(instruction, "the instruction").ids if instruction.strip() else ()
        return [*ids, self.manifest.tokenizer.end_id][: task.instruction_tokens]

    def cross(self, prefix: Floats, contexts: Sequence[Sequence[int]], length: int | None = None) -> CrossCache:
        """Run the text encoder: prefix [N, Q, D] and a context per row, padded to `length`, or to the longest.

        Padding is masked. Yet a teacher-forced pass needs a fixed length: its inactive positions attend evenly to all
        of the encoder, padding included (section 7), and the mask adapter reads them.
        """
        inputs = {"visual_prefix": prefix, "context_ids": pad_ids(contexts, length)}
        outputs = self.engine.run("text_encoder", inputs)
        return CrossCache.from_outputs(outputs, self.cross_cache.layers)

    @property
    def points(self) -> int:
        """Points per token that captions have: 0 when the model has no location head."""
        has_places = "locations" in self.manifest.graphs["decoder_step"].outputs
        return self.location.points_per_token if has_places else 0

    def decoder(self, cross: CrossCache, beams: int, length: int, with_logits: bool = False) -> StepDecoder:
        """A decoder for sequences of `length` places (the last is never consumed); its cache grows with them."""
        least = self.range("T")[0]
        capacity = min(self.capacity, max(length - 1, least))
        state = DecodeState.start(cross, self.manifest.caches.self_cache, beams, min(capacity, max(BLOCK, least)))
        return StepDecoder(self.engine, state, StepHead.of(self.manifest), self.points, capacity, with_logits)

    def teacher_forced(self, cross: CrossCache, ids: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Features [N, L, D] and locations [N, L, points, 2] of given ids [N, L]."""
        outputs = self.engine.run("decoder_pass", {"ids": ids, **cross.inputs()})
        return outputs["features"], outputs["locations"]  # type: ignore[return-value]

    @property
    def detection(self) -> DetectionSpec:
        """Rules of the detector. Raises TaskError when the bundle has none."""
        spec = self.manifest.detection
        if spec is None:
            raise TaskError(f"bundle {self.manifest.model.name!r} cannot detect objects: it has no detector")
        return spec

    def detect(self, scenes: Sequence[SceneFeatures], check: Check) -> list[Detections]:
        """Objects of every scene, boxes in pixels of the padded input; the result is that of one at a time."""
        found: list[Detections] = []
        most = min(self.range("B")[1], _DETECT_TOGETHER)
        for start in range(0, len(scenes), most):
            found += self.detect_features(np.stack([scene.fused for scene in scenes[start : start + most]]), check)
        return found

    def detect_features(self, features: Floats, check: Check) -> list[Detections]:
        """The same for fused features [B, gh, gw, C] of B pictures, which run together."""
        spec, size = self.detection, self.manifest.image.size
        check()
        maps = self.engine.run("box_proposals", {"features": features})
        heatmaps, places = _finite(maps["heatmap"]), _finite(maps["boxes"])
        proposals = [propose(*picture, spec, size) for picture in zip(places, heatmaps, strict=True)]
        pyramid = {name: level for name, level in maps.items() if name not in ("heatmap", "boxes")}
        check()
        judged = self.engine.run("box_refine", {**pyramid, "boxes": np.stack([boxes for boxes, _ in proposals])})
        logits, deltas = _finite(judged["logits"]), _finite(judged["deltas"])
        return [finish(boxes, scores, logits[i], deltas[i], spec, size) for i, (boxes, scores) in enumerate(proposals)]

    def prompt_delta(self, prefix: Floats, features: Floats) -> Floats | None:
        """What the mask adapter adds to the two corner tokens [R, 2, width]; None when the bundle has no adapter."""
        if "mask_adapter" not in self.manifest.graphs:
            return None
        outputs = self.engine.run("mask_adapter", {"visual_prefix": prefix, "features": features})
        return outputs["prompt_delta"]  # type: ignore[return-value]

    def masks(
        self, scenes: Sequence[SceneFeatures], points: Floats, labels: NDArray[np.int64], delta: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """Mask logits [R, 4, h, w] and predicted IoU [R, 4] for points [R, P, 2] in input pixels with labels [R, P]."""
        maps, index = stack_scenes(scenes, lambda scene: scene.sam)
        if delta is None:
            delta = np.zeros((*labels.shape, self.manifest.mask.prompt_width), np.float32)
        inputs = {"sam": maps, "image_index": index, "points": points, "labels": labels, "prompt_delta": delta}
        outputs = self.engine.run("mask_decoder", inputs)
        masks, scores = outputs["masks"], outputs["iou"]
        if not np.isfinite(scores).all():  # type: ignore[arg-type]
            raise EngineError("the mask decoder gave scores that are not finite; verify the bundle")
        return masks, scores  # type: ignore[return-value]


def _finite(values: NDArray[np.generic]) -> Floats:
    found = np.asarray(values, np.float32)
    if not np.isfinite(found).all():
        raise EngineError("the detector gave values that are not finite; verify the bundle, or use a higher precision")
    return found


def stack_tokens(prompts: Sequence[PromptTokens]) -> tuple[Floats, NDArray[np.int64]]:
    """Points [R, P, 2] and labels [R, P] of prompts with equal token counts."""
    return np.stack([p.points for p in prompts]), np.stack([p.labels for p in prompts])
