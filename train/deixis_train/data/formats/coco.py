"""COCO's own files: captions (captions_*.json) and instances (instances_*.json)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import categories_of, instances_of, open_entries, read_coco
from deixis_train.data.formats.errors import Skips
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Row, Sample


class CocoCaptions(Reader):
    """captions_*.json: a sample per picture, a row per caption. Pictures without captions are passed over."""

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        for entry, canvas in open_entries(read_coco(path), path, self.pictures, skips):
            rows: list[Row] = []
            for where, annotation in entry.annotations:
                with skips.record(where):
                    rows.append(Row(fields.text(annotation, "caption")))
            if rows:
                yield Sample(canvas.path, canvas.width, canvas.height, tuple(rows), where=entry.where)


class CocoInstances(Reader):
    """instances_*.json as a source of its own: samples without rows, for objectives about instances.

    There are no texts and no boxes of rows in them, so they bear none of the losses of `samples.Loss`.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        document = read_coco(path)
        categories = categories_of(document, path)
        for entry, canvas in open_entries(document, path, self.pictures, skips):
            instances = instances_of(entry, categories, canvas.width, canvas.height, skips)
            if instances:
                yield Sample(canvas.path, canvas.width, canvas.height, (), instances, entry.where)
