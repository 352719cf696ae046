"""Small layers that several parts of the models share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Patches by a strided convolution; what does not fill a patch at the right and bottom is left out."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """[B, S, S, 3] -> [B, S // patch, S // patch, embed_dim]."""
        return self.proj(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a channels-first map [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """`depth` Linears with an activation between them; the names (`layers.0` ...) are SAM's."""

    def __init__(
        self, dim_in: int, dim_hidden: int, dim_out: int, depth: int, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__()
        widths = [dim_in] + [dim_hidden] * (depth - 1) + [dim_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class TransformerMLP(nn.Module):
    """The two-layer feed-forward of SAM's blocks, under its names `lin1` and `lin2`."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.activation(self.lin1(x)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]; heads are contiguous slices."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, d] -> [B, N, heads * d]."""
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


class LoraLinear(nn.Module):
    """y = x (W + s A B), without bias. `weight` is [out, in], `lora_a` [in, rank], `lora_b` [rank, out].

    The scale s multiplies directly; it is not divided by the rank (section 7). `dropout` acts on what the factors see,
    in training mode only.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.lora_a = nn.Parameter(torch.empty(in_features, rank))
        self.lora_b = nn.Parameter(torch.zeros(rank, out_features))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + (self.dropout(x) @ self.lora_a @ self.lora_b) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as one plain matrix."""
        linear = nn.Linear(
            self.in_features, self.out_features, bias=False, device=self.weight.device, dtype=self.weight.dtype
        )
        linear.weight.copy_(self.weight + self.scale * (self.lora_a @ self.lora_b).T)
        linear.weight.requires_grad_(self.weight.requires_grad)
        return linear


def projection(in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0) -> nn.Module:
    """A matrix without bias, with LoRA factors beside it when `rank` is not 0."""
    if rank:
        return LoraLinear(in_features, out_features, rank, scale, dropout)
    return nn.Linear(in_features, out_features, bias=False)


def merge_lora(module: nn.Module) -> None:
    """Fold every A B product below `module` into its matrix, in place; the function stays the same."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLinear):
                setattr(parent, name, child.merged())


@torch.no_grad()
def init_vit(encoder: nn.Module) -> None:
    """Start values of an encoder's matrices and convolutions: truncated normal of 0.02, biases zero."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def init_heads(part: nn.Module) -> None:
    """Start values of narrow transformers and heads: matrices keep the variance (Xavier), biases zero."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
