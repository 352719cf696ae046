"""The one map between a picture's own pixels and the network's input (section 2).

Coordinates are continuous XY pixels: (0, 0) is the outer corner of the top-left pixel and (width, height) that of the
bottom-right one, so a whole picture is the box (0, 0, width, height) in either frame. The picture lies in the top-
left corner of the square input; each axis has its own ratio, because both sides were truncated to whole pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


def fit_inside(original: tuple[int, int], size: int) -> tuple[int, int]:
    """Size of a picture fitted inside `size` x `size`: (height, width) px for an `original` (height, width) px.

    The reference computes in float32: short = floor(size * min / max), long = int(short * (max / min)); a picture whose
    smaller side already has that length stays as it is. The two truncations may leave the long side a pixel or two
    below `size`. Here, unlike there, no side becomes 0: beyond an aspect of `size` the short side is clamped to 1 px
    and the long side to `size`.
    """
    height, width = original
    shortest, longest = min(original), max(original)
    if shortest < 1:
        raise ValueError(f"a picture of {height}x{width} pixels has no area")
    ratio = np.float32(longest) / np.float32(shortest)
    short = size
    if ratio * np.float32(size) > np.float32(size):
        short = int(np.floor(np.float32(size) * np.float32(shortest) / np.float32(longest)))
    if short < 1:
        short, long = 1, size
    elif short == shortest:
        return height, width
    else:
        long = min(int(np.float32(short) * ratio), size)
    return (short, long) if height <= width else (long, short)


def longest_side(original: tuple[int, int], size: int) -> tuple[int, int]:
    """Size (height, width) px of a picture of `original` (height, width) px whose longest side becomes `size`.

    Both sides are int(side * scale + 0.5), as SAM's own preparation has it (GLaMM section 2.2); here none becomes 0.
    """
    scale = size / max(original)
    height, width = (max(1, int(side * scale + 0.5)) for side in original)
    return height, width


def center_crop(original: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[slice, slice]]:
    """How a picture of `original` (height, width) px fills a square of `size` px (GLaMM section 2.1).

    Returns the size (height, width) to resize to, its shortest side `size` and the other int(size * long / short), and
    the rows and columns of the middle square. Of a long picture the ends are lost.
    """
    shortest = min(original)
    height, width = (size if side == shortest else int(size * side / shortest) for side in original)
    top, left = (height - size) // 2, (width - size) // 2
    return (height, width), (slice(top, top + size), slice(left, left + size))


@dataclass(frozen=True)
class Geometry:
    """Where one picture lies in the network input. All sizes are (height, width) in px.

    original: the picture the user gave. valid: the same picture after the resize, in the top-left corner of the input.
    size: side of the square input.
    """

    original: tuple[int, int]
    valid: tuple[int, int]
    size: int

    @classmethod
    def of(
        cls, original: tuple[int, int], size: int, resize: Literal["fit_inside", "longest_side"] = "fit_inside"
    ) -> Geometry:
        """Geometry of a picture of `original` (height, width) px in an input of side `size` px, resized by a rule of
        `ImageSpec.resize`.
        """
        rule = fit_inside if resize == "fit_inside" else longest_side
        return cls(original, rule(original, size), size)

    @property
    def scale(self) -> tuple[float, float]:
        """(x, y) factors from original pixels to input pixels."""
        return self.valid[1] / self.original[1], self.valid[0] / self.original[0]

    def to_input(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Points [..., 2] (x, y) from original pixels to pixels of the network input, float64. Nothing is clamped."""
        return np.asarray(xy, np.float64) * self.scale

    def to_original(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Points [..., 2] (x, y) from pixels of the network input to original pixels, float64. Nothing is clamped."""
        return np.asarray(xy, np.float64) / self.scale

    def relative_to_original(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Locations [..., 2] (x, y) relative to the valid picture (0..1) to original pixels, float64. Nothing is
        clamped.
        """
        height, width = self.original
        return np.asarray(xy, np.float64) * (width, height)
