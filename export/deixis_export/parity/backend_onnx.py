"""The exported graphs behind the `Backend` protocol, run by the runtime with its own search."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from deixis.caches import CANDIDATES
from deixis.decoding import Beams, DecodeRules, Top, beam_search, greedy
from deixis_export.chain import GraphChain, greedy_tokens
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.parity.backend import Caption, Decoding, EncodedImages, Floats, Ids, LogitsFn, TextPass
from deixis_export.parity.detectors import GraphDetector
from deixis_export.presets import random_tokenizer_for
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import pixelllm_prompt


@contextmanager
def open_backend(model: PixelLLM) -> Iterator[OnnxBackend]:
    """Export a model in fp32 to a temporary bundle and run that. Raises ExportError."""
    with tempfile.TemporaryDirectory(prefix="deixis-parity-") as folder:
        bundle = Path(folder) / "bundle"
        # The export folds weights in place; the caller's model stays as it was. Text never comes in, so any tokenizer
        # does.
        export_bundle(
            copy.deepcopy(model),
            bundle,
            tokenizer_json=random_tokenizer_for(model.config),
            options=ExportOptions(),
        )
        with GraphChain(bundle) as chain:
            yield OnnxBackend(chain)


class OnnxBackend:
    """Emits what graphs emit; values from inside them are None."""

    model: PixelLLM | None = None

    def __init__(self, chain: GraphChain) -> None:
        self._chain = chain

    @property
    def detector(self) -> GraphDetector | None:
        return None if self._chain.pipeline.manifest.detection is None else GraphDetector(self._chain)

    def encode_images(self, image: Floats, valid_hw: Floats) -> EncodedImages:
        maps = self._chain.encode(image, valid_hw)
        return EncodedImages(maps["features"], maps["sam"], None)

    def extract_prompts(self, images: EncodedImages, image_index: Ids, boxes: Floats, as_points: bool) -> Floats:
        assert images.features is not None
        boxes_px = torch.from_numpy(np.asarray(boxes, np.float32))
        points, labels = pixelllm_prompt(boxes_px, 0.0 if as_points else 1.0)
        return self._chain.extract(images.features, np.asarray(image_index, np.int64), points.numpy(), labels.numpy())

    def caption(self, visual: Floats, context: Ids | None, length: int, decoding: Decoding) -> Caption:
        rules = _rules(decoding, length)
        found = self._chain.generate(self._chain.encode_text(np.asarray(visual, np.float32), context), rules)
        if isinstance(found, Beams):
            return Caption(found.tokens, found.scores, found.locations[:, -1])
        tokens = greedy_tokens(found, rules)
        points = np.zeros((*tokens.shape, *found[0].locations.shape[1:]), np.float32)
        for row, caption in enumerate(found):
            points[row, 1 : 1 + len(caption.ids)] = caption.locations
        scores = np.array([caption.score for caption in found], np.float32)
        return Caption(tokens[:, None], scores[:, None], points)

    def text_pass(self, visual: Floats, context: Ids | None, tokens: Ids) -> TextPass:
        cross = self._chain.encode_text(np.asarray(visual, np.float32), context)
        out = self._chain.text_pass(cross, np.asarray(tokens))
        valid = None if context is None else cross.encoder_mask > 0.5
        return TextPass(out["features"], out.get("locations"), valid=valid)

    def steps(self, visual: Floats, context: Ids | None, tokens: Ids) -> Floats:
        cross = self._chain.encode_text(np.asarray(visual, np.float32), context)
        decoder = self._chain.pipeline.decoder(cross, 1, tokens.shape[1] + 1, with_logits=True)
        found = []
        for ids in tokens.T:
            top, _ = decoder.step(ids)
            assert top.logits is not None
            found.append(top.logits.copy())
        return np.stack(found, axis=1)

    def masks(
        self, images: EncodedImages, image_index: Ids, boxes: Floats, visual: Floats, features: Floats
    ) -> tuple[Floats, Floats]:
        assert images.sam is not None
        index = np.asarray(image_index, np.int64)
        out = self._chain.masks(images.sam, index, np.asarray(boxes, np.float32), visual, features)
        return out["masks"][:, 0], out["iou"][:, 0]

    def search(self, logits_fn: LogitsFn, begin: Ids, decoding: Decoding) -> tuple[Ids, Floats] | None:
        rules = _rules(decoding, begin.shape[1])
        decoder = _Synthetic(logits_fn, begin, rules)
        if rules.beams > 1:
            found = beam_search(decoder, len(begin), rules, lambda: None)
            return found.tokens, found.scores
        captions = greedy(decoder, len(begin), rules, lambda: None)
        scores = np.array([caption.score for caption in captions], np.float32)
        return greedy_tokens(captions, rules)[:, None], scores[:, None]


class _Synthetic:
    """A language model given as a function of whole rows, as the runtime's search wants it."""

    def __init__(self, logits_fn: LogitsFn, begin: Ids, rules: DecodeRules) -> None:
        self._logits_fn = logits_fn
        self._rows = np.repeat(np.asarray(begin, np.int64), rules.beams, axis=0)
        self._position = 0

    def step(self, ids: np.ndarray, banned: np.ndarray | None = None) -> tuple[Top, np.ndarray]:
        self._rows[:, self._position] = ids
        logits = self._logits_fn(self._rows, self._position)
        self._position += 1
        top = Top.of_logits(np.asarray(logits, np.float32), banned, CANDIDATES)
        return top, np.zeros((len(ids), 1, 2), np.float32)

    def reorder(self, rows: np.ndarray) -> None:
        self._rows = self._rows[rows]


def _rules(decoding: Decoding, length: int) -> DecodeRules:
    return DecodeRules(length, decoding.begin_id, decoding.end_id, decoding.beams, decoding.per_node, decoding.alpha)
