"""What only helps to learn, off in the recipes of the paper: read-outs that are thrown away, standardised features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.t5 import T5
from deixis_train.training.cells import CellHeads, Names

MATCH_WEIGHT = 5.0  # of a cell that belongs to the thing meant; most do not


class Helpers(nn.Module):
    """The read-outs, and mean and spread of the fused features.

    SAM's features are ten times smaller than the semantic ones, and an optimizer that moves all weights alike would
    learn from them ten times slower. So the extractor is trained on standardised features; `fold_scale` gives the scale
    to its weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: PixelLLM, names: Names) -> None:
        super().__init__()
        config = model.config
        channels = config.semantic.embed_dim + config.sam.out_chans
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.matcher = nn.Linear(config.text.emb, 1)  # is this cell part of the thing meant?
        self.cells = CellHeads(config.text.emb, names)  # on the extractor's image tokens
        self.grid = CellHeads(config.semantic.embed_dim, names)  # on the semantic encoder's map

    def measure(self, features: Tensor) -> None:
        """Take mean and spread of every channel from sample features [B, g, g, C]."""
        self.mean.copy_(features.mean(dim=(0, 1, 2)))
        self.std.copy_(features.std(dim=(0, 1, 2)).clamp(min=1e-4))

    def standardize(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    @torch.no_grad()
    def fold_scale(self, projection: nn.Linear) -> None:
        """Make `projection`, trained on standardised features, take the features as they are."""
        projection.weight.div_(self.std)
        projection.bias.sub_(projection.weight @ self.mean)

    @torch.no_grad()
    def unfold_scale(self, projection: nn.Linear) -> None:
        """The inverse of `fold_scale`: to train on a projection that took the features as they are."""
        projection.bias.add_(projection.weight @ self.mean)
        projection.weight.mul_(self.std)


@contextmanager
def tapped(text: T5) -> Iterator[list[Tensor]]:
    """Keep the cross-attention weights of the decoder's layers, which the model itself does not return.

    Each is [R, H, L, E]. Dropout on them is left out while they are tapped.
    """
    kept: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        kept.append(F.softmax(query @ key.transpose(-1, -2) + bias, dim=-1))
        return kept[-1] @ value

    # `attend` is a method of the class: an attribute of the instance goes before it, and is taken away again.
    modules = [vars(layer.get_submodule("encoder_decoder_attention")) for layer in text.decoder.layers]
    for module in modules:
        module["attend"] = attend
    try:
        yield kept
    finally:
        for module in modules:
            del module["attend"]


def look_loss(attention: list[Tensor], cells: Tensor, weight: Tensor) -> Tensor:
    """-log of the attention that the later decoder layers pay to the cells that a token points at.

    Without it, telling which cells a phrase means hardly starts: at first every position looks everywhere.

    Args:
        attention: per layer [R, H, L, E]; the first G of the E places are the cells.
        cells: [R, L, G] bool; tokens without any do not count.
        weight: of every position [R, L].
    """
    weight = weight * cells.any(-1)
    total = weight.new_zeros(())
    later = attention[1:] or attention
    for weights in later:
        seen = (weights.float().mean(1)[..., : cells.shape[-1]] * cells).sum(-1)
        total = total - (torch.log(seen + 1e-6) * weight).sum() / weight.sum().clamp(min=1)
    return total / len(later)


def match_loss(logits: Tensor, meant: Tensor) -> Tensor:
    """Cross entropy of "this cell belongs to the thing meant": logits and truth (bool), both [R, G]."""
    weight = torch.tensor(MATCH_WEIGHT, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits.float(), meant.float(), pos_weight=weight)
