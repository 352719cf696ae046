"""The samples of a source with random access, for training that shuffles."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deixis_train.data.formats.errors import DataError
from deixis_train.data.samples import Instance, LabelMap, Phrase, Row, Sample, Source, Utterance


class SampleStore:
    """Reads a source once and keeps its samples in memory, each as compressed JSON in one buffer.

    A sample is decoded when asked for (some 0.2 ms for a narration). Kept as objects, the narrations of COCO would
    take some 2 GB, and every worker process that touches them its own copy; so they take a fraction of that, shared by
    forked workers.

    Raises DataError as the source does, and when two different files have the same name: caches of features go by it.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.losses = source.losses
        self._buffer = bytearray()
        self._ends = array("Q", [0])
        self._folders: dict[str, str] = {}  # of each picture, by its name
        for sample in source:
            folder = self._folders.setdefault(sample.key, str(sample.image.parent))
            if folder != str(sample.image.parent):
                raise DataError(
                    f"source {self.name!r}: two pictures are called {sample.key}, in {folder} and "
                    f"{sample.image.parent}; names must be unique in a data folder"
                )
            self._buffer += zlib.compress(encode(sample), 1)
            self._ends.append(len(self._buffer))
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return decode(zlib.decompress(memoryview(self._buffer)[self._ends[index] : self._ends[index + 1]]))

    @property
    def keys(self) -> list[str]:
        """The names of the pictures, each once, in the order of the source."""
        return list(self._folders)


def encode(sample: Sample) -> bytes:
    """A sample as JSON in UTF-8. Numbers keep every digit."""
    values = {**asdict(sample), "image": str(sample.image)}
    if sample.labels is not None:
        values["labels"] = {"path": str(sample.labels.path), "names": sample.labels.names}
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()


def decode(data: bytes) -> Sample:
    """The inverse of `encode`."""
    fields: dict[str, Any] = json.loads(data)
    rows = tuple(
        Row(
            text=row["text"],
            context=row["context"],
            prompt=_box(row["prompt"]),
            box=_box(row["box"]),
            mask=row["mask"],
            utterances=tuple(_utterances(row["utterances"])),
            phrases=tuple(Phrase(p["start"], p["end"], tuple(p["masks"]), _box(p["box"])) for p in row["phrases"]),
            part=row["part"],
            question=row["question"],
        )
        for row in fields["rows"]
    )
    instances = tuple(Instance(**{**instance, "box": tuple(instance["box"])}) for instance in fields["instances"])
    labels = fields["labels"] and LabelMap(Path(fields["labels"]["path"]), tuple(fields["labels"]["names"]))
    size = (fields["width"], fields["height"])
    return Sample(Path(fields["image"]), *size, rows, instances, fields["where"], labels)


def _box(values: list[float] | None) -> Any:
    return None if values is None else tuple(values)


def _utterances(values: Iterable[dict[str, Any]]) -> Iterable[Utterance]:
    return (Utterance(u["text"], tuple(u["center"]), tuple(u["box"])) for u in values)
