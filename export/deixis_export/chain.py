"""The whole road through the exported graphs: picture, prompt, text, caption and its locations, box, mask.

The graphs run on onnxruntime and the search is the runtime's own (`deixis.decoding`), so that what is compared with the PyTorch model
is what a user gets. The arrays at both ends are those of the model: padded pictures, points of the padded input.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from deixis.bundle import Bundle, ParityRecord
from deixis.decoding import Beams, Decoded, DecodeRules, beam_search, greedy
from deixis_train.models import decoding as reference
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import corners, pixelllm_prompt
from torch import Tensor

from deixis_export.cases import example_picture
from deixis_export.session import Arrays, GraphSession, relative_error

LOCATION_TOLERANCE = 2e-3  # continuous values at the end of the chain
EXACT = 0.0
CHAIN_LENGTH = 16  # of the captions compared at export
INT8_IDS_TOLERANCE = 1.0  # recorded only: one flipped word changes all that follow


@dataclass(frozen=True)
class TextState:
    """Cross caches of N prompts, by the logical names of the graphs, with `encoder_mask`."""

    cross: Arrays

    @property
    def prompts(self) -> int:
        return len(self.cross["encoder_mask"])


class GraphChain:
    """The graphs of a bundle, in the order of a request.

    `keep` leaves sessions open between calls; otherwise each is closed after use, and only one graph is in memory at a time.
    """

    def __init__(self, bundle: Bundle, keep: bool = False) -> None:
        self.bundle = bundle
        self._keep = keep
        self._sessions: dict[str, GraphSession] = {}

    def run(self, role: str, inputs: Arrays) -> Arrays:
        """Run one graph."""
        session = self._sessions.get(role) or GraphSession(self.bundle.file(self.bundle.manifest.graphs[role].file))
        if self._keep:
            self._sessions[role] = session
        return session.run(inputs)

    def close(self) -> None:
        self._sessions.clear()

    def encode(self, image: np.ndarray, valid_hw: np.ndarray) -> Arrays:
        """Padded pictures [B, S, S, 3] 0..255 and real (height, width) [B, 2] -> `features` and `sam`."""
        inputs = {"image": image, "valid_hw": valid_hw.astype(np.float32)}
        maps = self.run("semantic_encoder", inputs) | self.run("sam_encoder", inputs)
        return {"features": np.concatenate([maps["semantic"], maps["sam_on_grid"]], axis=-1), "sam": maps["sam"]}

    def extract(
        self, features: np.ndarray, image_index: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Visual prefix [R, Q, D]."""
        inputs = {"features": features, "image_index": image_index, "points": points, "labels": labels}
        return self.run("prompt_extractor", inputs)["visual_prefix"]

    def encode_text(self, visual: np.ndarray, context: np.ndarray | None) -> TextState:
        """context [N, C], 0 = padding; None is one masked place, which changes nothing."""
        ids = np.zeros((len(visual), 1), np.int64) if context is None else context.astype(np.int64)
        return TextState(self.run("text_encoder", {"visual_prefix": visual, "context_ids": ids}))

    def generate(self, state: TextState, rules: DecodeRules) -> list[Decoded] | Beams:
        """Greedy for one beam, beam search for more."""
        decoder = _Stepper(self, state, rules)
        if rules.beams == 1:
            return greedy(decoder, state.prompts, rules, lambda: None)
        return beam_search(decoder, state.prompts, rules, lambda: None)

    def text_pass(self, state: TextState, ids: np.ndarray) -> Arrays:
        """Teacher-forced `features` and `locations` of given ids [N, L]."""
        return self.run("decoder_pass", {"ids": ids.astype(np.int64), **state.cross})

    def masks(
        self, sam: np.ndarray, image_index: np.ndarray, boxes: np.ndarray, visual: np.ndarray, features: np.ndarray
    ) -> Arrays:
        """`masks` [R, 4, 4h, 4h] and `iou` [R, 4] of boxes [R, 4], through the mask adapter where there is one."""
        points, labels = (tensor.numpy() for tensor in corners(torch.from_numpy(boxes)))
        if "mask_adapter" in self.bundle.manifest.graphs:
            delta = self.run("mask_adapter", {"visual_prefix": visual, "features": features})["prompt_delta"]
        else:
            delta = np.zeros((*points.shape[:2], self.bundle.manifest.mask.prompt_width), np.float32)
        inputs = {"sam": sam, "image_index": image_index, "points": points, "labels": labels, "prompt_delta": delta}
        return self.run("mask_decoder", inputs)


