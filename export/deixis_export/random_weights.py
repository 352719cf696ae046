"""What random models of all families share: noise for flat parameters, words for small vocabularies."""

from __future__ import annotations

import torch
from torch import nn

EVERYDAY_WORDS = (
    "a an and are at ball behind big black blue book bottle box brown can caption cat chair cup dark fork "
    "front green grey image in is it knife large left light long mug near next object of on orange pear "
    "picture pink plate purple red right round small spoon table the there to toy two under upside where "
    "which white with yellow"
)


def stir(model: nn.Module, seed: int) -> None:
    """Add noise to every parameter that starts flat, so that all of them do something."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, value in model.named_parameters():
        flat = bool((value == value.flatten()[0]).all())
        if flat and value.numel() > 1:
            scale = 0.5 if name.endswith("gate") else 0.05
            value.add_(torch.randn(value.shape, generator=generator) * scale)
