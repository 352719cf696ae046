"""SAM's image encoder, a plain ViT with windowed and global attention (section 4). Parameter names are SAM's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.config import SamVitConfig
from deixis_train.models.layers import LayerNorm2d, PatchEmbed, TransformerMLP, merge_heads
from deixis_train.models.resample import Resize, resample_matrix


class SamAttention(nn.Module):
    """Self-attention on a square of `size` x `size` tokens with SAM's decomposed relative positions.

    `table_size` is the side the relative tables were trained for; they are resampled when it differs from `size`.
    """

    rel_resize: Tensor | None
    rel_index: Tensor

    def __init__(self, dim: int, num_heads: int, size: int, table_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.size = size
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, dim // num_heads))
        matrix = resample_matrix(2 * table_size - 1, 2 * size - 1, "linear") if size != table_size else None
        self.register_buffer("rel_resize", matrix, persistent=False)
        index = torch.arange(size)
        self.register_buffer("rel_index", index[:, None] - index[None] + size - 1, persistent=False)

    def _relative(self, table: Tensor) -> Tensor:
        """Table [2 * table_size - 1, d] -> one vector per pair (query, key) on an axis [size, size, d]."""
        if self.rel_resize is not None:
            table = self.rel_resize @ table
        return table[self.rel_index]

    def forward(self, x: Tensor) -> Tensor:
        """[B, size, size, dim] -> the same shape."""
        batch, size = x.shape[0], self.size
        qkv = self.qkv(x).reshape(batch, size * size, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [B, heads, size * size, d]
        # The relative term takes the query before it is scaled by 1 / sqrt(d).
        grid = q.unflatten(2, (size, size))
        by_row = grid @ self._relative(self.rel_pos_h).transpose(1, 2)  # [B, heads, row, column, key row]
        by_column = (grid.transpose(2, 3) @ self._relative(self.rel_pos_w).transpose(1, 2)).transpose(2, 3)
        bias = by_row[..., :, None] + by_column[..., None, :]  # [B, heads, row, column, key row, key column]
        bias = bias.flatten(4).flatten(2, 3)
        x = merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return self.proj(x).unflatten(1, (size, size))


class SamBlock(nn.Module):
    """`window` = 0 attends over the whole grid, otherwise within windows of that side."""

    def __init__(self, config: SamVitConfig, grid: int, window: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.grid = grid
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        table_size = window or config.img_size // config.patch_size
        self.attn = SamAttention(dim, config.num_heads, window or grid, table_size)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TransformerMLP(dim, int(dim * config.mlp_ratio), F.gelu)

    def _windowed(self, x: Tensor) -> Tensor:
        """Attend in windows: zero-padded at the right and bottom, and the padding takes part as ordinary tokens."""
        window, grid, dim = self.window, self.grid, x.shape[-1]
        count = -(-grid // window)
        pad = count * window - grid
        x = F.pad(x, (0, 0, 0, pad, 0, pad))
        x = x.reshape(-1, count, window, count, window, dim).transpose(2, 3).reshape(-1, window, window, dim)
        x = self.attn(x)
        x = x.reshape(-1, count, count, window, window, dim).transpose(2, 3)
        return x.reshape(-1, count * window, count * window, dim)[:, :grid, :grid]

    def forward(self, x: Tensor) -> Tensor:
        """[B, grid, grid, dim] -> the same shape."""
        normed = self.norm1(x)
        x = x + (self._windowed(normed) if self.window else self.attn(normed))
        return x + self.mlp(self.norm2(x))


class SamVit(nn.Module):
    """SAM's encoder for square inputs of `image_size` pixels, any multiple of the patch.

    Tables of absolute and relative positions, trained at `config.img_size`, are resampled in every call from parameters
    and constants, so an exporter folds them.
    """

    def __init__(self, config: SamVitConfig, image_size: int) -> None:
        super().__init__()
        table = config.img_size // config.patch_size
        self.grid = image_size // config.patch_size
        self.out_dim = config.out_chans
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, table, table, config.embed_dim))
        self.blocks = nn.ModuleList(
            SamBlock(config, self.grid, config.window_size if i in config.window_block_indexes else 0)
            for i in range(config.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(config.embed_dim, config.out_chans, 1, bias=False),
            LayerNorm2d(config.out_chans, eps=1e-6),
            nn.Conv2d(config.out_chans, config.out_chans, 3, padding=1, bias=False),
            LayerNorm2d(config.out_chans, eps=1e-6),
        )
        self.pos_resize = Resize(table, self.grid, "cubic")

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [B, S, S, 3] -> map [B, grid, grid, out_chans]."""
        x = self.patch_embed(image) + self.pos_resize(self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
