"""Pictures in: reading files, bytes and arrays, and making the network input from them (section 2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis import resample
from deixis.bundle import ImageSpec
from deixis.errors import ImageError
from deixis.exif import orientation_of, turn
from deixis.geometry import Geometry, center_crop

Channels = Literal["RGB", "BGR", "RGBA", "BGRA", "GRAY"]
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8]

_DEPTH: dict[Channels, int] = {"RGB": 3, "BGR": 3, "RGBA": 4, "BGRA": 4, "GRAY": 1}


def load_image(source: Source, channels: Channels = "RGB") -> NDArray[np.uint8]:
    """Return a picture as RGB uint8 [height, width, 3], contiguous and owned by the caller.

    Args:
        source: path of a picture file, the bytes of one, or a uint8 array [H,W,3], [H,W,4], [H,W,1] or [H,W].
        channels: order of an array's channels ("RGB", "BGR", "RGBA", "BGRA" or "GRAY"); files and bytes say it
        themselves.

    Files are turned as their EXIF orientation says; 16-bit files are reduced to 8 bits and palettes are resolved. A
    transparent picture is laid over white, whether it came as array or file. Arrays are taken as they are: nothing is
    rescaled or guessed. Raises ImageError when the picture cannot be read, is empty, or is not laid out as declared.
    """
    if channels not in _DEPTH:
        raise ImageError(f"unknown channels {channels!r}; choose one of {', '.join(_DEPTH)}")
    if isinstance(source, np.ndarray):
        return _from_array(source, channels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), "the given bytes")
    if isinstance(source, (str, os.PathLike)):
        path = Path(os.fsdecode(source))
        try:
            return _decode(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise ImageError(f"{path}: cannot read the picture: {reason}") from None
    raise ImageError(f"a picture must be a path, bytes or a uint8 array, not {type(source).__name__}")


def prepare(image: NDArray[np.uint8], spec: ImageSpec) -> tuple[NDArray[np.float32], Geometry]:
    """Make the network input from an RGB picture uint8 [H,W,3].

    Returns float32 [size, size, 3] of 0..255 with the picture in the top-left corner and `spec.pad_value` elsewhere,
    and the Geometry that maps points between the two; normalisation happens inside the graphs. Not for the rules of
    `square`, which have no such geometry: ValueError.
    """
    resized, geometry = fit(image, spec)
    return pad(resized, spec), geometry


def fit(image: NDArray[np.uint8], spec: ImageSpec) -> tuple[NDArray[np.uint8] | NDArray[np.float32], Geometry]:
    """Resize an RGB picture uint8 [H,W,3] as `spec` says, to [h,w,3] of 0..255 with no side above `spec.size`.

    "fit_inside": float32, plain bilinear with half-pixel centres on float32, without anti-aliasing (section 2).
    "longest_side": uint8, as Pillow resizes. Raises ValueError for another rule.
    """
    if spec.resize == "center_crop" or spec.resize == "stretch":
        raise ValueError(f"the rule {spec.resize!r} has no geometry; use square()")
    geometry = Geometry.of((image.shape[0], image.shape[1]), spec.size, spec.resize)
    if spec.resize == "longest_side":
        return resample.resize(image, geometry.valid, spec.interpolation), geometry
    return resize_bilinear(image.astype(np.float32), geometry.valid), geometry


def pad(resized: NDArray[np.uint8] | NDArray[np.float32], spec: ImageSpec) -> NDArray[np.float32]:
    """A resized picture [h,w,3] in the top-left corner of float32 [size, size, 3], `spec.pad_value` elsewhere."""
    height, width = resized.shape[:2]
    padded = np.full((spec.size, spec.size, 3), spec.pad_value, np.float32)
    padded[:height, :width] = resized
    return padded


def middle(image: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """The middle square of an RGB picture uint8 [H,W,3], as Pillow resizes: uint8 [size, size, 3] ("center_crop")."""
    size, window = center_crop((image.shape[0], image.shape[1]), spec.size)
    return resample.resize(image, size, spec.interpolation, window)


def square(image: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    """An RGB picture uint8 [H,W,3] that fills the input, as Pillow resizes: uint8 [size, size, 3].

    "center_crop": its middle. "stretch": all of it, each axis by its own factor.
    """
    if spec.resize == "stretch":
        return resample.resize(image, (spec.size, spec.size), spec.interpolation)
    return middle(image, spec)


def resize_bilinear(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize float32 [H,W] or [H,W,C] to `size` (height, width): bilinear, half-pixel centres, no anti-aliasing."""
    if values.shape[:2] == size:
        return values
    resized = cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized, np.float32).reshape(*size, *values.shape[2:])


