"""What a measurement asks of a model, whatever runs it: the exported bundle, or the PyTorch model.

Pictures are RGB uint8 [H, W, 3] as stored; boxes are XYXY in px of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Masks = list[NDArray[np.bool_]]


class PlacedWord(NamedTuple):
    """A word of a given text and its box, not clipped; None where the model points nowhere."""

    text: str
    box: Box | None


class Described(NamedTuple):
    """An object that the model found by itself: its box, what it says of it, and how sure it is (0 to 1)."""

    box: Box
    text: str
    score: float


class GroundedAnswer(NamedTuple):
    """A text with its phrases in order, each with its mask bool [H, W] (None where the model gave none), and the masks
    that belong to no phrase.
    """

    text: str
    phrases: tuple[tuple[str, NDArray[np.bool_] | None], ...]
    masks: tuple[NDArray[np.bool_], ...]


class Predictor(Protocol):
    """Answers about pictures. A predictor keeps the features of the picture it was asked about last.

    Every method raises `deixis.errors.PromptError` for a text that the model cannot take (`TextTooLongError` where it
    is too long) and `deixis.errors.TaskError` for what the model cannot do.
    """

    @property
    def name(self) -> str:
        """ "bundle" or "torch": names its numbers in reports."""
        ...

    @property
    def abilities(self) -> frozenset[str]:
        """What the model can do, by the runtime's names: "refer", "trace", "caption", "region_caption",
        "dense_captions", "segment", "grounded_caption", "ask".
        """
        ...

    def refer(
        self, picture: Image, texts: Sequence[str], masks: bool = True
    ) -> tuple[list[Box | None], list[NDArray[np.bool_] | None] | None]:
        """The box of each expression, clipped to the picture, and its mask bool [H, W] (None without `masks`).

        Either of an expression is None where the model shows nothing.
        """
        ...

    def trace(self, picture: Image, text: str) -> list[PlacedWord]:
        """The words of a given text (what stands between white space) with their boxes."""
        ...

    def caption(self, picture: Image) -> str:
        """A caption of the whole picture."""
        ...

    def region_captions(self, picture: Image, boxes: Sequence[Box]) -> list[str]:
        """A caption of each box."""
        ...

    def dense_captions(self, picture: Image) -> list[Described]:
        """Every object that the detector's own threshold lets pass, best first; boxes are clipped to the picture."""
        ...

    def grounded_caption(self, picture: Image) -> GroundedAnswer:
        """A caption of the whole picture, its phrases with masks."""
        ...

    def answer(self, picture: Image, question: str) -> str:
        """What the model answers to a question about the picture, without marks."""
        ...

    def segment(self, picture: Image, boxes: Sequence[Box]) -> Masks:
        """The mask bool [H, W] that each box selects."""
        ...
