"""A scale-free box loss, beside the published one in px: L1 and GIoU. Boxes are XYXY in fractions of the picture."""

from __future__ import annotations

import torch
from torch import Tensor


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of paired boxes [..., 4] -> two [...]. Corners of `a` may come in any order."""
    low = torch.minimum(a[..., :2], a[..., 2:])
    high = torch.maximum(a[..., :2], a[..., 2:])
    overlap = (torch.minimum(high, b[..., 2:]) - torch.maximum(low, b[..., :2])).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (torch.maximum(high, b[..., 2:]) - torch.minimum(low, b[..., :2])).prod(-1)
    ratio = overlap / union.clamp(min=1e-7)
    return ratio, ratio - (hull - union) / hull.clamp(min=1e-7)


def box_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """5 * L1 + (1 - GIoU), averaged over the boxes with the given weights [...]; 0 when all weights are 0."""
    _, giou = iou(predicted, target)
    each = 5 * (predicted - target).abs().mean(-1) + (1 - giou)
    return (each * weight).sum() / weight.sum().clamp(min=1)
