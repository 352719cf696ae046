"""EVA02 vision transformer, the semantic encoder (section 3). Parameter names are those of the public checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.config import Eva02Config
from deixis_train.models.layers import PatchEmbed, merge_heads, split_heads
from deixis_train.models.resample import Resize


def rope_tables(grid: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2-D rotary code (section 3): two float32 [1 + grid * grid, head_dim].

    Row 0 is the class token, which is not rotated. The first half of a head turns with the row, the second with the
    column; positions are plain integers, not rescaled to the grid of pre-training.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    angle = (torch.arange(grid, dtype=torch.float64)[:, None] * frequency).repeat_interleave(2, dim=1)  # [grid, half]
    rows = angle[:, None].expand(grid, grid, half)
    columns = angle[None].expand(grid, grid, half)
    angles = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
    angles = torch.cat([torch.zeros(1, head_dim, dtype=torch.float64), angles])
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs (a, b) of the last axis to (a cos - b sin, b cos + a sin)."""
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Eva02Attention(nn.Module):
    """Self-attention with rotary positions; query and value have a bias, the key has none."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(split_heads(self.q_proj(x) + self.q_bias, self.num_heads), cos, sin)
        k = rotate(split_heads(self.k_proj(x), self.num_heads), cos, sin)
        v = split_heads(self.v_proj(x) + self.v_bias, self.num_heads)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class SwiGLU(nn.Module):
    """Gated feed-forward with a LayerNorm on the hidden units."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=1e-5)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Eva02Block(nn.Module):
    def __init__(self, config: Eva02Config) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Eva02Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, int(dim * config.mlp_ratio))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Eva02(nn.Module):
    """EVA02 for square inputs of `image_size` pixels; the grid is `image_size // patch_size` on a side.

    The learned position table is resampled from the grid of pre-training in every call. That is a small product of
    parameters and constants, so training can move the table and an exporter folds it.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: Eva02Config, image_size: int) -> None:
        super().__init__()
        dim = config.embed_dim
        if dim // config.num_heads % 4:
            raise ValueError(f"EVA02 needs a head width divisible by 4, not {dim} / {config.num_heads}")
        table = config.pretrain_img_size // config.patch_size
        self.grid = image_size // config.patch_size
        self.out_dim = dim
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + table * table, dim))
        self.blocks = nn.ModuleList(Eva02Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pos_resize = Resize(table, self.grid, "cubic")
        cos, sin = rope_tables(self.grid, dim // config.num_heads)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def positions(self) -> Tensor:
        """Learned positions on this input's grid: [1, 1 + grid * grid, dim], class token first."""
        table = self.pos_resize.matrix.shape[1]
        patches = self.pos_resize(self.pos_embed[:, 1:].unflatten(1, (table, table)))
        return torch.cat([self.pos_embed[:, :1], patches.flatten(1, 2)], dim=1)

    def embed(self, image: Tensor) -> Tensor:
        """Normalised image [B, S, S, 3] -> what the blocks take [B, 1 + grid * grid, dim], class token first."""
        patches = self.patch_embed(image).flatten(1, 2)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.positions()

    def tokens(self, image: Tensor) -> Tensor:
        """Normalised image [B, S, S, 3] -> final tokens [B, 1 + grid * grid, dim], class token first."""
        x = self.embed(image)
        for block in self.blocks:
            x = block(x, self.rope_cos, self.rope_sin)
        return self.norm(x)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [B, S, S, 3] -> map [B, grid, grid, dim]."""
        return self.tokens(image)[:, 1:].unflatten(1, (self.grid, self.grid))
