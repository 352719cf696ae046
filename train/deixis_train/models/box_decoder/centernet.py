"""The CenterNet head (section 10): where objects have their centres, and how far their sides are from there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.losses.detection import locations

TOWER_DEPTH = 4
GROUPS = 32  # of the tower's GroupNorms
PRIOR = 0.01  # probability that a fresh heatmap gives every place
START_DISTANCE = 4.0  # strides from the centre to each side, as a fresh head predicts


class CenterNetHead(nn.Module):
    """Heatmap and distances to the four sides, with one set of weights for all levels; it knows no classes."""

    def __init__(self, dim_in: int, channels: int, levels: int) -> None:
        super().__init__()
        self.tower = nn.Sequential()
        for i in range(TOWER_DEPTH):
            self.tower.append(nn.Conv2d(channels if i else dim_in, channels, 3, padding=1))
            self.tower.append(nn.GroupNorm(GROUPS, channels, eps=1e-6))
            self.tower.append(nn.ReLU())
        self.heatmap = nn.Conv2d(channels, 1, 3, padding=1)
        self.regression = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels, 1))

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Run the head on every level.

        Args:
            pyramid: maps [B, D, h_l, w_l], one per level.

        Returns:
            Heatmap logits [B, T] and distances (left, top, right, bottom), at least 0 and in strides of their level,
            [B, T, 4]. T counts the places of all levels, the first level first, row by row.
        """
        heatmaps, regressions = [], []
        for level, scale in zip(pyramid, self.scales, strict=True):
            x = self.tower(level)
            heatmaps.append(self.heatmap(x).flatten(1))
            regressions.append(F.relu(self.regression(x) * scale).flatten(2).transpose(1, 2))
        return torch.cat(heatmaps, dim=1), torch.cat(regressions, dim=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values: few objects, of a middling size for their level."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.heatmap.bias, math.log(PRIOR / (1 - PRIOR)))  # type: ignore[arg-type]
        nn.init.constant_(self.regression.bias, START_DISTANCE)  # type: ignore[arg-type]


def boxes_at(regression: Tensor, shapes: list[tuple[int, int]], strides: tuple[int, ...]) -> Tensor:
    """The box that each place predicts.

    Places stand in nominal strides. A level's real stride may be another (27 places of 16 px in 384 px): the network
    has learned to make up for that.

    Args:
        regression: distances from the place to the sides, in strides [B, T, 4].
        shapes: (height, width) of each level.
        strides: nominal stride of each level, px.

    Returns:
        XYXY px of the padded input, not clipped [B, T, 4] float32.
    """
    places, steps, _ = (x.to(regression.device) for x in locations(shapes, strides))
    reach = regression.float() * steps[:, None]
    return torch.cat([places - reach[..., :2], places + reach[..., 2:]], dim=-1)
