"""SAM's two-way transformer: tokens and image attend to each other (section 6). Parameter names are SAM's own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.layers import TransformerMLP, merge_heads, split_heads


class Attention(nn.Module):
    """Attention whose inner width may be smaller than the width of its input and output."""

    def __init__(self, dim: int, inner: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [R, Nq, dim], keys and values [R, Nk, dim] -> [R, Nq, dim]."""
        q = split_heads(self.q_proj(q), self.num_heads)
        k = split_heads(self.k_proj(k), self.num_heads)
        v = split_heads(self.v_proj(v), self.num_heads)
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class TwoWayBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.cross_attn_token_to_image = Attention(dim, dim // 2, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = TransformerMLP(dim, mlp_dim, F.relu)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.cross_attn_image_to_token = Attention(dim, dim // 2, num_heads)
        self.norm4 = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, q: Tensor, k: Tensor, q_code: Tensor, k_code: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:  # the tokens still are their own position code: neither that nor a residual is added
            q = self.self_attn(q, q, q)
        else:
            coded = q + q_code
            q = q + self.self_attn(coded, coded, q)
        q = self.norm1(q)
        q = self.norm2(q + self.cross_attn_token_to_image(q + q_code, k + k_code, k))
        q = self.norm3(q + self.mlp(q))
        k = self.norm4(k + self.cross_attn_image_to_token(k + k_code, q + q_code, q))
        return q, k


class TwoWayTransformer(nn.Module):
    """`depth` two-way blocks and a last look of the tokens at the image."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, num_heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(dim, dim // 2, num_heads)
        self.norm_final_attn = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, image: Tensor, image_code: Tensor | float, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens and image attend to each other.

        Args:
            image: [R, N, dim], the places of a map in row-major order (or any other set of keys).
            image_code: position code of the places, [N, dim], or 0.0 for none.
            tokens: [R, T, dim]; their first value serves as their position code throughout.

        Returns:
            The new tokens [R, T, dim] and the new image [R, N, dim].
        """
        q, k = tokens, image
        for layer in self.layers:
            q, k = layer(q, k, tokens, image_code)
        q = self.norm_final_attn(q + self.final_attn_token_to_image(q + tokens, k + image_code, k))
        return q, k
