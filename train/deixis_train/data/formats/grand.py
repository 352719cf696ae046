"""GranD's training records (GLaMM section 12.6), as JSON lines: what the published LMDBs hold, a picture per line.

A line is {"image": NAME, "value": VALUE}, NAME the key of the database and VALUE the JSON that is stored there; with
or without ".jpg" at the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from deixis_train.data.formats import fields
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.grandf import apart, caption_of, span_of
from deixis_train.data.formats.json_files import read_records
from deixis_train.data.formats.masks import run_lengths
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Box, Phrase, Row, Sample

Level = Literal["referring", "captions", "objects"]
_SPEAKER = re.compile(r"^(?:assistant:|istant:)\s*", re.IGNORECASE)


class Grand(Reader):
    """A sample per picture.

    Args:
        level: "referring": a row per record (attribute, bbox, segmentation) as expression with box and mask.
            "captions": a row per short caption, with its phrases, masks and boxes. "objects": a row per object, its
            label as text, with box and mask; objects without a mask are passed over.
    """

    def __init__(self, files: list[Path], images: Path, *, level: str = "", **common: Any) -> None:
        super().__init__(files, images, **common)
        if level not in get_args(Level):
            raise DataError(f"source {self.name!r}: level {level!r} is unknown; known: {', '.join(get_args(Level))}")
        self._level = level

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        read_row = {"referring": _referring, "captions": _caption, "objects": _object}[self._level]
        for where, value in read_records(path, skips):
            found = None
            with skips.record(where):
                record = fields.record(value)
                name = fields.text(record, "image")
                name = name if Path(name).suffix else f"{name}.jpg"
                found = (*self.pictures.find(name, None), fields.items(record, "value"))
            if found is None:
                continue
            image, width, height, entries = found
            rows: list[Row] = []
            for number, entry in enumerate(entries):
                with skips.record(f"{where}, value[{number}]"):
                    row = read_row(fields.record(entry, "an entry"), width, height)
                    if row is not None:
                        rows.append(row)
            if rows:
                yield Sample(image, width, height, tuple(rows), where=where)


def _referring(entry: dict[str, Any], width: int, height: int) -> Row:
    text = _SPEAKER.sub("", fields.text(entry, "attribute")).strip()
    if not text:
        raise MalformedError("'attribute' is empty")
    mask = run_lengths(entry.get("segmentation"), width, height)
    return Row(text, box=_box(entry.get("bbox"), width, height), mask=mask)


def _caption(entry: dict[str, Any], width: int, height: int) -> Row | None:
    caption = caption_of(entry)
    phrases: list[Phrase] = []
    for detail in fields.items(entry, "details"):
        detail = fields.record(detail, "a detail")
        start, end = span_of(detail.get("tokens_positive"), caption)
        box = _box(detail.get("bbox"), width, height)
        segmentation = detail.get("segmentation")
        masks = (run_lengths(segmentation, width, height),) if segmentation else ()
        phrases.append(Phrase(start, end, masks, box))
    kept = apart(phrase for phrase in phrases if phrase.masks)
    return Row(caption, phrases=kept) if kept else None


def _object(entry: dict[str, Any], width: int, height: int) -> Row | None:
    labels = entry.get("labels")
    label = entry.get("label") or (labels[0] if isinstance(labels, list) and labels else None)
    text = fields.text({"label": label}, "label")
    if not entry.get("segmentation"):
        return None
    mask = run_lengths(entry["segmentation"], width, height)
    return Row(text, box=_box(entry.get("bbox"), width, height), mask=mask)


def _box(values: Any, width: int, height: int) -> Box:
    """GranD's boxes are corners, px."""
    if not isinstance(values, list) or len(values) != 4 or not all(fields.is_finite(v) for v in values):
        raise MalformedError(f"box {values!r:.80} is not four finite numbers")
    x0, y0, x1, y1 = values
    return fields.box_from_xywh([x0, y0, x1 - x0, y1 - y0], width, height)
