"""Semantic segmentation: maps of class numbers, and annotations of objects and their parts (GLaMM section 9.5)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import categories_of, open_entries, read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.json_files import read_document
from deixis_train.data.formats.masks import run_lengths
from deixis_train.data.formats.pictures import picture_size
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import LabelMap, Row, Sample

Layout = Literal["ade20k", "cocostuff", "mapillary"]
MOST = 256  # class numbers that an 8-bit map can hold


class LabelMaps(Reader):
    """ADE20K, COCO-Stuff and Mapillary Vistas: the file names the classes, a folder holds a PNG per picture with a
    class number at every pixel.

    A sample per map, without rows: which classes a picture shows is read when it is used. The picture has the map's
    name and another ending (.jpg).

    Args:
        labels: the folder of the maps; they lie in it or below it.
        layout: how the classes are named. "ade20k": a JSON array; number 0 is no class, n is the nth. "cocostuff": a
            line per class, "number: name" or the name alone, after a first line for what has no label; number 0 is the
            first class; names with "-" are no classes. "mapillary": the data set's config with "labels", each with
            "readable"; number 0 is the first one.
    """

    def __init__(
        self, files: list[Path], images: Path, *, labels: Path | None = None, layout: str = "", **common: Any
    ) -> None:
        super().__init__(files, images, **common)
        if labels is None or not labels.is_dir():
            raise DataError(f"source {self.name!r}: {labels}: no such folder of label maps (option 'labels')")
        if layout not in get_args(Layout):
            raise DataError(f"source {self.name!r}: layout {layout!r} is unknown; known: {', '.join(get_args(Layout))}")
        self._labels, self._layout = labels, layout

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        names = _CLASSES[self._layout](path)
        if not any(names) or len(names) > MOST:
            raise DataError(f"{path}: {len(names)} class names, where 1 to {MOST} are possible")
        for file in sorted(self._labels.rglob("*.png")):
            sample = None
            with skips.record(str(file)):
                image, width, height = self.pictures.find(f"{file.stem}.jpg", None)
                size = picture_size(file)
                if size != (width, height):
                    raise MalformedError(f"a map of {size[0]}x{size[1]} px for a picture of {width}x{height} px")
                sample = Sample(image, width, height, (), where=str(file), labels=LabelMap(file, names))
            if sample is not None:
                yield sample


def _ade20k(path: Path) -> tuple[str, ...]:
    return ("", *_listed(path, read_document(path)))


def _cocostuff(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    names = [line.partition(": ")[2].strip() or line.strip() for line in lines if line.strip()]
    return tuple("" if "-" in name else name for name in names)


def _mapillary(path: Path) -> tuple[str, ...]:
    document = read_document(path)
    if not isinstance(document, dict) or not isinstance(document.get("labels"), list):
        raise DataError(f"{path}: no list 'labels'; take the config of Mapillary Vistas")
    return _listed(path, [label.get("readable") if isinstance(label, dict) else None for label in document["labels"]])


_CLASSES = {"ade20k": _ade20k, "cocostuff": _cocostuff, "mapillary": _mapillary}


def _listed(path: Path, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise DataError(f"{path}: not a list of class names")
    return tuple(name.strip().lower() for name in names)


class ObjectParts(Reader):
    """PASCAL-Part and PACO-LVIS: COCO-style, a category is called "object:part" or just "object".

    A sample per picture, a row per annotation with its mask: the object as text, and the part. In names, underscores
    are spaces and what stands in brackets is left out.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        document = read_coco(path)
        categories = categories_of(document, path)
        for entry, canvas in open_entries(document, path, self.pictures, skips):
            rows: list[Row] = []
            for where, annotation in entry.annotations:
                if annotation.get("iscrowd"):
                    continue
                with skips.record(where):
                    category = categories.get(fields.identifier(annotation, "category_id"))
                    if category is None:
                        raise MalformedError(f"no category has the id {json.dumps(annotation['category_id'])}")
                    thing, _, part = category.partition(":")
                    if not _plain(thing):
                        raise MalformedError(f"category {category!r} names no object")
                    mask = run_lengths(annotation.get("segmentation"), canvas.width, canvas.height)
                    rows.append(Row(_plain(thing), mask=mask, part=_plain(part)))
            if rows:
                yield Sample(canvas.path, canvas.width, canvas.height, tuple(rows), where=entry.where)


def _plain(name: str) -> str:
    return name.partition("_(")[0].replace("_", " ").strip()
