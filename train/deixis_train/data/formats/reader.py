"""What all readers share: files and pictures that are there, counted skips, and instances joined by file name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deixis_train.data.formats.coco_document import read_instances
from deixis_train.data.formats.errors import DataError, Skips
from deixis_train.data.formats.json_files import check_file
from deixis_train.data.formats.pictures import Pictures
from deixis_train.data.samples import Instance, Loss, Sample


class Reader(ABC):
    """A `Source` made of files and a folder of pictures. Subclasses read one file.

    Args:
        files: read one after the other.
        images: folder of the pictures; they lie in it or in the folders directly inside it.
        name, losses: see `Source`.
        instances: COCO instances JSON; its annotations join the samples whose pictures have the same file name.
        max_skipped: share of malformed records that is tolerated, 0 to 1.

    Raises DataError when a file or folder is absent, or a file is a pickle. Iterating raises it when the data is of
    another format, has too many malformed records, or has no usable one.
    """

    def __init__(
        self,
        files: Sequence[Path],
        images: Path,
        *,
        name: str,
        losses: Collection[Loss],
        instances: Path | None = None,
        max_skipped: float = 0.01,
    ) -> None:
        if not files:
            raise DataError(f"source {name!r} names no files")
        for path in [*files, *([instances] if instances else [])]:
            check_file(path)
        self.files = tuple(files)
        self.pictures = Pictures(images)
        self.name = name
        self.losses: frozenset[Loss] = frozenset(losses)
        self.skipped = 0
        self._max_skipped = max_skipped
        self._instances = instances

    @abstractmethod
    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        """The samples of one file; malformed records go to `skips`."""

    def __iter__(self) -> Iterator[Sample]:
        skips = Skips(self.name, self._max_skipped)
        self.skipped = 0
        joined = self._joined(skips)
        any_sample = any_joined = False
        for path in self.files:
            for sample in self.read(path, skips):
                any_sample = True
                self.skipped = skips.skipped
                if joined is not None:
                    found = joined.get(sample.image.name)
                    any_joined |= found is not None
                    sample = replace(sample, instances=found or ())
                yield sample
        self.skipped = skips.skipped
        skips.finish()
        if not any_sample:
            raise DataError(f"source {self.name!r}: no usable record in {', '.join(map(str, self.files))}")
        if joined is not None and not any_joined:
            raise DataError(f"source {self.name!r}: {self._instances} has none of its pictures")

    def _joined(self, skips: Skips) -> dict[str, tuple[Instance, ...]] | None:
        if self._instances is None:
            return None
        return read_instances(self._instances, skips)
