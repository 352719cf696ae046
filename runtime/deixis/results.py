"""What calls return: frozen dataclasses in pixels of the picture the user gave.

Points are (x, y), boxes (left, top, right, bottom), both continuous: a whole picture is (0, 0, width, height).
Locations are the model's own and are not clamped to the picture. `to_dict()` gives plain JSON values; a number that
is not finite becomes null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis import masks

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Word:
    """One word of a text with its place.

    text: the word. start, end: its span of characters in the whole text. points: top-left and bottom-right of the
    word's box (min and max over its pieces), None when the model gave no place. score: mean log-probability of its
    pieces, None in a trace.
    """

    text: str
    start: int
    end: int
    points: tuple[Point, Point] | None = None
    score: float | None = None

    @property
    def box(self) -> Box | None:
        """(left, top, right, bottom) px, or None."""
        return None if self.points is None else (*self.points[0], *self.points[1])

    @property
    def center(self) -> Point | None:
        """Middle of the box, (x, y) px, or None."""
        if self.points is None:
            return None
        (left, top), (right, bottom) = self.points
        return (left + right) / 2, (top + bottom) / 2

    def to_dict(self) -> dict[str, Any]:
        points = None if self.points is None else [_numbers(point) for point in self.points]
        return {
            "text": self.text,
            "start": self.start,
            "end": self.end,
            "points": None if points is None or None in points else points,
            "score": _number(self.score),
        }


@dataclass(frozen=True)
class Caption:
    """A generated text, every word with its place.

    score: log-probability of the whole, as the decoder ranks it. ids: the generated token ids. finished: False when
    its length cut it off (a passed deadline raises DeadlineError instead). box: the region that was described, None for
    the whole picture.
    """

    text: str
    words: tuple[Word, ...]
    score: float | None = None
    ids: tuple[int, ...] = ()
    finished: bool = True
    box: Box | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "words": [word.to_dict() for word in self.words],
            "score": _number(self.score),
            "ids": [int(i) for i in self.ids],
            "finished": bool(self.finished),
            "box": _box_values(self.box),
        }


@dataclass(frozen=True)
class DenseCaption:
    """One object of a picture, found and described.

    box: where it is. text, words, ids, finished: its description, as in Caption; words have places when the model gives
    places. score: what objects are ranked by, 0..1: detection_score, joined with the caption's when that was asked for.
    detection_score: how sure the detector is, 0..1. caption_score: log-probability of the text, as Caption.score.
    """

    box: Box
    text: str
    words: tuple[Word, ...]
    score: float
    detection_score: float
    caption_score: float | None = None
    ids: tuple[int, ...] = ()
    finished: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {
            "box": _numbers(self.box),
            "text": self.text,
            "words": [word.to_dict() for word in self.words],
            "score": _number(self.score),
            "detection_score": _number(self.detection_score),
            "caption_score": _number(self.caption_score),
            "ids": [int(i) for i in self.ids],
            "finished": bool(self.finished),
        }


@dataclass(frozen=True)
class Trace:
    """A given text, every word with its place."""

    text: str
    words: tuple[Word, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "words": [word.to_dict() for word in self.words]}


@dataclass(frozen=True)
class Mask:
    """A mask of the whole picture, kept run-length coded. size: (height, width) px. counts: COCO's compressed text."""

    size: tuple[int, int]
    counts: str

    @classmethod
    def from_array(cls, array: ArrayLike) -> Mask:
        """From an array [H, W]; every value that is not 0 belongs to the mask."""
        values = np.asarray(array)
        if values.ndim != 2:
            raise ValueError(f"a mask must have the shape [height, width], found {list(values.shape)}")
        return cls((values.shape[0], values.shape[1]), masks.encode_counts(values != 0))

    @classmethod
    def from_rle(cls, rle: Mapping[str, Any]) -> Mask:
        """From COCO's {"size": [height, width], "counts": text, bytes or list of run lengths}. Raises ValueError."""
        try:
            height, width = (int(side) for side in rle["size"])
            counts = rle["counts"]
            if isinstance(counts, bytes):
                counts = counts.decode("ascii")
            elif not isinstance(counts, str):
                counts = masks.pack_counts(np.asarray(counts, np.int64))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a COCO run-length mask: {error}") from None
        masks.decode_counts(counts, (height, width))  # refuses what does not fit
        return cls((height, width), counts)

    @cached_property
    def array(self) -> NDArray[np.bool_]:
        """bool [H, W], read-only; decoded on first use and kept."""
        array = masks.decode_counts(self.counts, self.size)
        array.flags.writeable = False
        return array

    @cached_property
    def area(self) -> int:
        """Number of pixels in the mask."""
        return int(masks.unpack_counts(self.counts)[1::2].sum())

    @cached_property
    def box(self) -> Box | None:
        """Tightest (left, top, right, bottom) around the mask, right and bottom exclusive; None when the mask is
        empty.
        """
        rows, columns = np.flatnonzero(self.array.any(1)), np.flatnonzero(self.array.any(0))
        if not len(rows):
            return None
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

    def to_rle(self) -> dict[str, Any]:
        """COCO's {"size": [height, width], "counts": text}, as pycocotools reads and JSON stores it."""
        return {"size": list(self.size), "counts": self.counts}

    to_dict = to_rle