def _decode(data: bytes, where: str) -> NDArray[np.uint8]:
    if not data:
        raise ImageError(f"{where}: the picture is empty (0 bytes)")
    if _is_truncated(data):
        raise ImageError(f"{where}: the picture is truncated (its end is missing); copy it again")
    buffer = np.frombuffer(data, np.uint8)
    try:
        # Colour decoding applies the EXIF orientation; IMREAD_UNCHANGED, which alone shows alpha, does not.
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
        raw = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED) if _may_have_alpha(data) else None
    except cv2.error as error:  # sizes beyond OpenCV's limits, for one
        raise ImageError(f"{where}: cannot decode the picture: {error.err or error.code}") from None
    if image is None or image.size == 0:
        raise ImageError(f"{where}: not a picture OpenCV can read, or a damaged one")
    if raw is not None and raw.ndim == 3 and raw.shape[2] == 4:
        raw = turn(raw, orientation_of(data))
        if raw.shape[:2] == image.shape[:2]:
            return _over_white(_to_uint8(raw), "BGRA")
    return np.ascontiguousarray(image[..., ::-1], np.uint8)


def _may_have_alpha(data: bytes) -> bool:
    return not data.startswith(b"\xff\xd8")  # of the common formats only JPEG cannot


def _is_truncated(data: bytes) -> bool:
    """Whether a PNG or JPEG stops before its end mark: OpenCV then makes up the rest and says nothing."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data
    if not data.startswith(b"\xff\xd8"):
        return False
    position = 2
    # the segments before the pixels may hold a thumbnail with an end mark of its own: walk over them
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        padding = data[position + 1] == 0xFF
        position += 1 if padding else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return data.find(b"\xff\xd9", position) < 0


def _to_uint8(image: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit samples to 8 bits as OpenCV's colour decoding does it; 8-bit ones unchanged."""
    return (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image.astype(np.uint8, copy=False)


def _from_array(array: NDArray[Any], channels: Channels) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise ImageError(f"a picture array must be uint8 (0..255), not {array.dtype}; convert it first")
    if array.ndim == 2 and channels != "GRAY":
        raise ImageError(f"an array of shape {array.shape} is grey, not {channels}; say channels='GRAY'")
    image = array[..., None] if array.ndim == 2 else array
    if image.ndim != 3 or image.shape[2] != _DEPTH[channels]:
        expected = "[H,W] or [H,W,1]" if channels == "GRAY" else f"[H,W,{_DEPTH[channels]}]"
        raise ImageError(f"{channels} needs an array of shape {expected}, found {list(array.shape)}")
    if image.size == 0:
        raise ImageError(f"the picture array is empty: its shape is {list(array.shape)}")
    if channels == "GRAY":
        return np.repeat(image, 3, axis=2)
    if channels in ("RGBA", "BGRA"):
        return _over_white(image, channels)
    return np.array(image[..., ::-1] if channels == "BGR" else image, order="C")


def _over_white(image: NDArray[np.uint8], channels: Channels) -> NDArray[np.uint8]:
    """Composite RGBA or BGRA uint8 [H,W,4] over white; returns RGB uint8 [H,W,3]."""
    colour = image[..., 2::-1] if channels == "BGRA" else image[..., :3]
    alpha = image[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(colour)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
