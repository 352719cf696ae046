"""Answers one by one in a JSON Lines file that appears whole, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class ItemFile:
    """Writes items as they come, under a temporary name beside `path`; `finish` gives the file its name.

    A context manager: leaving it unfinished removes the temporary file. `path` None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._temporary = None if path is None else path.with_name(f".{path.name}.tmp")
        self._file: IO[str] | None = None

    def __enter__(self) -> ItemFile:
        if self._temporary is not None:
            self._file = self._temporary.open("w", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def add(self, items: Iterable[dict[str, Any]]) -> None:
        """Append items, at once visible to who watches the temporary file."""
        if self._file is not None:
            self._file.writelines(_line(item) for item in items)
            self._file.flush()

    def finish(self, items: Iterable[dict[str, Any]]) -> None:
        """Write all items once more, now that scores which need the whole set are known, and rename the file."""
        if self._file is None or self._temporary is None or self._path is None:
            return
        self._file.seek(0)
        self._file.truncate()
        self.add(items)
        self._file.close()
        self._temporary.replace(self._path)


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n"
