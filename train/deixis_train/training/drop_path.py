"""Drop-path of the encoders (sections 3 and 4): in training mode a residual branch is left out for some pictures.

It concerns training alone, so it is hooked onto the blocks instead of standing in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.sam_vit import SamVit

SEMANTIC_RATE, SAM_RATE = 0.1, 0.5  # of the last block; the first has 0


def add_drop_path(model: PixelLLM) -> None:
    """Block i of n drops with probability rate * i / (n - 1) while its encoder trains. TinyViT has none."""
    _hook(model.semantic_encoder.blocks, SEMANTIC_RATE)
    if isinstance(model.sam_encoder, SamVit):
        _hook(model.sam_encoder.blocks, SAM_RATE)


def _hook(blocks: nn.ModuleList, rate: float) -> None:
    for i, block in enumerate(blocks):
        if i:
            _DropPath(rate * i / (len(blocks) - 1)).attach(block)


class _DropPath:
    def __init__(self, probability: float) -> None:
        self.keep, self.pictures = 1 - probability, 1

    def attach(self, block: nn.Module) -> None:
        block.register_forward_pre_hook(self._count)
        for branch in ("attn", "mlp"):
            block.get_submodule(branch).register_forward_hook(self._drop)

    def _count(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.pictures = inputs[0].shape[0]

    def _drop(self, branch: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not branch.training:
            return None
        kept = torch.bernoulli(torch.full((self.pictures,), self.keep, device=output.device)) / self.keep
        # Attention in windows has several entries per picture, one after the other.
        kept = kept.repeat_interleave(output.shape[0] // self.pictures)
        return output * kept.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))
