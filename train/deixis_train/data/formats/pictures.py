"""Pictures of a data set: finding them, their size without decoding them, and their pixels."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis_train.data.formats.errors import DataError, MalformedError

_LONGEST = 255  # characters of a file name that file systems take
_PNG = b"\x89PNG\r\n\x1a\n"
# start-of-frame segments of JPEG; C4, C8 and CC carry other things
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Pictures:
    """A folder of pictures, and the folders directly inside it (train2014, VG_100K_2, ...).

    Raises DataError when there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of pictures")
        self.folder = folder
        self._folders = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]

    def find(self, name: str, size: tuple[int, int] | None) -> tuple[Path, int, int]:
        """Path, width and height (px) of a picture.

        Args:
            name: file name, possibly with folders, relative to the folder of pictures or to one directly inside it.
            size: (width, height) px that the data set states, or None.

        Raises MalformedError when it is missing, no picture, or of another size than stated.
        """
        if len(name) > _LONGEST or "\0" in name:
            raise MalformedError(f"{name[:40]!r}... is no name of a picture")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise MalformedError(f"picture {name!r} leads out of the folder of pictures")
        path = next((path for folder in self._folders if (path := folder / name).is_file()), None)
        if path is None:
            raise MalformedError(f"picture {name} is missing from {self.folder}")
        actual = picture_size(path)
        if size is not None and size != actual:
            raise MalformedError(f"picture {name} has {actual[0]}x{actual[1]} px, not {size[0]}x{size[1]} as stated")
        return path, *actual


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) px as stored, before any EXIF turn, from the header of a JPEG or PNG; others are decoded.

    Raises MalformedError when it is no picture.
    """
    with path.open("rb") as file:
        head = file.read(24)
        if head.startswith(_PNG) and len(head) == 24:
            return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        if head.startswith(b"\xff\xd8"):
            size = _jpeg_size(file)
            if size is not None:
                return size
    try:
        height, width = read_picture(path).shape[:2]
    except DataError as error:
        raise MalformedError(str(error)) from None
    return width, height


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    file.seek(2)
    while len(mark := file.read(4)) == 4 and mark[0] == 0xFF:
        if mark[1] == 0xFF:  # padding before a marker
            file.seek(-3, 1)
            continue
        if mark[1] in _FRAMES:
            frame = file.read(5)
            return int.from_bytes(frame[3:5], "big"), int.from_bytes(frame[1:3], "big")
        file.seek(int.from_bytes(mark[2:4], "big") - 2, 1)
    return None


def read_picture(path: Path) -> NDArray[np.uint8]:
    """RGB uint8 [height, width, 3] as stored: EXIF turns are not applied, since boxes refer to the stored pixels.

    Raises DataError when the file is missing, truncated or no picture.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the picture: {error.strerror}") from None
    # The decoder makes up what a truncated JPEG lacks: look for the end mark behind the last scan.
    if data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise DataError(f"{path}: the picture is truncated; copy it again")
    decoded = None
    if data:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if decoded is None:
        raise DataError(f"{path}: not a picture, or a damaged one")
    return np.ascontiguousarray(decoded[..., ::-1], np.uint8)
