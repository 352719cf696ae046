"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg) in their JSON forms, grouped per picture (section 14.2).

Three forms are read, each as a whole (the largest published one has 120 MB):

- MDETR's finetune_refcoco*.json: an entry of "images" per expression, with "caption", and one annotation with its box;
- COCO-style with the expressions in each annotation ("sentences", "sents" or "refs": texts, or objects with "sent" or
  "raw"), or in the picture's entry ("expressions") when each entry has one annotation;
- COCO-style with a list "refs" of the original records (ann_id, sentences, split) beside images and annotations.
  An expression of several things, or of none, has a list of ids and an "image_id" (gRefCOCO; [-1] is nothing): its row
  has the masks of all of them as one, and no box.

The original refs(*).p are pickles, which run code when read: they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import Canvas, Entry, Numbered, entries_of, open_canvas, read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.masks import run_lengths, union
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Row, Sample

_SENTENCES = ("sentences", "sents", "refs")


class ReferringExpressions(Reader):
    """A sample per picture, a row per expression, with the box (and the mask, where there is one) of what it means.

    Args:
        split: takes only this split ("train", "val", "testA", ...) where records have the field "split".
    """

    def __init__(self, files: list[Path], images: Path, *, split: str | None = None, **common: Any) -> None:
        super().__init__(files, images, **common)
        self._split = split

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        document = read_coco(path)
        if isinstance(document.get("refs"), list):
            _attach_refs(document, self._split, path, skips)
        entries = entries_of(document, path, skips)
        if not any("caption" in e.record or "expressions" in e.record for e in entries) and not any(
            name in annotation for e in entries for _, annotation in e.annotations for name in _SENTENCES
        ):
            raise DataError(
                f"{path}: no expressions: neither 'caption' or 'expressions' in images nor 'sentences' in annotations"
            )
        for canvas, group in group_by_picture(entries, self, skips):
            rows: list[Row] = []
            for entry in group:
                rows += self._rows(entry, canvas, skips)
            if rows:
                yield Sample(canvas.path, canvas.width, canvas.height, tuple(rows), where=group[0].where)

    def _rows(self, entry: Entry, canvas: Canvas, skips: Skips) -> list[Row]:
        if "caption" not in entry.record and "expressions" not in entry.record:
            return self._rows_of_annotations(entry.annotations, canvas, skips)
        rows: list[Row] = []
        if self._wanted(entry.record):
            with skips.record(entry.where):
                if len(entry.annotations) != 1:
                    raise MalformedError(f"{len(entry.annotations)} boxes for one expression")
                _, annotation = entry.annotations[0]
                rows += [_row(t, annotation, canvas) for t in _texts(entry.record, ("caption", "expressions"))]
        return rows

    def _rows_of_annotations(self, annotations: Numbered, canvas: Canvas, skips: Skips) -> list[Row]:
        rows: list[Row] = []
        for where, annotation in annotations:
            if not self._wanted(annotation) or not any(name in annotation for name in _SENTENCES):
                continue  # of another split, or a thing that nobody refers to
            with skips.record(where):
                rows += [_row(text, annotation, canvas) for text in _texts(annotation, _SENTENCES)]
        return rows

    def _wanted(self, record: dict[str, Any]) -> bool:
        return self._split is None or record.get("split", self._split) == self._split


def group_by_picture(entries: list[Entry], reader: Reader, skips: Skips) -> Iterator[tuple[Canvas, list[Entry]]]:
    """Entries of the same file name, with their picture, in the order in which the pictures come first."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(str(entry.record.get("file_name")), []).append(entry)
    for group in groups.values():
        canvas = open_canvas(group[0], reader.pictures, skips)
        if canvas is None:
            if rest := sum(max(1, len(entry.annotations)) for entry in group[1:]):
                skips.skip(group[0].where, f"its picture is named by {len(group) - 1} more entries", rest)
            continue
        alike: list[Entry] = []
        for entry in group:
            try:
                stated = fields.size(entry.record)
                if stated not in (None, (canvas.width, canvas.height)):
                    raise MalformedError(f"size {stated} contradicts the picture's {(canvas.width, canvas.height)}")
            except MalformedError as error:
                skips.skip(entry.where, str(error), max(1, len(entry.annotations)))
                continue
            alike.append(entry)
        yield canvas, alike


def _attach_refs(document: dict[str, Any], split: str | None, path: Path, skips: Skips) -> None:
    """Move the sentences of "refs", of one split or of all, into the annotations that they name."""
    known = [a for a in document["annotations"] if isinstance(a, dict) and isinstance(a.get("id"), (int, str))]
    annotations = {annotation["id"]: annotation for annotation in known}
    said: dict[int | str, list[Any]] = {}
    for number, value in enumerate(document["refs"]):
        try:
            ref = fields.record(value)
            if split is not None and ref.get("split", split) != split:
                continue
            if isinstance(ref.get("ann_id"), list):
                document["annotations"].append(_several(ref, annotations))
                continue
            named = fields.identifier(ref, "ann_id")
            if named not in annotations:
                raise MalformedError(f"no annotation has the id {named}")
            said.setdefault(named, []).extend(fields.items(ref, "sentences"))
        except MalformedError as error:
            skips.skip(f"{path}:refs[{number}]", str(error))
    for named, sentences in said.items():
        annotations[named]["sentences"] = sentences


def _several(ref: dict[str, Any], annotations: dict[int | str, dict[str, Any]]) -> dict[str, Any]:
    """An annotation for an expression of any number of things: their segmentations under "together"."""
    ids = [named for named in ref["ann_id"] if named != -1]
    if lacking := [named for named in ids if not isinstance(named, (int, str)) or named not in annotations]:
        raise MalformedError(f"no annotation has the id {lacking[0]!r:.40}")
    together = [annotations[named].get("segmentation") for named in ids]
    picture = fields.identifier(ref, "image_id")
    return {"image_id": picture, "together": together, "sentences": fields.items(ref, "sentences")}


def _texts(record: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    name = next(name for name in names if name in record)
    value = record[name]
    listed = value if isinstance(value, list) else [value]
    texts: list[str] = []
    for item in listed:
        if isinstance(item, dict):
            texts.append(fields.text(item, "sent" if "sent" in item else "raw"))
        else:
            texts.append(fields.text({name: item}, name))
    if not texts:
        raise MalformedError(f"{name!r} is empty")
    return texts


def _row(text: str, annotation: dict[str, Any], canvas: Canvas) -> Row:
    if "together" in annotation:
        parts = [run_lengths(part, canvas.width, canvas.height) for part in annotation["together"]]
        return Row(text, mask=union(parts, canvas.width, canvas.height))
    box = fields.box_from_xywh(annotation.get("bbox"), canvas.width, canvas.height)
    segmentation = annotation.get("segmentation")
    mask = run_lengths(segmentation, canvas.width, canvas.height) if segmentation else None
    return Row(text, box=box, mask=mask)
