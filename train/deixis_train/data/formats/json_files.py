"""JSON files: one record per line, one array read piece by piece, or a whole document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats.errors import DataError, Skips

_PIECE = 1 << 20  # characters read at a time
_PICKLES = (".p", ".pkl", ".pickle")


def check_file(path: Path) -> None:
    """Raises DataError when there is no such file, or when it is a pickle."""
    if path.suffix.lower() in _PICKLES:
        raise DataError(
            f"{path}: pickles are refused, because reading one runs whatever code it holds; use a JSON form: MDETR's "
            "finetune_refcoco*.json, or COCO-style JSON with sentences (see docs/data.md)"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file; docs/data.md says which files a data set needs and where they go")


def read_document(path: Path) -> Any:
    """The whole document, in memory. Raises DataError when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not JSON text in UTF-8") from None


def starts_with(path: Path) -> str:
    """The first character that is not white space: "[" or "{" in JSON. "" when there is none."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while piece := file.read(4096):
            if found := piece.lstrip("\ufeff \t\r\n"):
                return found[0]
    return ""


def read_lines(path: Path, skips: Skips) -> Iterator[tuple[str, Any]]:
    """("file:line", value) of a file with one JSON value per line; empty lines are passed over.

    Lines that are not JSON are counted as malformed.
    """
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{line_number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                skips.skip(where, "not JSON")


def read_array(path: Path) -> Iterator[tuple[str, Any]]:
    """("file:record N", value) of a file that is one JSON array, from 1, a piece of the file at a time.

    Raises DataError when the file is something else, or breaks off.
    """
    try:
        yield from _pieces_of_array(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not JSON text in UTF-8") from None


def _pieces_of_array(path: Path) -> Iterator[tuple[str, Any]]:
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        buffer, position, index = file.read(_PIECE).lstrip("\ufeff \t\r\n"), 1, 0
        if not buffer.startswith("["):
            raise DataError(f"{path}: not a JSON array")
        while True:
            # Between values: white space, one comma, white space.
            while position < len(buffer) and buffer[position] in " \t\r\n,":
                position += 1
            if position < len(buffer) and buffer[position] == "]":
                return
            try:
                value, end = decoder.raw_decode(buffer, position)
                complete = end < len(buffer)  # a number at the very end may go on in the next piece
            except json.JSONDecodeError:
                value, end, complete = None, position, False
            if complete:
                index += 1
                yield f"{path}:record {index}", value
                position = end
                continue
            piece = file.read(max(_PIECE, len(buffer)))
            if not piece:
                raise DataError(f"{path}: not JSON, or it breaks off, after record {index}")
            buffer, position = buffer[position:] + piece, 0


def read_records(path: Path, skips: Skips) -> Iterator[tuple[str, Any]]:
    """Records of a JSON array, or of a file with one JSON value per line."""
    return read_array(path) if starts_with(path) == "[" else read_lines(path, skips)
