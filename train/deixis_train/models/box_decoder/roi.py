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
CANONICAL_SIZE, CANONICAL_LEVEL = 224.0, 4  # a box of this size belongs to this level


def roi_levels(boxes: Tensor) -> Tensor:
    """The pyramid level of each box by its size: boxes [..., 4] -> [...] int64 in 3..7."""
    size = area(boxes).sqrt()
    levels = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + 1e-8))
    return levels.clamp(FIRST_LEVEL, LAST_LEVEL).long()


def roi_align(pyramid: list[Tensor], boxes: Tensor, levels: Tensor) -> Tensor:
    """RoIAlign: 7 x 7 bins, each the mean of 2 x 2 bilinear samples, on the pixel grid shifted by a half.

    The map is taken as 0 outside, and fades to it within half a pixel of the border.

    Args:
        pyramid: maps [B, D, h, w] of P3 to P7.
        boxes: [B, N, 4] px, float32.
        levels: [B, N] int64, 3 to 7; coordinates are divided by 2 ** level.

    Returns:
        [B, N, 7, 7, D] float32, rows first.
    """
    pictures, count = boxes.shape[:2]
    steps = (torch.arange(BINS * SAMPLES, device=boxes.device, dtype=boxes.dtype) + 0.5) / (BINS * SAMPLES)
    scaled = boxes / (2.0**levels)[..., None]
    # Places in units of the level's pixels, [B, N, 14] along each axis; `grid_sample` takes -1..1 edge to edge, which
    # is the same half-pixel convention.
    x = scaled[..., 0:1] + (scaled[..., 2:3] - scaled[..., 0:1]) * steps
    y = scaled[..., 1:2] + (scaled[..., 3:4] - scaled[..., 1:2]) * steps
    side = BINS * SAMPLES
    out = boxes.new_zeros(pictures, count, BINS, BINS, pyramid[0].shape[1])
    for level, features in enumerate(pyramid, start=FIRST_LEVEL):
        height, width = features.shape[2:]
        for picture in range(pictures):
            (chosen,) = torch.nonzero(levels[picture] == level, as_tuple=True)
            if not len(chosen):
                continue
            grid_x = (x[picture, chosen] * 2 / width - 1)[:, None, :].expand(-1, side, -1)
            grid_y = (y[picture, chosen] * 2 / height - 1)[:, :, None].expand(-1, -1, side)
            grid = torch.stack([grid_x, grid_y], dim=-1).flatten(0, 1)[None]
            samples = F.grid_sample(features[picture : picture + 1].to(grid.dtype), grid, align_corners=False)
            bins = F.avg_pool2d(samples, SAMPLES)[0].unflatten(1, (-1, BINS))  # [D, n, 7, 7]
            out[picture, chosen] = bins.permute(1, 2, 3, 0)
    return out


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
