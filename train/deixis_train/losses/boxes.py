"""Overlap of boxes for losses and for matching, and a box loss. Boxes are XYXY in any one unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The deltas of the RoI stage are regressed in these units, and sizes grow by at most this factor (section 10).
DELTA_SCALE = (10.0, 10.0, 5.0, 5.0)
MAX_LOG_SCALE = math.log(1000 / 16)


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of [..., 4]; 0 for inverted boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU [..., N, M] of all pairs of [..., N, 4] and [..., M, 4]; 0 where both boxes are empty."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = area(a)[..., :, None] + area(b)[..., None, :] - overlap
    return overlap / union.clamp(min=1e-8)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU [...] of paired boxes [..., 4], from -1 to 1."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area(a) + area(b) - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return overlap / union.clamp(min=1e-8) - (hull - union) / hull.clamp(min=1e-8)


def encode_deltas(boxes: Tensor, targets: Tensor) -> Tensor:
    """What the RoI stage must say to move `boxes` onto `targets`, both [..., 4]: (dx, dy, dw, dh), scaled."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
    wanted = (targets[..., 2:] - targets[..., :2]).clamp(min=1e-3)
    shift = (targets[..., :2] + wanted / 2 - boxes[..., :2] - size / 2) / size
    grow = (wanted / size).log().clamp(max=MAX_LOG_SCALE)
    return torch.cat([shift, grow], dim=-1) * torch.tensor(DELTA_SCALE, device=boxes.device)


def paired_iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of paired boxes [..., 4] -> two [...]. Corners of `a` may come in any order."""
    low = torch.minimum(a[..., :2], a[..., 2:])
    high = torch.maximum(a[..., :2], a[..., 2:])
    overlap = (torch.minimum(high, b[..., 2:]) - torch.maximum(low, b[..., :2])).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (torch.maximum(high, b[..., 2:]) - torch.minimum(low, b[..., :2])).prod(-1)
    ratio = overlap / union.clamp(min=1e-7)
    return ratio, ratio - (hull - union) / hull.clamp(min=1e-7)


def box_loss(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """5 * L1 + (1 - GIoU) of boxes [..., 4] in fractions of the picture; not the paper's, whose loss is in px.

    Averaged over the boxes with the given weights [...]; 0 when all weights are 0.
    """
    _, generalised = paired_iou(predicted, target)
    each = 5 * (predicted - target).abs().mean(-1) + (1 - generalised)
    return (each * weight).sum() / weight.sum().clamp(min=1)
