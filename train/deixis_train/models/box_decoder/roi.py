"""The second stage (section 10): features of a box, whether it holds an object, and a better box.

All boxes are XYXY px of the padded network input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.losses.boxes import DELTA_SCALE, MAX_LOG_SCALE, area

BINS = 7  # of RoIAlign, per side
SAMPLES = 2  # of each bin, per side
FIRST_LEVEL, LAST_LEVEL = 3, 7
CANONICAL_LEVEL, CANONICAL_CELLS = 4, 14  # a box that measures so many strides of this level, or more, belongs to it


def roi_levels(boxes: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The pyramid level of each box by its size: boxes [..., 4] -> [...] int64 in 3..7."""
    canonical_size = CANONICAL_CELLS * strides[CANONICAL_LEVEL - FIRST_LEVEL]  # 224 px at stride 16
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(area(boxes).sqrt() / canonical_size + 1e-8))
    return levels.clamp(FIRST_LEVEL, LAST_LEVEL).long()


def roi_align(pyramid: list[Tensor], boxes: Tensor, levels: Tensor, strides: tuple[int, ...]) -> Tensor:
    """RoIAlign: 7 x 7 bins, each the mean of 2 x 2 bilinear samples, on the pixel grid shifted by a half.

    A map is 0 outside, and fades to that within a pixel of its outermost centres. All levels lie in one sheet with
    zeros between them, so one `grid_sample` does for all boxes, and an export needs no other operator.

    Args:
        pyramid: maps [B, D, h, w] of P3 to P7, none wider than the first.
        boxes: [B, N, 4] px, float32.
        levels: [B, N] int64, 3 to 7.
        strides: nominal ones of P3 to P7, which coordinates are divided by.

    Returns:
        [B, N, 7, 7, D] float32, rows first.
    """
    width = pyramid[0].shape[3] + 2
    sheet = [F.pad(level, (1, width - 1 - level.shape[3], 1, 0)) for level in pyramid]
    heights = [level.shape[2] for level in sheet]
    sheet = F.pad(torch.cat(sheet, dim=2), (0, 0, 0, 1)).to(boxes.dtype)
    # Of each box's level: index of its first row in the sheet, height, width and stride.
    table = [
        [1 + sum(heights[:i]), level.shape[2], level.shape[3], stride]
        for i, (level, stride) in enumerate(zip(pyramid, strides, strict=True))
    ]
    top, tall, wide, stride = boxes.new_tensor(table)[levels - FIRST_LEVEL].split(1, dim=-1)

    steps = (torch.arange(BINS * SAMPLES, device=boxes.device, dtype=boxes.dtype) + 0.5) / (BINS * SAMPLES)
    scaled = boxes / stride
    x = scaled[..., 0:1] + (scaled[..., 2:3] - scaled[..., 0:1]) * steps - 0.5  # [B, N, 14] along each axis
    y = scaled[..., 1:2] + (scaled[..., 3:4] - scaled[..., 1:2]) * steps - 0.5
    # What lies further outside than the zeros around a map is brought to them.
    x = torch.minimum(x.clamp(min=-1), wide) + 1
    y = torch.minimum(y.clamp(min=-1), tall) + top
    # `grid_sample` takes -1..1 from edge to edge of the sheet.
    x = (2 * x + 1) / sheet.shape[3] - 1
    y = (2 * y + 1) / sheet.shape[2] - 1
    side = BINS * SAMPLES
    grid = torch.stack([x[:, :, None, :].expand(-1, -1, side, -1), y[..., None].expand(-1, -1, -1, side)], dim=-1)
    samples = F.grid_sample(sheet, grid.flatten(1, 2), align_corners=False)  # [B, D, N * 14, 14]
    return F.avg_pool2d(samples, SAMPLES).unflatten(2, (-1, BINS)).permute(0, 2, 3, 4, 1)


class RoiHead(nn.Module):
    """Two layers on a box's features; says whether it is an object and how to move it. It knows no classes."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        first, second = widths
        self.fc1 = nn.Linear(BINS * BINS * channels, first)
        self.fc2 = nn.Linear(first, second)
        self.cls_score = nn.Linear(second, 2)
        self.bbox_pred = nn.Linear(second, 4)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [..., 7, 7, D] -> logits (background, object) [..., 2] and deltas [..., 4]."""
        x = F.relu(self.fc2(F.relu(self.fc1(pooled.flatten(-3)))))
        return self.cls_score(x), self.bbox_pred(x)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values: boxes stay where they are, and nothing is called an object yet."""
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.fc1, self.fc2, self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes [..., 4] moved by what the head says, (dx, dy, dw, dh) in its units [..., 4]: [..., 4], not clipped.

    The reverse of `deixis_train.losses.boxes.encode_deltas`.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    deltas = deltas / deltas.new_tensor(DELTA_SCALE)
    center = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
    reach = 0.5 * size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([center - reach, center + reach], dim=-1)
