"""Fitting, cropping, flipping and padding pictures, with their boxes, points and masks (sections 2 and 14).

Coordinates are continuous XY px: (0, 0) is the outer corner of the top-left pixel. Sizes are (height, width) px.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis_train.data.samples import Rle

Floats = NDArray[np.float32]
Size = tuple[int, int]


def fit_long(original: Size, size: int) -> Size:
    """Size of a picture fitted inside `size` x `size` (section 2).

    Computed in float32 as the reference does: short = floor(size * min / max), long = int(short * (max / min)), so the
    long side may miss `size` by a pixel or two. Beyond an aspect of `size` the short side is 1 px.
    """
    height, width = original
    shortest, longest = min(original), max(original)
    if shortest < 1 or size < 1:
        raise ValueError(f"cannot fit a picture of {height}x{width} px into {size} px")
    ratio = np.float32(longest) / np.float32(shortest)
    short = size
    if ratio * np.float32(size) > np.float32(size):
        short = int(np.floor(np.float32(size) * np.float32(shortest) / np.float32(longest)))
    if short < 1:
        short, long = 1, size
    elif short == shortest:
        return original
    else:
        long = min(int(np.float32(short) * ratio), size)
    return (short, long) if height <= width else (long, short)


def fit_short(original: Size, size: int) -> Size:
    """Size of a picture whose shorter side becomes `size`; the longer one is not capped (section 2)."""
    height, width = original
    shortest, longest = min(original), max(original)
    if shortest < 1 or size < 1:
        raise ValueError(f"cannot fit a picture of {height}x{width} px to {size} px")
    if shortest == size:
        return original
    long = int(np.float32(size) * (np.float32(longest) / np.float32(shortest)))
    return (size, long) if height <= width else (long, size)


@dataclass(frozen=True)
class Placement:
    """Where a stored picture lies in the network input: resized, flipped if asked for, cut, at the top-left corner.

    original: the stored picture. resized: the same after the resize. offset: (top, left) of the cut in the resized
    picture. valid: of the cut, which is the real part of the input. flipped: left and right are exchanged, before
    the cut.
    """

    original: Size
    resized: Size
    offset: tuple[int, int]
    valid: Size
    flipped: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) px of the input per px of the stored picture."""
        return self.resized[1] / self.original[1], self.resized[0] / self.original[0]

    def place_points(self, points: ArrayLike) -> Floats:
        """Points [.., 2] (x, y) px of the stored picture as float32 px of the input, clipped into the cut."""
        moved = np.asarray(points, np.float32) * np.asarray(self.scale, np.float32)
        if self.flipped:
            moved[..., 0] = self.resized[1] - moved[..., 0]
        return crop_points(moved, self.offset, self.valid)

    def place_boxes(self, boxes: ArrayLike) -> Floats:
        """Boxes [.., 4] XYXY px of the stored picture as float32 px of the input, clipped into the cut.

        What lies outside of the cut keeps no area; `has_area` tells.
        """
        moved = self.place_points(np.asarray(boxes, np.float32).reshape(*np.shape(boxes)[:-1], 2, 2))
        if self.flipped:  # the right side has become the left one
            moved[..., 0] = moved[..., ::-1, 0]
        return moved.reshape(*moved.shape[:-2], 4)

    def place_image(self, image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
        """RGB uint8 [H, W, 3] as stored to [size, size, 3], zero padded right and bottom, rounded to whole values."""
        resized = resize_bilinear(image.astype(np.float32), self.resized)
        padded = np.zeros((size, size, 3), np.uint8)
        cut = self._cut(resized)
        padded[: self.valid[0], : self.valid[1]] = np.clip(np.rint(cut), 0, 255)
        return padded

    def place_mask(self, mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
        """A mask [H, W] of 0 and 1, as stored, to [size, size]: nearest neighbours, zero padded."""
        height, width = self.resized
        rows = ((np.arange(height) + 0.5) * (self.original[0] / height)).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * (self.original[1] / width)).astype(np.int64)
        padded = np.zeros((size, size), np.uint8)
        padded[: self.valid[0], : self.valid[1]] = self._cut(mask[rows[:, None], columns])
        return padded

    def _cut(self, resized: NDArray) -> NDArray:
        if self.flipped:
            resized = resized[:, ::-1]
        top, left = self.offset
        return resized[top : top + self.valid[0], left : left + self.valid[1]]


def place_fitted(original: Size, size: int) -> Placement:
    """The whole picture, fitted inside the input: evaluation, and training at scale 1."""
    resized = fit_long(original, size)
    return Placement(original, resized, (0, 0), resized)


def place_centered(original: Size, size: int) -> Placement:
    """Shorter side to `size`, then the centre: how the reference evaluates COCO captions (section 2)."""
    resized = fit_short(original, size)
    valid = (min(resized[0], size), min(resized[1], size))
    return Placement(original, resized, ((resized[0] - valid[0]) // 2, (resized[1] - valid[1]) // 2), valid)


def place_randomly(
    original: Size, size: int, scale: tuple[float, float], flip: float, rng: np.random.Generator
) -> Placement:
    """The augmentation of section 14: long side to s * `size`, a random cut of at most `size`, a flip.

    Args:
        scale: s is drawn uniformly from this range.
        flip: probability of exchanging left and right.
        rng: exactly four numbers are drawn, whatever comes of them.
    """
    s, coin, top, left = rng.random(4)
    target = max(1, int((scale[0] + s * (scale[1] - scale[0])) * size))
    resized = fit_long(original, target)
    valid = (min(resized[0], size), min(resized[1], size))
    offset = (int(top * (resized[0] - valid[0] + 1)), int(left * (resized[1] - valid[1] + 1)))
    return Placement(original, resized, offset, valid, bool(coin < flip))


def crop_points(points: ArrayLike, offset: tuple[int, int], size: Size) -> Floats:
    """Points [.., 2] (x, y) px moved into a cut at `offset` (top, left) of `size`, clipped to it; float32."""
    moved = np.asarray(points, np.float32) - np.asarray(offset[::-1], np.float32)
    return np.clip(moved, np.float32(0), np.asarray(size[::-1], np.float32))


def has_area(boxes: Floats) -> NDArray[np.bool_]:
    """Which of the boxes [.., 4] XYXY have an area."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def resize_bilinear(image: NDArray[np.float32], size: Size) -> NDArray[np.float32]:
    """float32 [H, W, 3] to `size`: half-pixel centres, no anti-aliasing (section 2)."""
    if image.shape[:2] == size:
        return image
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), np.float32)


def decode_mask(rle: Rle) -> NDArray[np.uint8]:
    """Run lengths to uint8 [H, W] of 0 and 1."""
    from pycocotools import mask  # imported here: most sources have no masks

    return np.asarray(mask.decode({"size": rle["size"], "counts": rle["counts"]}), np.uint8)
