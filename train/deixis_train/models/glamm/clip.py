"""CLIP's image encoder, the global encoder (section 3). Parameter names are Hugging Face's below `vision_model.`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.glamm.config import ClipConfig
from deixis_train.models.layers import init_vit, merge_heads, split_heads


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the activation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class ClipAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class ClipMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


class ClipBlock(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.self_attn = ClipAttention(config.embed_dim, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.mlp = ClipMlp(config.embed_dim, config.mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """Patches behind a class token, plus learned positions."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        dim, patch = config.embed_dim, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(1 + config.tokens, dim)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embedding(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(image.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ClipEncoder(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipBlock(config) for _ in range(config.selected))


class ClipVision(nn.Module):
    """CLIP up to the selected hidden state; blocks behind it do not exist."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.embed_dim, eps=1e-5)
        self.encoder = ClipEncoder(config)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Hidden states of every depth.

        Args:
            image: normalised [B, s, s, 3], s = `config.image_size`.

        Returns:
            `config.selected` + 1 tensors [B, 1 + T0, C]: after the first layer norm, then after every block. The class
            token comes first, patches follow row by row.
        """
        states = [self.pre_layrnorm(self.embeddings(image))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values for training from nothing: truncated normal of 0.02."""
        init_vit(self)
        nn.init.trunc_normal_(self.embeddings.position_embedding.weight, std=0.02)
        nn.init.trunc_normal_(self.embeddings.class_embedding, std=0.02)
