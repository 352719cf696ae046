"""The simple feature pyramid over the fused map (section 10): five levels from one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.layers import LayerNorm2d


class ConvNorm(nn.Module):
    """Convolution without bias that keeps the size, and a LayerNorm over channels; no activation."""

    def __init__(self, dim_in: int, dim_out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(dim_out, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class FeaturePyramid(nn.Module):
    """Levels P3 to P7: twice the fused grid, the grid itself, and three times half of the one before.

    Attributes are named after the levels; the indices inside them are those of the published parameters.
    """

    def __init__(self, dim_in: int, up_channels: int, channels: int) -> None:
        super().__init__()
        self.p3 = nn.Sequential(
            nn.ConvTranspose2d(dim_in, up_channels, 2, stride=2),
            ConvNorm(up_channels, channels, 1),
            ConvNorm(channels, channels, 3),
        )
        self.p4 = nn.Sequential(ConvNorm(dim_in, channels, 1), ConvNorm(channels, channels, 3))
        self.p5 = nn.Sequential(nn.MaxPool2d(2), ConvNorm(dim_in, channels, 1), ConvNorm(channels, channels, 3))
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Fused features [B, g, g, C] -> maps [B, D, h, w] of P3 to P7: h = 2g, g, g // 2, then halves rounded up."""
        x = features.permute(0, 3, 1, 2)
        p5 = self.p5(x)
        p6 = self.p6(p5)
        return [self.p3(x), self.p4(x), p5, p6, self.p7(F.relu(p6))]
