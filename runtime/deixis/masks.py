"""Masks: from the decoder's logits to original pixels (section 9.4, and SAM's own way), and COCO's run-length code.

The code counts runs of equal pixels down the columns (column-major), starting with background. The counts are written
as text, five bits a character from '0' on with a continuation bit, each count from the fourth on as a difference to
the one two places before: the same text that pycocotools writes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deixis.geometry import Geometry
from deixis.image import resize_bilinear

_DIGITS = 13  # five bits each: enough for any int64


def refer_mask(logits: NDArray[np.float32], geometry: Geometry, threshold: float = 0.0) -> NDArray[np.bool_]:
    """Mask of a referred object: logits [side, side] over the padded input -> bool [H, W] in original pixels.

    Section 9.4: crop to int(valid * side / size) rows and columns, then one bilinear resize straight to the original
    size; True where the logit exceeds `threshold`. At least one row and column are kept.
    """
    rows, columns = (max(1, int(v * s / geometry.size)) for v, s in zip(geometry.valid, logits.shape, strict=True))
    cropped = np.ascontiguousarray(logits[:rows, :columns], np.float32)
    return resize_bilinear(cropped, geometry.original) > threshold


def segment_mask(logits: NDArray[np.float32], geometry: Geometry, threshold: float = 0.0) -> NDArray[np.bool_]:
    """Mask of a prompted segment: logits [side, side] over the padded input -> bool [H, W] in original pixels.

    SAM's two steps: resize to the input size, crop the valid picture, resize to the original size; all bilinear.
    """
    whole = resize_bilinear(np.ascontiguousarray(logits, np.float32), (geometry.size, geometry.size))
    height, width = geometry.valid
    return resize_bilinear(np.ascontiguousarray(whole[:height, :width]), geometry.original) > threshold


def encode_counts(mask: NDArray[np.bool_]) -> str:
    """COCO's compressed counts of a bool mask [H, W]."""
    flat = np.ravel(np.asarray(mask, bool), order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], changes]) if flat.size else np.zeros(1, np.int64)
    counts = np.diff(starts, append=flat.size)
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])  # the first run is background, if an empty one
    return pack_counts(counts)


def decode_counts(counts: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Bool mask [H, W] of `size` (height, width) from COCO's compressed counts. ValueError if they do not fit."""
    runs = unpack_counts(counts)
    if (runs < 0).any() or int(runs.sum()) != size[0] * size[1]:
        raise ValueError(f"run-length counts do not cover a mask of {size[0]}x{size[1]} pixels")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size, order="F")


def pack_counts(counts: NDArray[np.int64]) -> str:
    """Run lengths to COCO's text."""
    rest = np.asarray(counts, np.int64).copy()
    rest[3:] -= counts[1:-2]
    digits, more = [], []
    for _ in range(_DIGITS):
        digit = rest & 0x1F
        rest = rest >> 5
        # the last digit's top bit is the sign: go on until what is left is only a copy of it
        goes_on = np.where(digit & 0x10, rest != -1, rest != 0)
        digits.append(digit | (goes_on << 5))
        more.append(goes_on)
    table, going = np.stack(digits, 1), np.stack(more, 1)
    used = np.concatenate([np.ones((len(rest), 1), bool), np.logical_and.accumulate(going, 1)[:, :-1]], 1)
    return (table[used] + 48).astype(np.uint8).tobytes().decode("ascii")


def unpack_counts(text: str) -> NDArray[np.int64]:
    """COCO's text to run lengths int64. Raises ValueError on characters that are not of the code."""
    codes = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        raise ValueError("run-length counts are damaged")
    last = (codes & 0x20) == 0
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _DIGITS - 1:
        raise ValueError("run-length counts are damaged")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    counts = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = (codes[ends] & 0x10) != 0
    counts[negative] -= np.int64(1) << (5 * lengths[negative])
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts
