"""The region encoder (section 4): hidden states of CLIP and a box become one embedding of the language model.

Parameter names are the reference's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.glamm.config import RegionConfig
from deixis_train.models.glamm.roi_align import roi_align


def resize_map(x: Tensor, side: int) -> Tensor:
    """Bilinear with aligned corners, in float32: [B, C, n, n] -> [B, C, side, side] of x's dtype."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x.float(), (side, side), mode="bilinear", align_corners=True).to(x.dtype)


class FuseConv(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(groups, channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class LevelFusion(nn.Module):
    """Levels exchange a quarter of their channels with each neighbour, some rounds long."""

    def __init__(self, config: RegionConfig, channels: int) -> None:
        super().__init__()
        # Two more channels say where a cell is.
        self.input_conv = nn.ModuleList(nn.Conv2d(channels + 2, channels, 1) for _ in range(config.levels))
        self.fuse_convs = nn.ModuleList(FuseConv(channels, config.groups) for _ in range(config.rounds))

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Maps [B, C, n, n], finest first -> the same shapes."""
        levels = [conv(_with_places(level)) for conv, level in zip(self.input_conv, pyramid, strict=True)]
        half, quarter = levels[0].shape[1] // 2, levels[0].shape[1] // 4
        for fuse in self.fuse_convs:  # one convolution for all levels of a round
            mixed = []
            for i, level in enumerate(levels):
                # At either end a level stands in for the neighbour it lacks.
                coarser, finer = levels[min(i + 1, len(levels) - 1)], levels[max(i - 1, 0)]
                side = level.shape[-1]
                above = resize_map(coarser[:, half + quarter :], side)
                below = resize_map(finer[:, half : half + quarter], side)
                mixed.append(fuse(torch.cat([level[:, :half], above, below], dim=1)))
            levels = mixed
        return levels


def _with_places(x: Tensor) -> Tensor:
    """Append x and y of every cell, -1 at the first and 1 at the last."""
    side = x.shape[-1]
    steps = torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype)
    places = torch.stack([steps.expand(side, side), steps[:, None].expand(side, side)])
    return torch.cat([x, places.expand(x.shape[0], -1, -1, -1)], dim=1)


class RegionHead(nn.Module):
    """RoIAlign of every level, summed, plus an embedding of the box itself."""

    def __init__(self, config: RegionConfig, channels: int, patch_size: int, out_dim: int) -> None:
        super().__init__()
        self.frame, self.crop = config.frame, config.crop
        self.scales = [2 ** (config.levels - 1 - i) / patch_size for i in range(config.levels)]
        self.pconvs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.levels))
        self.pos_embedd = nn.Sequential(
            nn.Linear(4, config.position_dim),
            nn.ReLU(),
            nn.LayerNorm(config.position_dim, eps=1e-5),
            nn.Linear(config.position_dim, config.hidden_dim),
            nn.ReLU(),
            nn.LayerNorm(config.hidden_dim, eps=1e-5),
        )
        self.flatten_linear = nn.Linear(channels * config.crop**2, config.hidden_dim)
        self.updims = nn.Linear(config.hidden_dim, out_dim)

    def crops(self, levels: list[Tensor], boxes: Tensor, image_index: Tensor) -> list[Tensor]:
        """What RoIAlign cuts out of every level: [K, C, crop, crop] each, of the levels' dtype.

        The weights know boxes scaled by `frame`, whatever the picture's size (quirk Q1).
        """
        rois = boxes.float() * self.frame
        return [
            roi_align(level, rois, image_index, self.crop, scale).to(level.dtype)
            for level, scale in zip(levels, self.scales, strict=True)
        ]

    def forward(self, levels: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """Fused maps, boxes [K, 4] as fractions and their pictures [K] int64 -> [K, out_dim]."""
        crops = self.crops(levels, boxes, image_index)
        total = self.pconvs[0](crops[0])
        for conv, crop in zip(self.pconvs[1:], crops[1:], strict=True):
            total = total + conv(crop)
        total = F.relu(total)
        hidden = self.flatten_linear(total.flatten(1)) + self.pos_embedd(boxes.to(total.dtype))
        return self.updims(hidden)


class RegionEncoder(nn.Module):
    """Takes the hidden states of CLIP that `GlammConfig.region_layers` names, the class token left out.

    Args:
        config: its sizes.
        channels: C, width of CLIP; a multiple of 4 and of the groups.
        grid: g, side of CLIP's grid.
        out_dim: D, width of the language model.
        patch_size: px of CLIP's patch, which is the stride of the coarsest level.
    """

    def __init__(self, config: RegionConfig, channels: int, grid: int, out_dim: int, patch_size: int = 14) -> None:
        super().__init__()
        if channels % 4 or channels % config.groups:
            raise ValueError(
                f"a region encoder of {channels} channels: not a multiple of 4 and of {config.groups} groups"
            )
        self.sides = [grid * 2 ** (config.levels - 1 - i) for i in range(config.levels)]
        self.mlvl_fuse = LevelFusion(config, channels)
        self.roi_align = RegionHead(config, channels, patch_size, out_dim)

    def fuse(self, levels: list[Tensor]) -> list[Tensor]:
        """Hidden states [B, g, g, C], shallow first -> fused maps [B, C, n, n], the shallowest at the finest grid."""
        # The published code casts the resized maps to bfloat16 here, whatever the model computes in, which fails in a
        # float32 model (quirk Q2). They keep their dtype: that is the same function in a bfloat16 model.
        pyramid = [resize_map(level.permute(0, 3, 1, 2), side) for level, side in zip(levels, self.sides, strict=True)]
        return self.mlvl_fuse(pyramid)

    def forward(self, levels: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """Embed regions.

        Args:
            levels: hidden states [B, g, g, C], shallow first.
            boxes: XYXY as fractions of the picture's width and height, [K, 4].
            image_index: the picture of each box [K] int64.

        Returns:
            [K, D], to be spliced in where the text says `<bbox>`.
        """
        return self.roi_align(self.fuse(levels), boxes, image_index)
