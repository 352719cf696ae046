"""Boxes as tokens, and tokens as boxes.

Boxes are XYXY in fractions of the real picture. Both codings cut each side into bins and say a coordinate by its bin;
reading gives the middle of the bin, so that a box inside the picture comes back within half a bin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deixis_train.data.batches import Example, Floats, Ints
from deixis_train.data.samples import Box

PAD, END = 0, 1
DIGIT_BINS = 100
WRITTEN = re.compile(",".join(["([0-9]{2})"] * 4))


class LocalisationError(ValueError):
    """The model's vocabulary cannot say locations in this way. One line."""


class Localiser(Protocol):
    """A way to say locations as tokens."""

    @property
    def length(self) -> int:
        """The most tokens that one location takes."""
        ...

    @property
    def bins(self) -> int:
        """Bins of each side."""
        ...

    def say(self, box: Box) -> list[int]:
        """Token ids of a box in fractions of the picture; what lies outside is moved to the edge."""
        ...

    def read(self, ids: Sequence[int]) -> Box | None:
        """The box that these ids (without EOS) say, or None if they are not one location and nothing else.

        Corners come in any order, like the two points of the location head.
        """
        ...


@dataclass(frozen=True)
class WrittenDigits:
    """Two digits per coordinate, as any text: "07,11,56,78". Needs a tokenizer that can write digits and commas."""

    tokenizer: Tokenizer
    length: int = 12  # no tokenizer needs more than one token per character, and one for the space
    bins: int = DIGIT_BINS

    def __post_init__(self) -> None:
        for text in ("01,23,45,67", "89,99,00,11"):
            if self._text(self.tokenizer.encode(f" {text}", add_special_tokens=False).ids) != text:
                raise LocalisationError(
                    f"the tokenizer cannot write {text!r}: locations as text need digits and commas in the vocabulary"
                )

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False).strip()

    def say(self, box: Box) -> list[int]:
        text = ",".join(f"{b:02d}" for b in to_bins(box, self.bins))
        return self.tokenizer.encode(f" {text}", add_special_tokens=False).ids

    def read(self, ids: Sequence[int]) -> Box | None:
        match = WRITTEN.fullmatch(self._text(ids))
        return None if match is None else from_bins([int(digits) for digits in match.groups()], self.bins)


@dataclass(frozen=True)
class ExtraTokens:
    """One token per coordinate, from `bins` tokens that x and y share. `first`: id of the first of them."""

    first: int
    bins: int = DIGIT_BINS
    length: int = 4

    def say(self, box: Box) -> list[int]:
        return [self.first + b for b in to_bins(box, self.bins)]

    def read(self, ids: Sequence[int]) -> Box | None:
        said = [int(i) - self.first for i in ids]
        if len(said) != 4 or not all(0 <= b < self.bins for b in said):
            return None
        return from_bins(said, self.bins)


def to_bins(box: Box, bins: int) -> list[int]:
    """Bins 0 .. bins - 1 of the coordinates; the right edge of the picture belongs to the last bin.

    Raises ValueError for a box that is not finite.
    """
    coordinates = np.asarray(box, np.float64)
    if not np.isfinite(coordinates).all():
        raise ValueError(f"a box must be finite, not {box}")
    return [int(b) for b in np.clip(np.floor(coordinates * bins), 0, bins - 1)]


def from_bins(said: Sequence[int], bins: int) -> Box:
    """The middles of bins as an XYXY box, its corners put in order."""
    x0, y0, x1, y1 = ((b + 0.5) / bins for b in said)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


@dataclass(frozen=True)
class SaidRows:
    """Rows with their locations said.

    text: [K, L'] ids, BOS words and locations EOS PAD... points: [K, L', 4] px; the tokens of a location point where it
    means. said: [K, L'] bool, tokens of locations, and the end: what there is to learn where the words are given.
    """

    text: Ints
    points: Floats
    said: NDArray[np.bool_]


def say_locations(
    text: Ints, points: Floats, boxes: Floats, valid_hw: tuple[int, int], localiser: Localiser
) -> SaidRows:
    """Put locations behind the words that have one.

    A location is said once for neighbouring tokens that point at the same box, behind the last of them: after the whole
    of a referring expression, after every timed piece of a narration.

    Args:
        text: [K, L] ids, BOS w1..wn EOS PAD.. (a truncated text lacks EOS; it gets one).
        points: [K, L, 4] XYXY px of the network input; zeros where a token points nowhere.
        boxes: [K, 4] px; a row without points that has a box points at it with all its words.
        valid_hw: height and width of the real part of the picture, px.
    """
    height, width = valid_hw
    scale = np.array([width, height, width, height], np.float64)
    rows: list[tuple[list[int], list[NDArray[np.float32]], list[bool]]] = []
    for ids, corners, box in zip(text, points, boxes, strict=True):
        stop = next((i for i in range(1, len(ids)) if ids[i] in (PAD, END)), len(ids))
        where = corners[:stop].copy()
        if not where.any() and box.any():
            where[1:] = box
        out_ids, out_points, out_said = [int(ids[0])], [where[0]], [False]
        for i in range(1, stop):
            tokens = [int(ids[i])]
            if where[i].any() and (i + 1 == stop or (where[i + 1] != where[i]).any()):
                x0, y0, x1, y1 = (float(v) for v in where[i] / scale)
                tokens += localiser.say((x0, y0, x1, y1))
            out_ids += tokens
            out_points += [where[i]] * len(tokens)
            out_said += [False] + [True] * (len(tokens) - 1)
        nowhere = np.zeros(4, np.float32)
        rows.append(([*out_ids, END], [*out_points, nowhere], [*out_said, True]))

    longest = max((len(ids) for ids, _, _ in rows), default=0)
    said = SaidRows(
        np.zeros((len(rows), longest), np.int64),
        np.zeros((len(rows), longest, 4), np.float32),
        np.zeros((len(rows), longest), bool),
    )
    for row, (ids, corners, flags) in enumerate(rows):
        said.text[row, : len(ids)], said.points[row, : len(ids)], said.said[row, : len(ids)] = ids, corners, flags
    return said


def say_examples(examples: Sequence[Example], localiser: Localiser) -> tuple[list[Example], NDArray[np.bool_]]:
    """Examples with their locations said, and which tokens are said of all their rows [R, L'] (see `SaidRows`)."""
    rows = [say_locations(e.text, e.points, e.boxes, e.valid_hw, localiser) for e in examples]
    longest = max((r.said.shape[1] for r in rows), default=0)
    said = np.zeros((sum(len(r.said) for r in rows), longest), bool)
    first = 0
    for r in rows:
        said[first : first + len(r.said), : r.said.shape[1]] = r.said
        first += len(r.said)
    return [replace(e, text=r.text, points=r.points) for e, r in zip(examples, rows, strict=True)], said
