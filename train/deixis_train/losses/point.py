"""The location loss: two points per position against the corners of what the word means (sections 8 and 12)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

PointLoss = Literal["l1_nonzero", "l1", "l2"]


def point_loss(
    pred: Tensor, target: Tensor, pred_valid: Tensor, target_valid: Tensor, kind: PointLoss = "l1_nonzero"
) -> Tensor:
    """Mean error of the coordinates, averaged over the positions that count; 0 when none does.

    A position counts if it is valid on both sides and, for "l1_nonzero", if its target is not all zero. What is
    predicted elsewhere has no influence, NaN included.

    Args:
        pred: (x, y) [..., L, P, 2], px of the network input (`point_head.to_pixels`).
        target: [..., L, P, 2], px of the network input: the corners of the box of what each position means.
        pred_valid: [..., L] bool or 0/1, positions that are read (`point_head.valid_tokens`).
        target_valid: [..., L] bool or 0/1, positions that have a truth.
        kind: absolute or squared differences.

    Returns:
        float32 scalar, px or px squared.

    Raises:
        ValueError: for another `kind`.
    """
    if kind not in ("l1_nonzero", "l1", "l2"):
        raise ValueError(f"unknown point loss {kind!r}; known are l1_nonzero, l1, l2")
    counts = (pred_valid > 0) & (target_valid > 0)
    if kind == "l1_nonzero":
        counts = counts & (target != 0).flatten(-2).any(dim=-1)
    difference = pred[counts].float() - target[counts].float()
    error = difference.square() if kind == "l2" else difference.abs()
    points, coordinates = target.shape[-2:]
    return error.sum() / (points * coordinates * counts.sum().clamp(min=1))
