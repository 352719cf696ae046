"""RoIAlign as the region encoder was trained with (section 4): mmcv's with `aligned`, which is ONNX's RoiAlign-16.

It is registered as the operator `deixis::roi_align`, composed of differentiable functions: training sees through
it, and a trace holds one node, which an export can write as one RoiAlign (half_pixel, avg, sampling_ratio 2).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES = 2  # of each bin, per side
OPERATOR = "deixis::roi_align"


def _taps(low: Tensor, high: Tensor, size: int, cells: int) -> tuple[Tensor, Tensor]:
    """What each bin reads along one axis: edges [K], in cells -> cell indices int64 and weights, each [K, size, 4].

    Two samples with two neighbours each. A sample more than a cell outside the map counts as 0; within that cell it
    takes the value at the edge.
    """
    steps = (torch.arange(size * SAMPLES, device=low.device, dtype=low.dtype) + 0.5) / (size * SAMPLES)
    places = low[:, None] + (high - low)[:, None] * steps - 0.5
    inside = (places >= -1) & (places <= cells)
    places = places.clamp(0, cells - 1)
    before = places.floor()
    share = places - before
    indices = torch.stack([before, (before + 1).clamp(max=cells - 1)], dim=-1).long()
    weights = torch.stack([1 - share, share], dim=-1) * (inside / SAMPLES)[..., None]
    return indices.reshape(-1, size, 2 * SAMPLES), weights.reshape(-1, size, 2 * SAMPLES)


def _roi_align(maps: Tensor, boxes: Tensor, index: Tensor, size: int, scale: float) -> Tensor:
    _, channels, height, width = maps.shape
    x1, y1, x2, y2 = (boxes.float() * scale).unbind(1)
    rows, row_weights = _taps(y1, y2, size, height)
    columns, column_weights = _taps(x1, x2, size, width)
    # Every bin is one weighted sum of 4 x 4 cells, so that no sample is ever stored by itself.
    cells = rows[:, :, None, :, None] * width + columns[:, None, :, None, :]  # [K, size, size, 4, 4]
    cells = cells + (index * (height * width))[:, None, None, None, None]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    table = maps.float().permute(0, 2, 3, 1).reshape(-1, channels)
    bins = F.embedding_bag(
        cells.reshape(-1, (2 * SAMPLES) ** 2),
        table,
        per_sample_weights=weights.reshape(-1, (2 * SAMPLES) ** 2),
        mode="sum",
    )
    return bins.reshape(-1, size, size, channels).permute(0, 3, 1, 2)


_LIBRARY = torch.library.Library("deixis", "DEF")
_LIBRARY.define("roi_align(Tensor maps, Tensor boxes, Tensor index, int size, float scale) -> Tensor")
_LIBRARY.impl("roi_align", _roi_align, "CompositeImplicitAutograd")


def roi_align(maps: Tensor, boxes: Tensor, index: Tensor, size: int, scale: float) -> Tensor:
    """Cut boxes out of maps, each bin the mean of 2 x 2 bilinear samples. Computes in float32.

    Args:
        maps: [B, C, h, w].
        boxes: XYXY [K, 4], in a frame whose coordinates times `scale` are cells of the map, a cell being 1 wide.
        index: the map of each box [K] int64.
        size: bins per side.
        scale: cells per unit of the boxes.

    Returns:
        [K, C, size, size] float32, rows first. What lies outside the map counts as 0.
    """
    return cast(Tensor, torch.ops.deixis.roi_align(maps, boxes, index, size, scale))
