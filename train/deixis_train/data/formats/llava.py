"""Conversations about pictures in LLaVA's JSON (section 14.2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.errors import MalformedError, Skips
from deixis_train.data.formats.json_files import read_records
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Row, Sample

IMAGE_TAG = "<image>"


class Conversations(Reader):
    """A sample per conversation, a row per pair of turns: what was asked as context, the answer as text.

    The file is a JSON array, streamed, or has a conversation per line. Conversations without a picture (LLaVA-1.5's
    mixture has some) are passed over: they are well formed, but there is nothing to look at. One pair per picture is
    what `Preparation.max_rows = 1` samples.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        for where, value in read_records(path, skips):
            sample = None
            if isinstance(value, dict) and "image" not in value and "conversations" in value:
                continue
            with skips.record(where):
                record = fields.record(value, "conversation")
                image, width, height = self.pictures.find(fields.text(record, "image"), fields.size(record))
                sample = Sample(image, width, height, _rows(fields.items(record, "conversations")), where=where)
            if sample is not None:
                yield sample


def _rows(turns: list[Any]) -> tuple[Row, ...]:
    if not turns or len(turns) % 2:
        raise MalformedError(f"{len(turns)} turns, which are no pairs of question and answer")
    rows: list[Row] = []
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        speakers = (fields.record(asked, "turn").get("from"), fields.record(answered, "turn").get("from"))
        if speakers[0] not in ("human", "user") or speakers[1] not in ("gpt", "agent", "assistant"):
            raise MalformedError(f"turns of {speakers[0]!r} and {speakers[1]!r}, not of human and gpt")
        question = fields.text(asked, "value").replace(IMAGE_TAG, "").strip()
        if not question:
            raise MalformedError("a question is empty")
        rows.append(Row(fields.text(answered, "value"), context=f"Question: {question}Answer: ", question=question))
    return tuple(rows)
