"""Visual Genome's region descriptions, in the original layout and as COCO JSON with captions (GRiT's; section 14.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import open_entries, read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.json_files import check_file, read_array, read_document, starts_with
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Instance, Row, Sample

REGION = "object"  # category of a region taken as an instance: the box decoder knows no classes


class VisualGenome(Reader):
    """A sample per picture, a row per region: its phrase, and its box both as target and as prompt.

    region_descriptions.json is streamed, a picture at a time; the COCO form (annotations with "caption") is read as a
    whole. When the source bears the loss "proposal" and no instances are joined, the regions are the instances too, in
    the order of the rows.

    Args:
        sizes: image_data.json, for the original layout: sizes and, in "url", names of the pictures. Without it a
            picture is called {id}.jpg and its size is read from it.
        splits: JSON object of lists of picture ids, such as densecap_splits.json; `split` is the list to take.
    """

    def __init__(
        self,
        files: list[Path],
        images: Path,
        *,
        sizes: Path | None = None,
        splits: Path | None = None,
        split: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(files, images, **common)
        for path in (sizes, splits):
            if path is not None:
                check_file(path)
        if (splits is None) != (split is None):
            raise DataError(f"source {self.name!r}: options 'splits' (a file) and 'split' (a name in it) go together")
        self._sizes = sizes
        self._splits = splits
        self._split = split

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        samples = self._read_regions(path, skips) if starts_with(path) == "[" else self._read_coco(path, skips)
        wanted = self._wanted_ids()
        for image_id, sample in samples:
            if wanted is not None and image_id not in wanted:
                continue
            if "proposal" in self.losses:
                regions = tuple(Instance(REGION, row.box) for row in sample.rows if row.box is not None)
                sample = replace(sample, instances=regions)
            yield sample

    def _read_regions(self, path: Path, skips: Skips) -> Iterator[tuple[Any, Sample]]:
        known = self._stated_sizes()
        for where, value in read_array(path):
            try:
                record = fields.record(value)
                regions = fields.items(record, "regions")
                # older releases number only the regions
                named = record if "id" in record or not regions else fields.record(regions[0], "region")
                image_id = fields.identifier(named, "id" if "id" in named else "image_id")
                name, size = known.get(image_id, (f"{image_id}.jpg", None))
            except MalformedError as error:
                skips.skip(where, str(error))
                continue
            try:
                image, width, height = self.pictures.find(name, size)
            except MalformedError as error:
                skips.skip(where, str(error), max(1, len(regions)))
                continue
            rows: list[Row] = []
            for number, region in enumerate(regions):
                with skips.record(f"{where}, region {number}"):
                    region = fields.record(region, "region")
                    xywh = [fields.number(region, side) for side in ("x", "y", "width", "height")]
                    box = fields.box_from_xywh(xywh, width, height)
                    rows.append(Row(fields.text(region, "phrase"), prompt=box, box=box))
            if rows:
                yield image_id, Sample(image, width, height, tuple(rows), where=where)

    def _read_coco(self, path: Path, skips: Skips) -> Iterator[tuple[Any, Sample]]:
        for entry, canvas in open_entries(read_coco(path), path, self.pictures, skips):
            rows: list[Row] = []
            for where, annotation in entry.annotations:
                with skips.record(where):
                    box = fields.box_from_xywh(annotation.get("bbox"), canvas.width, canvas.height)
                    rows.append(Row(fields.text(annotation, "caption"), prompt=box, box=box))
            if rows:
                sample = Sample(canvas.path, canvas.width, canvas.height, tuple(rows), where=entry.where)
                yield entry.record["id"], sample

    def _stated_sizes(self) -> dict[Any, tuple[str, tuple[int, int] | None]]:
        if self._sizes is None:
            return {}
        try:
            return dict(map(_image_data, read_document(self._sizes)))
        except (TypeError, MalformedError):
            raise DataError(f"{self._sizes}: not image_data.json, a list of pictures with id and size") from None

    def _wanted_ids(self) -> set[Any] | None:
        if self._splits is None:
            return None
        listed = read_document(self._splits)
        if not isinstance(listed, dict) or not isinstance(listed.get(str(self._split)), list):
            raise DataError(f"{self._splits}: no list {self._split!r}; it has {', '.join(map(str, listed))[:80]}")
        try:
            return set(listed[str(self._split)])
        except TypeError:
            raise DataError(f"{self._splits}: list {self._split!r} is not made of picture ids") from None


def _image_data(value: Any) -> tuple[Any, tuple[str, tuple[int, int] | None]]:
    record = fields.record(value)
    image_id = fields.identifier(record, "image_id" if "image_id" in record else "id")
    name = Path(fields.text(record, "url")).name if "url" in record else f"{image_id}.jpg"
    return image_id, (name, fields.size(record))
