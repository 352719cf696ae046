"""The first stage of the box decoder: targets and losses of CenterNet (sections 10 and 12).

P is the number of locations of all levels together, level by level, row-major, finest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deixis_train.losses.boxes import area, giou

STRIDES = (8, 16, 32, 64, 128)
# Half diagonals, px, that each level is responsible for. Neighbours overlap: an object may belong to two levels.
LEVEL_RANGES = ((0.0, 40.0), (32.0, 80.0), (64.0, 160.0), (128.0, 320.0), (256.0, 50000.0))
MIN_OVERLAP = 0.8
MIN_RADIUS = 4.0
ALPHA, BETA, GAMMA = 0.25, 4.0, 2.0
CLIP = 1e-4
HEATMAP_WEIGHT, REGRESSION_WEIGHT = 0.5, 1.0
FAR = 1e8  # regression targets of locations that answer for nothing, negative, before division by the stride


@dataclass(frozen=True)
class CenterNetTargets:
    """heatmap [B, P] from 0 to 1; regression [B, P, 4] (left, top, right, bottom) in strides, negative where no object
    is to be regressed; peaks [B, P], for how many objects a location is the centre on their level."""

    heatmap: Tensor
    regression: Tensor
    peaks: Tensor


@dataclass(frozen=True)
class CenterNetLosses:
    """Float32 scalars before their weights; `heatmap` is positive + negative. The norms are means per picture."""

    regression: Tensor
    positive: Tensor
    negative: Tensor
    regression_norm: Tensor
    heatmap_norm: Tensor

    @property
    def total(self) -> Tensor:
        return HEATMAP_WEIGHT * (self.positive + self.negative) + REGRESSION_WEIGHT * self.regression


def locations(sizes: Sequence[tuple[int, int]], strides: Sequence[int] = STRIDES) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (x, y) [P, 2] in px, strides [P] and levels [P] of maps with the given (height, width)."""
    centres, steps, levels = [], [], []
    for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True)):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1) * stride + stride // 2)
        steps.append(torch.full((height * width,), float(stride)))
        levels.append(torch.full((height * width,), level))
    return torch.cat(centres).float(), torch.cat(steps), torch.cat(levels)


def centernet_targets(
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    strides: Sequence[int] = STRIDES,
    ranges: Sequence[tuple[float, float]] = LEVEL_RANGES,
) -> CenterNetTargets:
    """Targets of objects `boxes` [B, N, 4], XYXY px of the network input; boxes without area are padding.

    Every object draws a bump of the size it has on every level; only on its own levels the bump reaches 1, at the
    location nearest to its centre, and only there its sides are regressed, from the 3 x 3 locations around the centre
    that lie inside. Where several objects meet, the nearest one by size is meant.
    """
    boxes = boxes.float() if boxes.shape[1] else torch.zeros(len(boxes), 1, 4, device=boxes.device)
    centre_xy, stride, level = (x.to(boxes.device) for x in locations(sizes, strides))
    objects = (area(boxes) > 0)[:, None, :]
    middle = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, None]  # [B, 1, N, 2]
    step = stride[:, None, None]
    at = centre_xy[:, None, :]  # [P, 1, 2]
    snapped = (middle / step).trunc() * step + step / 2  # [B, P, N, 2]

    sides = torch.cat([at - boxes[:, None, :, :2], boxes[:, None, :, 2:] - at], dim=-1)  # [B, P, N, 4]
    half_diagonal = (sides[..., :2] + sides[..., 2:]).square().sum(-1).sqrt() / 2
    low, high = torch.tensor(ranges, device=boxes.device)[level].unbind(-1)
    on_level = (half_diagonal >= low[:, None]) & (half_diagonal <= high[:, None]) & objects
    is_peak = (at == snapped).all(-1) & on_level
    near = ((at - snapped).abs() <= step).all(-1) & (sides.amin(-1) > 0)

    delta = (1 - MIN_OVERLAP) / (1 + MIN_OVERLAP)
    radius2 = (2 * delta**2 * area(boxes)).clamp(min=MIN_RADIUS**2)[:, None]
    distance = (at - middle).square().sum(-1).masked_fill(is_peak, 0.0) / radius2
    distance = distance.masked_fill(~objects, float("inf"))
    heatmap = torch.exp(-distance.amin(-1))

    meant, index = distance.masked_fill(~(near & on_level), float("inf")).min(dim=-1)
    regression = sides.gather(2, index[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    regression = torch.where(meant.isinf()[..., None], -FAR, regression) / stride[:, None]
    return CenterNetTargets(heatmap, regression, is_peak.any(-1).float())


def centernet_losses(heatmap: Tensor, regression: Tensor, targets: CenterNetTargets) -> CenterNetLosses:
    """Losses of the predicted heatmap logits [B, P] and regression [B, P, 4] in strides.

    Normalised by what the B pictures hold. Training on several devices averages over them, which is a little different
    from one normaliser for all.
    """
    pictures = max(len(heatmap), 1)
    probability = heatmap.float().sigmoid().clamp(CLIP, 1 - CLIP)
    heatmap_norm = (targets.peaks.sum() / pictures).clamp(min=1)
    positive = -probability.log() * (1 - probability).pow(GAMMA) * targets.peaks
    weight = (1 - targets.heatmap).pow(BETA)
    negative = -(1 - probability).log() * probability.pow(GAMMA) * weight

    meant = targets.regression.amax(-1) >= 0
    regression_norm = (meant.sum() / pictures).clamp(min=1)
    overlap = giou(_around_origin(regression[meant].float()), _around_origin(targets.regression[meant]))
    return CenterNetLosses(
        regression=(1 - overlap).sum() / pictures / regression_norm,
        positive=ALPHA * positive.sum() / pictures / heatmap_norm,
        negative=(1 - ALPHA) * negative.sum() / pictures / heatmap_norm,
        regression_norm=regression_norm,
        heatmap_norm=heatmap_norm,
    )


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, h, w], finest first, as [B, P, C]."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def _around_origin(sides: Tensor) -> Tensor:
    """(left, top, right, bottom) [..., 4] as an XYXY box around 0."""
    return torch.cat([-sides[..., :2], sides[..., 2:]], dim=-1)
