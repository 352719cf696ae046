"""What a sample becomes for GLaMM (section 9.5): a conversation, its boxes, and a mask for every [SEG] in it.

Every task draws from the sample; None means that there is nothing to ask, and another sample is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis.conversation import reserved_marks, tag_phrases
from deixis_train.data.formats.errors import DataError
from deixis_train.data.preparation.geometry import decode_mask
from deixis_train.data.samples import Box, LabelMap, Rle, Row, Sample
from deixis_train.glamm.templates import REGIONS, SEGMENT_ANSWERS, SLOT, named_regions

Masks = NDArray[np.uint8]
Rng = np.random.Generator
MOST_EXPRESSIONS, MOST_REGIONS = 3, 10


@dataclass(frozen=True)
class Item:
    """turns: questions and answers. boxes: px of the stored picture, one per `<bbox>`, in order. masks: one per [SEG],
    in order [m, H, W] of 0 and 1 at the size of the stored picture; None where no mask is asked for."""

    sample: Sample
    turns: tuple[tuple[str, str], ...]
    boxes: tuple[Box, ...] = ()
    masks: Masks | None = None


@dataclass(frozen=True)
class Asking:
    """How a source is asked. most: turns about the sample, or, for "ask", conversations about the picture; 0 takes the
    task's own number. jitter: boxes move by up to
    this share of their sides."""

    task: str
    questions: tuple[str, ...]
    most: int = 0
    jitter: float = 0.0
    masks: bool = True  # whether they are learned


def make_item(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    """One item of a sample, or None when it has nothing to ask for."""
    return _TASKS[asking.task](sample, asking, rng)


def join_items(items: Sequence[Item]) -> Item:
    """Items about one picture as one conversation, in the given order."""
    masks = [item.masks for item in items if item.masks is not None]
    return Item(
        items[0].sample,
        tuple(turn for item in items for turn in item.turns),
        tuple(box for item in items for box in item.boxes),
        np.concatenate(masks) if masks else None,
    )


def _grounded_caption(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    rows = [row for row in sample.rows if row.phrases and not reserved_marks(row.text)]
    if not rows:
        return None
    row = rows[rng.integers(len(rows))]
    phrases = [phrase for phrase in row.phrases if phrase.masks or not asking.masks]
    if not phrases:
        return None
    answer = tag_phrases(row.text, [(phrase.start, phrase.end) for phrase in phrases]).strip()
    masks = np.stack([_together(phrase.masks) for phrase in phrases]) if asking.masks else None
    return Item(sample, ((_question(asking, rng), answer),), masks=masks)


def _refer(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    rows = [row for row in sample.rows if row.mask is not None]
    turns, masks = [], []
    for row in _some(rows, asking.most or MOST_EXPRESSIONS, rng):
        turns.append(_segment(_plain(row.text).lower(), asking, rng))
        masks.append(row.mask)
    return _segmented(sample, turns, [decode_mask(m) for m in masks] if asking.masks else None)


def _classes(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    if sample.labels is not None:
        values = _read_labels(sample.labels, sample)
        present = [v for v in np.unique(values) if v < len(sample.labels.names) and sample.labels.names[v]]
        chosen = _some(present, asking.most or MOST_EXPRESSIONS, rng)
        turns = [_segment(sample.labels.names[v], asking, rng) for v in chosen]
        return _segmented(sample, turns, [(values == v).astype(np.uint8) for v in chosen] if asking.masks else None)
    rows = _some([row for row in sample.rows if row.mask is not None], asking.most or MOST_EXPRESSIONS, rng)
    turns = [_segment(_class_name(row, rng), asking, rng) for row in rows]
    return _segmented(sample, turns, [decode_mask(row.mask) for row in rows if row.mask] if asking.masks else None)


def _class_name(row: Row, rng: Rng) -> str:
    if not row.part:
        return row.text
    return f"{row.text} {row.part}" if rng.random() < 0.5 else f"the {row.part} of the {row.text}"


def _segment(text: str, asking: Asking, rng: Rng) -> tuple[str, str]:
    return _question(asking, rng, text), SEGMENT_ANSWERS[rng.integers(len(SEGMENT_ANSWERS))]


def _segmented(sample: Sample, turns: Sequence[tuple[str, str]], masks: list[Masks] | None) -> Item | None:
    return Item(sample, tuple(turns), masks=None if masks is None else np.stack(masks)) if turns else None


def _region(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    rows = [row for row in sample.rows if row.box is not None]
    turns, boxes = [], []
    for number, row in enumerate(_some(rows, asking.most or MOST_REGIONS, rng), start=1):
        turns.append((_question(asking, rng, regions=named_regions(number, 1)), _plain(row.text)))
        boxes.append(_jittered(row.box, sample, asking, rng))
    return Item(sample, tuple(turns), tuple(boxes)) if turns else None


def _region_introduced(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    """The first region is asked for with an introduction, the others by their names alone."""
    item = _region(sample, asking, rng)
    if item is None:
        return None
    later = ((named_regions(number, 1), answer) for number, (_, answer) in enumerate(item.turns[1:], start=2))
    return Item(sample, (item.turns[0], *later), item.boxes)


def _region_group(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    """One turn about all regions, whose answer is the caption, then one about each. Every box is named twice, so it is
    given twice; the reference gives it once, and fails (quirk Q9)."""
    rows = [row for row in sample.rows if any(phrase.box for phrase in row.phrases)]
    if not rows:
        return None
    row = rows[rng.integers(len(rows))]
    phrases = [phrase for phrase in row.phrases if phrase.box is not None][: asking.most or MOST_REGIONS]
    turns = [(_question(asking, rng, regions=named_regions(1, len(phrases))), _plain(row.text))]
    for number, phrase in enumerate(phrases, start=1):
        turns.append((f"region{number} <bbox>", _plain(row.text[phrase.start : phrase.end])))
    boxes = tuple(_jittered(phrase.box, sample, asking, rng) for phrase in phrases)
    return Item(sample, tuple(turns), boxes + boxes)


def _caption(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    if not sample.rows:
        return None
    row = sample.rows[rng.integers(len(sample.rows))]
    return Item(sample, ((_question(asking, rng), _plain(row.text)),))


def _ask(sample: Sample, asking: Asking, rng: Rng) -> Item | None:
    """The whole conversation; the template is for its first question."""
    rows = [row for row in sample.rows if row.question]
    if not rows:
        return None
    first = (_question(asking, rng, _plain(rows[0].question)), _plain(rows[0].text))
    return Item(sample, (first, *((_plain(row.question), _plain(row.text)) for row in rows[1:])))


_TASKS: Mapping[str, Callable[[Sample, Asking, Rng], Item | None]] = {
    "grounded_caption": _grounded_caption,
    "refer": _refer,
    "classes": _classes,
    "region": _region,
    "region_introduced": _region_introduced,
    "region_group": _region_group,
    "caption": _caption,
    "ask": _ask,
}
TASKS = tuple(_TASKS)


def _question(asking: Asking, rng: Rng, text: str = "", regions: str = "") -> str:
    question = asking.questions[rng.integers(len(asking.questions))]
    return question.replace(SLOT, text).replace(REGIONS, regions)


def _some(values: Sequence, most: int, rng: Rng) -> list:
    """At most so many of the values, in random order."""
    return [values[i] for i in rng.permutation(len(values))[:most]]


def _plain(text: str) -> str:
    """The text without marks of the vocabulary, which mean something else in a conversation."""
    for mark in reserved_marks(text):
        text = text.replace(mark, " ")
    return text.strip()


def _jittered(box: Box | None, sample: Sample, asking: Asking, rng: Rng) -> Box:
    assert box is not None
    if not asking.jitter:
        return box
    x0, y0, x1, y1 = box
    moves = rng.uniform(-asking.jitter, asking.jitter, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    limits = [sample.width, sample.height, sample.width, sample.height]
    x0, y0, x1, y1 = np.clip(np.array(box) + moves, 0, limits)
    return float(x0), float(y0), float(x1), float(y1)


def _together(masks: Sequence[Rle]) -> Masks:
    """What any of the masks covers. The reference adds them up, so that its targets exceed 1 where they overlap."""
    whole = decode_mask(masks[0])
    for mask in masks[1:]:
        whole = whole | decode_mask(mask)
    return whole


def _read_labels(labels: LabelMap, sample: Sample) -> Masks:
    values = cv2.imread(str(labels.path), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 2 or values.dtype != np.uint8 or values.shape != (sample.height, sample.width):
        raise DataError(f"{labels.path}: not an 8-bit map of {sample.width}x{sample.height} class numbers")
    return np.asarray(values, np.uint8)
