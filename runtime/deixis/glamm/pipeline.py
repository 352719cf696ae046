"""The graphs of one GLaMM bundle as methods on arrays: pictures to features, boxes to vectors, states to masks.

`session` is the language model; the tasks stand in their own modules. Sections are those of the GLaMM specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis.base_pipeline import BasePipeline
from deixis.batching import chunk_rows, pick, stack_scenes
from deixis.bundle import Bundle, ConversationSpec, ImageSpec
from deixis.caches import StepHead
from deixis.conversation import IMAGE_ID
from deixis.engines import Engine
from deixis.errors import BundleFormatError, EngineError, PromptError, TaskError
from deixis.geometry import Geometry
from deixis.glamm.session import LanguageSession
from deixis.image import fit, pad, square

Floats = NDArray[np.float32]

_TALK = ("global_encoder", "decoder_step")
_MASKS = ("grounding_encoder", "pixel_decoder")


@dataclass(eq=False)
class GlammFeatures:
    """What the encoders gave for one picture.

    features: [T0, D], what stands for the picture in the text. levels: [g, g, C] each, shallow first, for regions; ()
    without a region encoder. geometry: of the grounding encoder's input. sam: [h, w, P], for masks; None until the
    first mask is asked for, for a conversation without masks should not cost them. resized: what it is made of, uint8
    [valid height, valid width, 3], and None from then on.
    """

    geometry: Geometry
    features: Floats
    levels: tuple[Floats, ...]
    resized: NDArray[np.uint8] | NDArray[np.float32] | None
    sam: Floats | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.features, *self.levels, self.resized, self.sam)
        return sum(array.nbytes for array in arrays if array is not None)


class GlammPipeline(BasePipeline):
    """The graphs of a GLaMM. See BasePipeline for what else it has. Safe to use from several threads."""

    family = "glamm"
    graphs_of_task = {  # noqa: RUF012
        "caption": _TALK,
        "region_caption": (*_TALK, "region_encoder"),
        "ask": _TALK,
        "refer": (*_TALK, *_MASKS),
        "grounded_caption": (*_TALK, *_MASKS),
        "ground_phrases": (*_TALK, *_MASKS),
    }

    def __init__(self, bundle: Bundle, engine: Engine, cache_capacity: int | None = None) -> None:
        super().__init__(bundle, engine, cache_capacity)
        conversation, global_image = self.manifest.conversation, self.manifest.global_image
        if conversation is None or global_image is None:  # open_bundle refuses it; a Bundle made by hand may not
            raise BundleFormatError(f"{bundle.path}: conversation or global_image is missing")
        self.conversation: ConversationSpec = conversation
        self.global_image: ImageSpec = global_image

    @property
    def has_masks(self) -> bool:
        return all(role in self.manifest.graphs for role in _MASKS)

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[GlammFeatures]:
        """RGB pictures uint8 [H, W, 3] of any sizes to features, as many at once as the bundle allows."""
        most = self.range("B")[1]
        found: list[GlammFeatures] = []
        for start in range(0, len(images), most):
            batch = images[start : start + most]
            squares = np.stack([square(image, self.global_image) for image in batch]).astype(np.float32)
            outputs = self.engine.run("global_encoder", {"image": squares})
            names = [name for name in outputs if name.startswith("level.")]
            for i, image in enumerate(batch):
                resized, geometry = fit(image, self.manifest.image)
                # Copies, so that a picture that is kept does not keep the others of its batch.
                features = np.array(outputs["features"][i], np.float32)
                levels = tuple(np.array(outputs[f"level.{n}"][i], np.float32) for n in range(len(names)))
                found.append(GlammFeatures(geometry, features, levels, resized if self.has_masks else None))
        return found

    def regions(self, scenes: Sequence[GlammFeatures], boxes: Sequence[NDArray[np.floating]]) -> list[Floats]:
        """Vectors [k, D] of each scene's boxes [k, 4] (left, top, right, bottom), pixels of its picture.

        Raises TaskError when the bundle takes no boxes.
        """
        if "region_encoder" not in self.manifest.graphs:
            raise TaskError(f"bundle {self.manifest.model.name!r} takes no boxes: no graph region_encoder")
        owners = [scene for scene, own in zip(scenes, boxes, strict=True) for _ in own]
        shares = [
            np.asarray(own, np.float64).reshape(-1, 4) / np.tile(scene.geometry.original[::-1], 2)
            for scene, own in zip(scenes, boxes, strict=True)
        ]
        flat = np.concatenate([np.empty((0, 4)), *shares]).astype(np.float32)
        found: list[Floats] = []
        for chunk in chunk_rows(owners, self.range("K")[1], self.range("B")[1]):
            rows = pick(owners, chunk)
            maps = {}
            index = np.empty(0, np.int64)
            for n in range(len(rows[0].levels)):
                maps[f"level.{n}"], index = stack_scenes(rows, lambda scene, n=n: scene.levels[n])
            outputs = self.engine.run("region_encoder", {**maps, "boxes": flat[chunk], "image_index": index})
            found += list(np.asarray(outputs["regions"], np.float32))
        width = scenes[0].features.shape[1] if scenes else 0
        vectors = iter(found)
        return [np.array([next(vectors) for _ in own], np.float32).reshape(len(own), width) for own in shares]

    def session(self, scenes: Sequence[GlammFeatures], expect_tokens: int) -> LanguageSession:
        """A session of a row per scene, with room for `expect_tokens` positions (the picture's included) before it has
        to grow. `chunks` tells how many rows may run together; PromptError for more.
        """
        most = self.range("R")[1]
        if not 0 < len(scenes) <= most:
            raise PromptError(f"{len(scenes)} texts at once; the bundle takes 1 to {most}")
        return LanguageSession(
            self.engine,
            self.conversation,
            self.manifest.caches.self_cache,
            StepHead.of(self.manifest),
            [scene.features for scene in scenes],
            self.capacity,
            max(expect_tokens, self.range("T")[0]),
            self.range("S")[1],
        )

    def chunks(self, scenes: Sequence[GlammFeatures], regions: int = 0) -> list[list[int]]:
        """Indices in batches that one session takes, for texts that name at most `regions` boxes each."""
        pictures = self.range("V")[1] // (self.conversation.image_tokens + regions)
        rows = min(self.range("R")[1], pictures)
        if rows < 1:
            raise PromptError(f"{regions} boxes are more than the bundle takes")
        return chunk_rows(scenes, rows, rows)

    def masks(self, states: Floats, scenes: Sequence[GlammFeatures]) -> tuple[Floats, Floats]:
        """Mask logits [M, 4h, 4w] over the padded input and predicted IoU [M] of states [M, D], each in its scene.

        Section 6.6 leads to pixels of the picture: `deixis.masks.segment_mask` with the scene's geometry. Without
        states nothing runs, and the maps are empty.
        """
        if not self.has_masks:
            raise TaskError(f"bundle {self.manifest.model.name!r} makes no masks: no graph pixel_decoder")
        if len(states) != len(scenes):
            raise ValueError(f"{len(states)} states for {len(scenes)} scenes")
        if not scenes:
            return np.zeros((0, 0, 0), np.float32), np.zeros(0, np.float32)
        self._encode_grounding(scenes)
        masks, scores = [], []
        for chunk in chunk_rows(scenes, self.range("M")[1], self.range("B")[1]):
            maps, index = stack_scenes(pick(scenes, chunk), _sam)
            inputs = {"states": np.ascontiguousarray(states[chunk], np.float32), "sam": maps, "image_index": index}
            outputs = self.engine.run("pixel_decoder", inputs)
            masks.append(np.asarray(outputs["masks"], np.float32))
            scores.append(np.asarray(outputs["iou"], np.float32))
        logits, iou = np.concatenate(masks), np.concatenate(scores)
        if not np.isfinite(iou).all():
            raise EngineError("the pixel decoder gave scores that are not finite; verify the bundle")
        return logits, iou

    def warmup(self, scene: GlammFeatures) -> None:
        """Run every graph once."""
        spec = self.conversation
        session = self.session([scene], 1)
        session.feed(np.array([[spec.begin_id, spec.image_start_id, IMAGE_ID, spec.image_end_id]]))
        _, states = session.step(np.array([spec.mask_id]))
        if self.has_masks:
            self.masks(states, [scene])
        if "region_encoder" in self.manifest.graphs:
            height, width = scene.geometry.original
            self.regions([scene], [np.array([[0, 0, width, height]])])

    def _encode_grounding(self, scenes: Sequence[GlammFeatures]) -> None:
        """Run the grounding encoder for the scenes it has not seen, once each."""
        # `resized` is read before `sam` and let go after `sam` is there: another thread may be doing the same.
        waiting = {id(scene): (scene, scene.resized) for scene in scenes}
        todo = [(scene, resized) for scene, resized in waiting.values() if scene.sam is None and resized is not None]
        spec, most = self.manifest.image, self.range("B")[1]
        dtype = self.manifest.graphs["grounding_encoder"].inputs["valid_hw"].dtype
        for start in range(0, len(todo), most):
            batch = todo[start : start + most]
            image = np.stack([pad(resized, spec) for _, resized in batch])
            valid = np.array([scene.geometry.valid for scene, _ in batch]).astype(dtype)
            outputs = self.engine.run("grounding_encoder", {"image": image, "valid_hw": valid})
            for (scene, _), sam in zip(batch, outputs["sam"], strict=True):
                scene.sam = np.array(sam, np.float32)
                scene.resized = None


def _sam(scene: GlammFeatures) -> Floats:
    if scene.sam is None:
        raise EngineError("the grounding encoder has not run for this picture")
    return scene.sam
