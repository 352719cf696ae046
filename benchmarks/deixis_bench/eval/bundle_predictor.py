"""Answers of an exported bundle, through the public API of `deixis`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis_train.evaluation.predictor import Box, Described, GroundedAnswer, Image, Masks, PlacedWord


class BundlePredictor:
    """A `Predictor`. The model is the caller's to close."""

    name = "bundle"

    def __init__(self, model: deixis.Model) -> None:
        self._model = model
        self._last: tuple[Image, deixis.Scene] | None = None

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset(self._model.info.tasks)

    def refer(
        self, picture: Image, texts: Sequence[str], masks: bool = True
    ) -> tuple[list[Box | None], list[NDArray[np.bool_] | None] | None]:
        scene = self._scene(picture)
        found = self._model.refer_batch([(scene, text) for text in texts], mask=masks)
        boxes = [grounding.box for grounding in found]
        if not masks:
            return boxes, None
        return boxes, [None if grounding.mask is None else grounding.mask.array for grounding in found]

    def trace(self, picture: Image, text: str) -> list[PlacedWord]:
        return [PlacedWord(word.text, word.box) for word in self._scene(picture).trace(text).words]

    def caption(self, picture: Image) -> str:
        return self._scene(picture).caption().text

    def region_captions(self, picture: Image, boxes: Sequence[Box]) -> list[str]:
        scene = self._scene(picture)
        captions = self._model.caption_batch([(scene, deixis.Prompt(box=box)) for box in boxes])
        return [caption.text for caption in captions]

    def dense_captions(self, picture: Image) -> list[Described]:
        return [Described(one.box, one.text, one.score) for one in self._scene(picture).dense_captions()]

    def grounded_caption(self, picture: Image) -> GroundedAnswer:
        said = self._scene(picture).grounded_caption()
        phrases = tuple((phrase.text, None if phrase.mask is None else phrase.mask.array) for phrase in said.phrases)
        return GroundedAnswer(said.text, phrases, tuple(mask.array for mask in said.masks))

    def answer(self, picture: Image, question: str) -> str:
        return self._scene(picture).ask(question).text

    def segment(self, picture: Image, boxes: Sequence[Box]) -> Masks:
        scene = self._scene(picture)
        segments = self._model.segment_batch([(scene, deixis.Prompt(box=box)) for box in boxes])
        return [segment.mask.array for segment in segments]

    def _scene(self, picture: Image) -> deixis.Scene:
        if self._last is None or self._last[0] is not picture:
            self._last = (picture, self._model.encode(picture))
        return self._last[1]
