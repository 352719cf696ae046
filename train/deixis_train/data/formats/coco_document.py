"""COCO JSON as a document: pictures with the annotations that name them, whatever the annotations say.

Such a file is one object; its two long lists refer to each other, so it is read as a whole (COCO's captions: 90 MB,
instances: 450 MB; about five times that in memory while the samples are made).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.json_files import read_document
from deixis_train.data.formats.masks import run_lengths
from deixis_train.data.formats.pictures import Pictures
from deixis_train.data.samples import Instance

Numbered = list[tuple[str, dict[str, Any]]]  # ("file:annotations[3]", record)


@dataclass(frozen=True)
class Entry:
    """One record of "images" with the annotations that name its id."""

    where: str
    record: dict[str, Any]
    annotations: Numbered


class Canvas:
    """The picture of an entry, ready for boxes: its path and its size in px."""

    def __init__(self, entry: Entry, pictures: Pictures) -> None:
        name = fields.text(entry.record, "file_name")
        self.path, self.width, self.height = pictures.find(name, fields.size(entry.record))


def read_coco(path: Path) -> dict[str, Any]:
    """The document. Raises DataError when it is not COCO JSON."""
    document = read_document(path)
    if not isinstance(document, dict) or not all(isinstance(document.get(k), list) for k in ("images", "annotations")):
        raise DataError(f"{path}: not COCO JSON, which is an object with the lists 'images' and 'annotations'")
    return document


def entries_of(document: dict[str, Any], path: Path, skips: Skips) -> list[Entry]:
    """The pictures of a COCO document in its order. Annotations of unknown pictures are counted as malformed."""
    entries: dict[int | str, Entry] = {}
    for number, record in enumerate(document["images"]):
        where = f"{path}:images[{number}]"
        try:
            image_id = fields.identifier(fields.record(record), "id")
            if image_id in entries:
                raise MalformedError(f"a second picture with id {image_id}")
        except MalformedError as error:
            skips.skip(where, str(error))
            continue
        entries[image_id] = Entry(where, record, [])
    for number, record in enumerate(document["annotations"]):
        where = f"{path}:annotations[{number}]"
        try:
            image_id = fields.identifier(fields.record(record), "image_id")
            if image_id not in entries:
                raise MalformedError(f"no picture has the id {image_id}")
        except MalformedError as error:
            skips.skip(where, str(error))
            continue
        entries[image_id].annotations.append((where, record))
    return list(entries.values())


def open_canvas(entry: Entry, pictures: Pictures, skips: Skips) -> Canvas | None:
    """The entry's picture, or None when it cannot be used: then all its annotations count as malformed."""
    try:
        return Canvas(entry, pictures)
    except MalformedError as error:
        skips.skip(entry.where, str(error), max(1, len(entry.annotations)))
        return None


def open_entries(
    document: dict[str, Any], path: Path, pictures: Pictures, skips: Skips
) -> Iterator[tuple[Entry, Canvas]]:
    """The pictures of a COCO document that can be used, in its order; what cannot counts as malformed."""
    for entry in entries_of(document, path, skips):
        canvas = open_canvas(entry, pictures, skips)
        if canvas is not None:
            yield entry, canvas


def read_instances(path: Path, skips: Skips) -> dict[str, tuple[Instance, ...]]:
    """Instances of every picture, by the picture's file name (without folders). Crowds are left out.

    Raises DataError when the file is not COCO instances JSON.
    """
    document = read_coco(path)
    categories = categories_of(document, path)
    found: dict[str, tuple[Instance, ...]] = {}
    for entry in entries_of(document, path, skips):
        try:
            name = Path(fields.text(entry.record, "file_name")).name
            size = fields.size(entry.record)
            if size is None:
                raise MalformedError("no 'width' and 'height'")
        except MalformedError as error:
            skips.skip(entry.where, str(error), max(1, len(entry.annotations)))
            continue
        found[name] = instances_of(entry, categories, *size, skips)
    return found


def categories_of(document: dict[str, Any], path: Path) -> dict[Any, str]:
    """Names of categories by id. Raises DataError when the document lists none."""
    try:
        return {category["id"]: str(category["name"]) for category in document["categories"]}
    except (TypeError, KeyError):
        raise DataError(f"{path}: no list 'categories' of objects with 'id' and 'name'") from None


def instances_of(
    entry: Entry, categories: dict[Any, str], width: int, height: int, skips: Skips
) -> tuple[Instance, ...]:
    """The annotations of a picture of `width` x `height` px as instances; crowds are left out."""
    instances: list[Instance] = []
    for where, annotation in entry.annotations:
        if annotation.get("iscrowd"):
            continue  # a crowd is a region, not a thing
        with skips.record(where):
            category = categories.get(fields.identifier(annotation, "category_id"))
            if category is None:
                raise MalformedError(f"no category has the id {annotation['category_id']!r}")
            box = fields.box_from_xywh(annotation.get("bbox"), width, height)
            segmentation = annotation.get("segmentation")
            mask = run_lengths(segmentation, width, height) if segmentation else None
            instances.append(Instance(category, box, mask, _attributes(annotation)))
    return tuple(instances)


def _attributes(annotation: dict[str, Any]) -> dict[str, str]:
    attributes = annotation.get("attributes") or {}
    if not isinstance(attributes, dict) or not all(isinstance(v, str) for v in attributes.values()):
        raise MalformedError("'attributes' is not an object of texts")
    return attributes
