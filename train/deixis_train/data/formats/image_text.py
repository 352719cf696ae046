"""Pairs of a picture and a text, for caption pre-training (stage 0, section 13)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.errors import MalformedError, Skips
from deixis_train.data.formats.json_files import read_lines
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Row, Sample


class ImageText(Reader):
    """JSONL ({"image": ..., "text": ...} or "caption" for "text") or TSV (*.tsv: picture, tab, text). One row each.

    Texts stay whole here: where a text is split into the prefix that is given and the suffix that is written is drawn
    anew at every preparation (`Preparation.prefix_split`).
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        records = _tsv(path, skips) if path.suffix.lower() == ".tsv" else read_lines(path, skips)
        for where, value in records:
            sample = None
            with skips.record(where):
                record = fields.record(value)
                image, width, height = self.pictures.find(fields.text(record, "image"), fields.size(record))
                text = fields.text(record, "text" if "text" in record else "caption")
                sample = Sample(image, width, height, (Row(text),), where=where)
            if sample is not None:
                yield sample


def _tsv(path: Path, skips: Skips) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                columns = line.decode("utf-8").rstrip("\r\n").split("\t")
                if len(columns) != 2:
                    raise MalformedError(f"{len(columns)} columns, not two (picture, text)")
            except (UnicodeDecodeError, MalformedError) as error:
                skips.skip(where, str(error) if isinstance(error, MalformedError) else "not text in UTF-8")
                continue
            if number == 1 and columns[0] == "image":
                continue  # a heading
            yield where, {"image": columns[0], "text": columns[1]}
