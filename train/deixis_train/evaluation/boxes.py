"""Boxes against boxes: IoU and P@0.5 (section 15). Boxes are XYXY, x1 and y1 exclusive."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RIGHT_ABOVE = 0.5  # an answer is right when its IoU is above this, not equal to it
EPSILON = 1e-6


def iou_matrix(a: ArrayLike, b: ArrayLike) -> Floats:
    """IoU of every box a [M, 4] with every box b [N, 4]: [M, N]. A box without area, or inside out, has IoU 0."""
    a_, b_ = np.asarray(a, np.float64).reshape(-1, 1, 4), np.asarray(b, np.float64).reshape(1, -1, 4)
    corner, opposite = np.maximum(a_[..., :2], b_[..., :2]), np.minimum(a_[..., 2:], b_[..., 2:])
    inter = (opposite - corner).clip(0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clip(0).prod(-1) for x in (a_, b_)]
    return inter / (areas[0] + areas[1] - inter + EPSILON)


def pair_iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """IoU of boxes a [N, 4] and b [N, 4], one by one: [N]. Raises ValueError when their numbers differ."""
    a_, b_ = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    if len(a_) != len(b_):
        raise ValueError(f"{len(a_)} boxes cannot be compared with {len(b_)} one by one")
    if not len(a_):
        return np.zeros(0)
    return np.array([iou_matrix(one, other)[0, 0] for one, other in zip(a_, b_, strict=True)])


def precision_at_half(ious: ArrayLike) -> float:
    """P@0.5: the share of expressions whose box has an IoU above 0.5. Raises ValueError for none."""
    values = np.asarray(ious, np.float64)
    if not values.size:
        raise ValueError("no expressions, so no P@0.5")
    return float((values > RIGHT_ABOVE).mean())


def to_picture(boxes: ArrayLike, valid: tuple[int, int], original: tuple[int, int]) -> Floats:
    """Boxes [N, 4] from px of the network input to px of the stored picture, clipped to it: float64 [N, 4].

    valid: (height, width) of the picture inside the network input. original: its own (height, width).
    """
    scale = np.array([original[1] / valid[1], original[0] / valid[0]] * 2)
    height, width = original
    return (np.asarray(boxes, np.float64).reshape(-1, 4) * scale).clip(0, [width, height, width, height])