class _Stepper:
    """The decoder-step graph as the runtime's search wants it."""

    def __init__(self, chain: GraphChain, state: TextState, rules: DecodeRules) -> None:
        spec = chain.bundle.manifest.caches.self_cache
        shape = (state.prompts * rules.beams, spec.heads, rules.length, spec.head_dim)
        parts = [f"self_{part}" for part in ("key", "value")]
        self._cache = {f"{part}.{i}": np.zeros(shape, np.float32) for i in range(spec.layers) for part in parts}
        self._cross = state.cross
        self._session = GraphSession(chain.bundle.file(chain.bundle.manifest.graphs["decoder_step"].file))
        self._position = 0

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position = np.array([self._position])
        out = self._session.run({"ids": ids[:, None], "position": position, **self._cross, **self._cache})
        self._cache = {name: out[name.replace(".", "_out.")] for name in self._cache}
        self._position += 1
        locations = out["locations"][:, 0] if "locations" in out else np.zeros((len(ids), 0, 2), np.float32)
        return out["logits"], locations

    def reorder(self, rows: np.ndarray) -> None:
        self._cache = {name: value[rows] for name, value in self._cache.items()}


@torch.no_grad()
def chain_parity(model: PixelLLM, bundle: Bundle, precision: str, seed: int) -> dict[str, ParityRecord]:
    """Compare a request through the bundle with the same request through the PyTorch model (whose weights the bundle holds).

    Two pictures, a box each, one instruction: greedy ids, locations of the words, locations of a teacher-forced text, masks.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    length = max(4, min(config.max_caption_length, CHAIN_LENGTH))
    image, valid = example_picture(config.image_size, 2, seed + 2)
    index = torch.arange(2)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.0, 0.2, 0.5, 0.7]]) * config.image_size
    context = torch.randint(2, config.t5.vocab, (2, 4), generator=generator)
    words = torch.randint(2, config.t5.vocab, (2, length), generator=generator)
    words[:, 0], words[:, -2], words[:, -1] = config.begin_token_id, config.end_token_id, 0

    scene = model.encode_image(image, valid)
    points, labels = pixelllm_prompt(boxes, config.prompt_use_box_rate)
    visual = model.extract_prompt(model.features(scene), index, points, labels)
    encoded, mask = model.text.encode(visual, context)
    cross = model.text.cross_kv(encoded)

    def logits_at(tokens: Tensor, position: int) -> Tensor:
        cache = model.text.empty_cache(len(tokens), position + 1)
        return model.text.step(tokens[:, : position + 1], torch.tensor([0]), cache, cross, mask)[0]

    begin = reference.begin_tokens(2, length, config.begin_token_id, config.end_token_id)
    tokens, _ = reference.greedy(logits_at, begin, config.end_token_id)
    _, features = model.text.decode(words, None, mask, cross=cross, with_logits=False)

    chain = GraphChain(bundle)
    maps = chain.encode(image.numpy(), valid.numpy())
    prefix = chain.extract(maps["features"], index.numpy(), points.numpy(), labels.numpy())
    state = chain.encode_text(prefix, context.numpy())
    decoded = chain.generate(state, DecodeRules(length, config.begin_token_id, config.end_token_id))
    assert isinstance(decoded, list)
    ids = np.full(tokens.shape, config.end_token_id, np.int64)
    ids[:, 0] = config.begin_token_id
    for row, caption in enumerate(decoded):
        ids[row, 1 : 1 + len(caption.ids)] = caption.ids
    passed = chain.text_pass(state, words.numpy())

    int8 = precision == "int8"
    loose = None if not int8 else 1.0
    records = {
        "chain/greedy_ids": ParityRecord(
            float(np.mean(ids != tokens.numpy())),
            INT8_IDS_TOLERANCE if int8 else EXACT,
            "torch, share of ids that differ",
        ),
        "chain/pass_features": _record(passed["features"], features, loose),
    }
    if model.point_predictor is not None:
        records["chain/pass_locations"] = _record(passed["locations"], model.locate(features), loose)
    if model.mask_decoder is not None:
        wanted, iou = model.mask(scene.sam, index, boxes, visual, features)
        out = chain.masks(maps["sam"], index.numpy(), boxes.numpy(), prefix, passed["features"])
        records["chain/masks"] = _record(out["masks"][:, 0], wanted, loose)
        records["chain/iou"] = _record(out["iou"][:, 0], iou, loose)
    return records


def _record(actual: np.ndarray, expected: Tensor, tolerance: float | None) -> ParityRecord:
    error = relative_error({"x": actual}, {"x": expected.numpy()})
    return ParityRecord(error, tolerance or LOCATION_TOLERANCE, "torch with the same weights")
