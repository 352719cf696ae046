"""Writing a file so that it appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` beside `path` under a temporary name, then rename. On any error nothing new stays behind.

    Raises FileNotFoundError when the folder does not exist (it is not made: a mistyped path should not become one),
    and OSError when the folder cannot be written or the disk is full.
    """
    target = check_target(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise type(error)(f"cannot write {target}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(f"cannot write {target}: {error.strerror or error}") from None
        raise


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path as a Path, if a file could stand there: work that ends in a file should not fail at its end.

    Raises FileNotFoundError when there is no such folder, IsADirectoryError when the path is a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; name a file")
    return target


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
