"""What every reader of a data set yields: a picture and rows of text about it, before anything is resized or tokenised.

Boxes are XYXY in px of the picture as stored (x1, y1 exclusive, not necessarily integers). The way of a record:
`formats/` reads it into a `Sample`, `preparation/` augments, fits and tokenises it into an `Example`, and examples are
stacked into a `Batch` (both in `batches.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Box = tuple[float, float, float, float]
Rle = dict[str, Any]  # compressed COCO run lengths: {"size": [h, w], "counts": str}

# Which losses a source's rows bear (section 12). "text": the decoder learns to write the text. "point": positions learn
# where they point. "mask": the referring mask. "proposal": the rows' boxes train the box decoder, and captions are
# learned on what it proposes.
Loss = Literal["text", "point", "mask", "proposal"]


@dataclass(frozen=True)
class Utterance:
    """One timed piece of a narration (section 14.1). Centre and box are fractions of the picture, box not clipped."""

    text: str
    center: tuple[float, float]
    box: Box


@dataclass(frozen=True)
class Phrase:
    """Characters start..end of a row's text, and what they name: a mask for each thing, or part of it, and a box px."""

    start: int
    end: int
    masks: tuple[Rle, ...] = ()
    box: Box | None = None


@dataclass(frozen=True)
class Row:
    """One sequence about the picture.

    text: what the decoder writes, or is given (referring, controlled traces).
    context: what the text encoder is asked; "" takes the source's instruction.
    prompt: the box that the prompt extractor looks through, px; None means the whole picture.
    box: what the whole text is about, px: target of a referring expression, region of a region caption. None for
        captions of the whole picture.
    mask: run lengths of the thing meant, if the data has them.
    utterances: the timed pieces of a narration, in order; empty for rows without a trace.
    phrases: what the text names, in its order, never overlapping; empty for texts that are not grounded.
    part: the part that is meant, where `text` names the whole thing ("ear" of "dog").
    question: what the text answers, as it was asked; "" where nothing was.
    """

    text: str
    context: str = ""
    prompt: Box | None = None
    box: Box | None = None
    mask: Rle | None = None
    utterances: tuple[Utterance, ...] = ()
    phrases: tuple[Phrase, ...] = ()
    part: str = ""
    question: str = ""


@dataclass(frozen=True)
class LabelMap:
    """A picture of class numbers, one per pixel; `names` by number, "" for what is no class."""

    path: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Instance:
    """A thing of the picture: COCO-style annotation. `attributes`: e.g. {"color": "red", "size": "small"}."""

    category: str
    box: Box
    mask: Rle | None = None
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A picture and what a source says of it. `where`: "file:line" or "file:record", for messages.

    labels: its classes by pixel, for semantic segmentation; such samples may have no rows.
    """

    image: Path
    width: int
    height: int
    rows: tuple[Row, ...]
    instances: tuple[Instance, ...] = ()
    where: str = ""
    labels: LabelMap | None = None

    @property
    def key(self) -> str:
        """Names the picture in caches of features; pictures of one data folder have different names."""
        return self.image.name


class Source(Protocol):
    """A data set opened for reading. Iterating streams its samples, in the file's order, from its beginning.

    A malformed record is logged with file and line, counted in `skipped` and passed over; more than the allowed share
    raises `deixis_train.data.formats.errors.DataError`.
    """

    name: str
    losses: frozenset[Loss]
    skipped: int

    def __iter__(self) -> Iterator[Sample]: ...