@dataclass(frozen=True)
class Grounding:
    """The place of a phrase: its box, and its mask unless it was not asked for.

    Both are None when a model that may stay silent showed nothing; box alone is None when it showed an empty mask.
    score: the mask decoder's predicted IoU, None without a mask.
    """

    text: str
    box: Box | None
    mask: Mask | None = None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "box": _box_values(self.box),
            "mask": None if self.mask is None else self.mask.to_dict(),
            "score": _number(self.score),
        }


@dataclass(frozen=True)
class GroundedPhrase:
    """A phrase of a text and what it means in the picture.

    text: the phrase. start, end: its span of characters in the whole text, which is exactly `text`. mask: None when the
    model gave none for it. box: tightest around the mask, None without one or when it is empty. score: the mask
    decoder's predicted IoU, None without a mask.
    """

    text: str
    start: int
    end: int
    mask: Mask | None = None
    box: Box | None = None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "start": self.start,
            "end": self.end,
            "mask": None if self.mask is None else self.mask.to_dict(),
            "box": _box_values(self.box),
            "score": _number(self.score),
        }


@dataclass(frozen=True)
class GroundedText:
    """A text whose phrases carry masks.

    text: without any marks. phrases: in reading order; they do not overlap. masks: those that the model gave outside of
    any phrase ("Sure, it is this."), in the order given. problems: what was wrong with the marks that the model wrote,
    one line each; everything else of the answer is still there. score: log-probability per token, None for a text that
    was given. ids: the generated token ids, marks included, the end not. finished: False when its length cut it off.
    """

    text: str
    phrases: tuple[GroundedPhrase, ...] = ()
    masks: tuple[Mask, ...] = ()
    problems: tuple[str, ...] = ()
    score: float | None = None
    ids: tuple[int, ...] = ()
    finished: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "phrases": [phrase.to_dict() for phrase in self.phrases],
            "masks": [mask.to_dict() for mask in self.masks],
            "problems": list(self.problems),
            "score": _number(self.score),
            "ids": [int(i) for i in self.ids],
            "finished": bool(self.finished),
        }


@dataclass(frozen=True)
class Segment:
    """What a box or points select: a mask, its predicted IoU, and the mask's box (None when the mask is empty)."""

    mask: Mask
    score: float | None = None
    box: Box | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "mask": self.mask.to_dict(),
            "score": _number(self.score),
            "box": _box_values(self.box),
        }


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _box_values(box: Box | None) -> list[float] | None:
    return None if box is None else _numbers(box)


def _numbers(values: tuple[float, ...]) -> list[float] | None:
    """JSON numbers, or None when one of them is not finite: half a place is none."""
    return [float(v) for v in values] if all(math.isfinite(v) for v in values) else None
