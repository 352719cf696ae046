"""The EXIF orientation of PNG and WebP files.

OpenCV applies it where it gives colours only; where it gives transparency too, it leaves that to us.
"""

from __future__ import annotations

import struct
from typing import Any

from numpy.typing import NDArray

ORIENTATION = 0x0112


def orientation_of(data: bytes) -> int:
    """1 to 8 as EXIF counts them; 1 (upright) when the file says nothing, or nothing that makes sense."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _of_tiff(_png_chunk(data, b"eXIf"))
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _of_tiff(_webp_chunk(data, b"EXIF").removeprefix(b"Exif\0\0"))
    except struct.error:  # cut off, or offsets that lead nowhere
        pass
    return 1


def turn(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """An image [H, W, C] as it is stored, the way it is meant to be seen. Orientations from 5 on swap its sides."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    mirrored, upside_down = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return image[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _png_chunk(data: bytes, wanted: bytes) -> bytes:
    """Content of the first chunk of a kind; empty when there is none. Each is length, kind, content, checksum."""
    position = 8
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == wanted:
            return data[position + 8 : position + 8 + size]
        position += 12 + size
    return b""


def _webp_chunk(data: bytes, wanted: bytes) -> bytes:
    """The same of a WebP file: kind, length, content, padded to an even length."""
    position = 12
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, position)
        if kind == wanted:
            return data[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
    return b""


def _of_tiff(tiff: bytes) -> int:
    """The orientation in the first directory of a TIFF structure."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(entries):
        tag, value = struct.unpack_from(order + "H6xH", tiff, directory + 2 + 12 * entry)
        if tag == ORIENTATION:
            return value if 1 <= value <= 8 else 1
    return 1
