"""The exported graphs of a GLaMM behind the `GlammBackend` protocol, run by the runtime with its search and cache."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.conversation import IMAGE_ID
from deixis.geometry import Geometry
from deixis.glamm.generation import PromptedDecoder, steps_of
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.session import LanguageSession
from deixis.masks import segment_mask
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.parity.glamm.backend import Answer, Floats, Ids, Prepared, Reading, Size, positions_of
from deixis_export.parity.report import Absent
from deixis_export.presets_glamm import random_glamm_tokenizer
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm


@contextmanager
def open_backend(model: Glamm) -> Iterator[OnnxGlamm]:
    """Export a model in fp32 to a temporary bundle and run that. Raises ExportError."""
    with tempfile.TemporaryDirectory(prefix="deixis-parity-") as folder:
        bundle = Path(folder) / "bundle"
        # The export folds weights in place; the caller's model stays as it was. Ids come in, so any tokenizer does.
        tokenizer = random_glamm_tokenizer(model.config)
        export_bundle(copy.deepcopy(model), bundle, tokenizer_json=tokenizer, options=ExportOptions())
        with deixis.load(bundle, device="cpu", verify=False) as loaded:
            pipeline = loaded.pipeline
            assert isinstance(pipeline, GlammPipeline)
            yield OnnxGlamm(pipeline, model.config)


class OnnxGlamm:
    """Emits what graphs emit; values from inside them are not to be had."""

    model: Glamm | None = None

    def __init__(self, pipeline: GlammPipeline, config: GlammConfig) -> None:
        self._pipeline = pipeline
        self._config = config

    def encode_global(self, images: Floats) -> tuple[Floats, list[Floats]]:
        outputs = self._pipeline.engine.run("global_encoder", {"image": images})
        levels = [outputs[f"level.{n}"] for n in range(len(outputs) - 1)]
        return np.asarray(outputs["features"], np.float32), [np.asarray(level, np.float32) for level in levels]

    def encode_regions(self, levels: Sequence[Floats], boxes: Floats, image_index: Ids) -> Floats:
        maps = {f"level.{n}": np.ascontiguousarray(level) for n, level in enumerate(levels)}
        inputs = {**maps, "boxes": boxes.astype(np.float32), "image_index": image_index.astype(np.int64)}
        return np.asarray(self._pipeline.engine.run("region_encoder", inputs)["regions"], np.float32)

    def encode_grounding(self, images: Floats, valid_hw: Floats) -> Floats:
        inputs = {"image": images, "valid_hw": valid_hw.astype(np.float32)}
        return np.asarray(self._pipeline.engine.run("grounding_encoder", inputs)["sam"], np.float32)

    def read(self, ids: Sequence[int], features: Floats | None, regions: Floats | None, at: Sequence[int]) -> Reading:
        """What precedes the picture and the picture in one go, then id by id: the graph gives the logits of its last
        position only. Those inside the picture are had by cutting it short.
        """
        ids = list(ids)
        start = ids.index(IMAGE_ID) + 1 if IMAGE_ID in ids else 1
        session = self._session(features)
        vectors = iter(() if regions is None else regions)
        logits: dict[int, Floats] = {}

        def consume(part: list[int]) -> None:
            named = part.count(self._config.ids.region) if regions is not None else 0
            own = np.array([next(vectors) for _ in range(named)]) if named else None
            if own is None and len(part) == 1 and part[0] != IMAGE_ID:
                found, _ = session.step(np.array(part))
            else:
                found, _ = session.feed(np.array([part], np.int64), [own])
            assert found.logits is not None
            logits[session.position - 1] = found.logits[0].copy()

        consume(ids[:start])
        for i in ids[start:]:
            consume([i])
        inside = {
            position: self._cut_short(ids[:start], features, position) for position in at if position not in logits
        }
        return Reading(session.states[0].copy(), np.array([(logits | inside)[position] for position in at]))

    def generate(self, ids: Sequence[int], picture: Prepared, boxes: Floats | None, most: int) -> Answer:
        [features] = self._pipeline.encode([picture.original])
        named = list(ids).count(self._config.ids.region)
        if named > (0 if boxes is None else len(boxes)):
            raise Absent("the prompt names regions without boxes, which the runtime refuses")
        regions: list[Floats | None] = [None]
        if boxes is not None and named:
            height, width = picture.original.shape[:2]
            regions = list(self._pipeline.regions([features], [boxes[:named] * np.array([width, height] * 2)]))
        session = self._pipeline.session([features], 1)
        decoder = PromptedDecoder(session, np.array([ids], np.int64), regions)
        task = self._pipeline.task("grounded_caption")
        steps = steps_of(self._pipeline, decoder, 1, task, most, lambda: None)
        return self._with_masks([*ids, *(int(s.ids[0]) for s in steps if s.ids is not None)], session, features)

    def teacher_forced(self, ids: Sequence[int], picture: Prepared) -> Answer:
        [features] = self._pipeline.encode([picture.original])
        session = self._pipeline.session([features], 1)
        session.feed(np.array([ids], np.int64))
        return self._with_masks(list(ids), session, features)

    def masks(self, logits: Floats, valid: Size, original: Size) -> NDArray[np.bool_]:
        geometry = Geometry(original, valid, self._config.image_size)
        masks = [segment_mask(one, geometry) for one in logits]
        return np.stack(masks) if masks else np.zeros((0, *original), bool)

    def _with_masks(self, ids: list[int], session: LanguageSession, features: GlammFeatures) -> Answer:
        positions = positions_of(ids, self._config)
        states = session.states[0, positions].copy()
        logits, iou = self._pipeline.masks(states, [features] * len(states))
        return Answer(np.array(ids), positions, states, logits, iou)

    def _cut_short(self, ids: list[int], features: Floats | None, position: int) -> Floats:
        """Logits behind a position at or before the end of the picture, which the text `ids` ends with."""
        before = len(ids) - 1
        if position < before:
            top, _ = self._session(None).feed(np.array([ids[: position + 1]], np.int64))
        else:
            assert features is not None
            top, _ = self._session(features[: position - before + 1]).feed(np.array([ids], np.int64))
        assert top.logits is not None
        return top.logits[0]

    def _session(self, features: Floats | None) -> LanguageSession:
        shown = np.zeros((1, self._config.llama.emb), np.float32) if features is None else features
        size = self._config.image_size
        return self._pipeline.session([GlammFeatures(Geometry((1, 1), (1, 1), size), shown, (), None)], 1)
