"""The whole road through the exported graphs: picture, prompt, text, caption and its locations, box, mask.

The graphs run in the runtime itself, search included, so that what is compared with the PyTorch model is what a user
gets. The arrays at both ends are those of the model: padded pictures, points of the padded input.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deixis.bundle import ParityRecord
from deixis.caches import CrossCache
from deixis.decoding import Beams, Decoded, DecodeRules, beam_search, greedy
from deixis.detection import Detections
from deixis.pipeline import Pipeline
from deixis_export.cases import example_picture
from deixis_export.loaded import LoadedBundle
from deixis_export.session import Arrays, relative_error
from deixis_train.models import decoding as reference
from deixis_train.models.box_decoder import Detections as TorchDetections
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import corners, pixelllm_prompt

CHAIN_TOLERANCE = 2e-3  # continuous values at the end of the chain
EXACT = 0.0
CHAIN_LENGTH = 16  # of the captions compared at export
LOST_TOLERANCE = 0.1  # share of detections that near ties may exchange
INT8_TOLERANCE = 1.0  # in effect recorded only: one flipped word changes all that follow


class GraphChain(LoadedBundle[Pipeline]):
    """A bundle of family pixelllm in the runtime, driven with arrays."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(bundle, Pipeline)

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

    def encode_text(self, visual: np.ndarray, context: np.ndarray | None) -> CrossCache:
        """context [N, C], 0 = padding. None leaves it out: C = 0, which bundles do not promise but parity needs, for
        positions without meaning differ otherwise.
        """
        ids = np.zeros((len(visual), 0), np.int64) if context is None else context.astype(np.int64)
        outputs = self.run("text_encoder", {"visual_prefix": visual, "context_ids": ids})
        spec = self.pipeline.manifest.caches.cross_cache
        assert spec is not None, "every bundle of pixelllm has a cross cache"
        return CrossCache.from_outputs(outputs, spec.layers)

    def generate(self, cross: CrossCache, rules: DecodeRules) -> list[Decoded] | Beams:
        """Greedy for one beam, beam search for more."""
        decoder = self.pipeline.decoder(cross, rules.beams, rules.length)
        if rules.beams == 1:
            return greedy(decoder, cross.rows, rules, _go_on)
        return beam_search(decoder, cross.rows, rules, _go_on)

    def text_pass(self, cross: CrossCache, ids: np.ndarray) -> Arrays:
        """Teacher-forced `features` and `locations` of given ids [N, L]."""
        return self.run("decoder_pass", {"ids": ids.astype(np.int64), **cross.inputs()})

    def masks(
        self, sam: np.ndarray, image_index: np.ndarray, boxes: np.ndarray, visual: np.ndarray, features: np.ndarray
    ) -> Arrays:
        """`masks` [R, 4, 4h, 4w] and `iou` [R, 4] of boxes [R, 4], through the mask adapter where there is one."""
        points, labels = (tensor.numpy() for tensor in corners(torch.from_numpy(boxes)))
        delta = self.pipeline.prompt_delta(visual, features)
        if delta is None:
            delta = np.zeros((*labels.shape, self.pipeline.manifest.mask.prompt_width), np.float32)
        inputs = {"sam": sam, "image_index": image_index, "points": points, "labels": labels, "prompt_delta": delta}
        return self.run("mask_decoder", inputs)


def _go_on() -> None:
    """No deadline and no cancelling."""


def greedy_tokens(decoded: list[Decoded], rules: DecodeRules) -> np.ndarray:
    """Greedy captions as id arrays [N, L]: BOS, the ids, EOS behind them (section 11)."""
    tokens = np.full((len(decoded), rules.length), rules.end_id, np.int64)
    tokens[:, 0] = rules.begin_id
    for row, caption in enumerate(decoded):
        tokens[row, 1 : 1 + len(caption.ids)] = caption.ids
    return tokens


def lost_detections(found: list[Detections], expected: TorchDetections, size: int) -> float:
    """Share of the expected detections that have no counterpart among those found, and the other way round.

    A counterpart has sides and score within the chain's tolerance. Single ones may be lost: where two candidates have
    almost the same score, or almost the overlap that suppresses, rounding decides between them.
    """
    lost = total = 0
    for ours, boxes, scores in zip(found, expected.boxes.numpy(), expected.scores.numpy(), strict=True):
        mine = np.column_stack([ours.boxes / size, ours.scores])[: ours.count]
        theirs = np.column_stack([boxes / size, scores])[scores > 0]
        same = np.abs(mine[:, None] - theirs[None]).max(axis=2) <= CHAIN_TOLERANCE
        lost += int((~same.any(axis=0)).sum() + (~same.any(axis=1)).sum())
        total += len(mine) + len(theirs)
    return lost / max(total, 1)


@torch.no_grad()
def chain_parity(model: PixelLLM, bundle: Path, precision: str, seed: int) -> dict[str, ParityRecord]:
    """Compare a request through the bundle with the same request through the PyTorch model of the same weights.

    Two pictures, a box each, one instruction: greedy ids, features and locations of a teacher-forced text, masks; and
    the objects that the detector finds.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    length = max(4, min(config.max_caption_length, CHAIN_LENGTH))
    rules = DecodeRules(length, config.begin_token_id, config.end_token_id)
    image, valid = example_picture(config.image_size, 2, seed + 2)
    index = torch.arange(2)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.0, 0.2, 0.5, 0.7]]) * config.image_size
    context = torch.randint(2, config.text.vocab, (2, 4), generator=generator)
    words = torch.randint(2, config.text.vocab, (2, length), generator=generator)
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

    int8 = precision == "int8"
    tolerance = INT8_TOLERANCE if int8 else CHAIN_TOLERANCE

    def record(actual: np.ndarray, expected: Tensor) -> ParityRecord:
        error = relative_error({"x": actual}, {"x": expected.numpy()})
        return ParityRecord(error, tolerance, "torch with the same weights")

    records: dict[str, ParityRecord] = {}
    with GraphChain(bundle) as chain:
        maps = chain.encode(image.numpy(), valid.numpy())
        prefix = chain.extract(maps["features"], index.numpy(), points.numpy(), labels.numpy())
        chain.release()
        state = chain.encode_text(prefix, context.numpy())
        decoded = chain.generate(state, rules)
        assert isinstance(decoded, list)
        differing = float(np.mean(greedy_tokens(decoded, rules) != tokens.numpy()))
        allowed = INT8_TOLERANCE if int8 else EXACT
        records["chain/greedy_ids"] = ParityRecord(differing, allowed, "torch, share of ids that differ")
        chain.release()
        passed = chain.text_pass(state, words.numpy())
        records["chain/pass_features"] = record(passed["features"], features)
        if model.point_predictor is not None:
            records["chain/pass_locations"] = record(passed["locations"], model.locate(features))
        chain.release()
        if model.mask_decoder is not None:
            wanted, iou = model.mask(scene.sam, index, boxes, visual, features)
            out = chain.masks(maps["sam"], index.numpy(), boxes.numpy(), prefix, passed["features"])
            records["chain/masks"] = record(out["masks"][:, 0], wanted)
            records["chain/iou"] = record(out["iou"][:, 0], iou)
        if model.box_decoder is not None:
            chain.release()
            found = chain.pipeline.detect_features(maps["features"], _go_on)
            lost = lost_detections(found, model.detect(model.features(scene)), config.image_size)
            allowed = INT8_TOLERANCE if int8 else LOST_TOLERANCE
            records["chain/detections"] = ParityRecord(
                lost, allowed, "torch, share of detections without a counterpart"
            )
    return records
