"""Resizing uint8 pictures exactly as Pillow does, with whose pictures the published models were trained (section 2).

The filter is stretched when a picture shrinks, so that every pixel counts. Weights are whole multiples of 2^-22, sums
are exact, and both passes, first along rows and then along columns, round to uint8. A side that keeps its length has
no pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Interpolation = Literal["bilinear", "bicubic"]

_PRECISION = 22  # bits of a weight: 32, less 8 of the pixel and 2 to spare
_BLOCK = 8  # rows of the result that are made together
_PRODUCT = 1 << 18  # multiplications of one matrix product: BLAS does so few on one thread, more would only wait


def resize(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    interpolation: Interpolation,
    window: tuple[slice, slice] = (slice(None), slice(None)),
) -> NDArray[np.uint8]:
    """Resize RGB uint8 [H, W, 3] to `size` (height, width), and cut the `window` (rows, columns) out of that.

    Returns uint8 [h, w, 3], contiguous. What the window leaves out is not computed.
    """
    columns = _Filter(image.shape[1], size[1], interpolation, window[1])
    rows = _Filter(image.shape[0], size[0], interpolation, window[0])
    image = image[rows.reads]
    # Both passes work on rows, whose values lie together in memory; so the picture is turned for the first.
    if columns.is_identity:
        image = image[:, columns.reads]
    else:
        image = _transpose(columns.apply(_transpose(image[:, columns.reads])))
    return np.ascontiguousarray(image) if rows.is_identity else rows.apply(np.ascontiguousarray(image))


class _Filter:
    """One pass: which rows of the source it `reads`, and n rows of weights over parts of them."""

    def __init__(self, source: int, target: int, interpolation: Interpolation, window: slice) -> None:
        self.is_identity = source == target
        if self.is_identity:
            self.reads = window
            return
        starts, counts, weights = _weights(source, target, interpolation, window)
        first, last = int(starts[0]), int((starts + counts).max())
        self.reads = slice(first, last)
        self._starts, self._weights = starts - first, weights

    def apply(self, source: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Rows [N, M, 3] of the source, those that `reads` names, to [n, M, 3]."""
        values = source.reshape(len(source), -1)
        count, taps = self._weights.shape
        width = values.shape[1]
        result = np.empty((count, width), np.uint8)
        for begin in range(0, count, _BLOCK):
            starts, weights = self._starts[begin : begin + _BLOCK], self._weights[begin : begin + _BLOCK]
            first, last = int(starts[0]), min(int(starts[-1]) + taps, len(values))
            band = np.zeros((len(starts), last - first + taps))
            np.put_along_axis(band, (starts - first)[:, None] + np.arange(taps), weights, axis=1)
            band = band[:, : last - first]
            step = max(64, _PRODUCT // band.size)
            for left in range(0, width, step):
                # Whole numbers below 2^31: doubles multiply them exactly, and much faster than integers.
                part = values[first:last, left : left + step].astype(np.float64)
                sums = (band @ part).astype(np.int32)
                sums += 1 << (_PRECISION - 1)
                sums >>= _PRECISION
                result[begin : begin + _BLOCK, left : left + step] = np.clip(sums, 0, 255, out=sums)
        return result.reshape(count, *source.shape[1:])


def _transpose(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 3] to [W, H, 3], contiguous; OpenCV is several times as fast as numpy here."""
    return np.asarray(cv2.transpose(np.ascontiguousarray(image)), np.uint8).reshape(image.shape[1], image.shape[0], 3)


def _weights(
    source: int, target: int, interpolation: Interpolation, window: slice
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Where the sources of the window's pixels, out of `target`, start [n], how many they are [n], and their weights
    [n, taps].
    """
    support, function = _FILTERS[interpolation]
    scale = source / target
    stretch = max(scale, 1.0)
    centres = (np.arange(*window.indices(target)) + 0.5) * scale
    starts = np.maximum(np.trunc(centres - support * stretch + 0.5), 0).astype(np.int64)
    ends = np.minimum(np.trunc(centres + support * stretch + 0.5), source).astype(np.int64)
    counts = ends - starts
    taps = np.arange(int(counts.max()))
    distance = (taps + starts[:, None] - centres[:, None] + 0.5) * (1.0 / stretch)
    weights = np.where(taps < counts[:, None], function(np.abs(distance)), 0.0)
    # One after the other, as Pillow adds them: a sum in pairs may round to another weight.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    fixed = np.trunc(weights * (1 << _PRECISION) + np.where(weights < 0, -0.5, 0.5))
    return starts, counts, fixed.astype(np.int32)


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x < 1.0, 1.0 - x, 0.0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic with a = -0.5, in Pillow's order of operations."""
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_FILTERS: dict[str, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _cubic),
}
