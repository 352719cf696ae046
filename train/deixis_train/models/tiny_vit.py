"""MobileSAM's image encoder: TinyViT-5M with SAM's neck, the light choice for the SAM branch.

Four stages. The first is convolutional (inverted bottlenecks, stride 4), the other three attend inside windows. The
first two stage borders halve the grid, the third keeps it, so the output is a stride-16 map like that of SAM's ViT.
There are no position tables of the size of the image: positions enter through the convolutions and through one
attention bias per offset inside a window. The same weights therefore serve every input size.

Parameter names are those of the published `mobile_sam.pt` below `image_encoder.` (see `loaders/mobile_sam.py`).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.config import TinyVitConfig

MBCONV_EXPANSION = 4  # width of the inverted bottlenecks of the first stage, as published
MERGE_STRIDES = (2, 2, 1)  # MobileSAM keeps the grid at the third border


class ConvBn(nn.Sequential):
    """A bias-free convolution and its BatchNorm, under the published names `c` and `bn`. NCHW."""

    def __init__(self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out_chans)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the normalisation into the convolution, which gains a bias. Doing it twice is harmless."""
        bn = self.bn
        if not isinstance(bn, nn.BatchNorm2d):
            return
        assert bn.running_mean is not None and bn.running_var is not None
        gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        self.c.weight.mul_(gain[:, None, None, None])
        self.c.bias = nn.Parameter(bn.bias - bn.running_mean * gain, requires_grad=self.c.weight.requires_grad)
        self.bn = nn.Identity()


class PatchEmbed(nn.Module):
    """Two stride-2 convolutions: NCHW pixels -> [B, dim, S/4, S/4]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvBn(3, dim // 2, 3, stride=2), nn.GELU(), ConvBn(dim // 2, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class MBConv(nn.Module):
    """Inverted bottleneck with a residual: widen, depthwise 3x3, narrow. NCHW, shape kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * MBCONV_EXPANSION
        self.conv1 = ConvBn(dim, hidden, 1)
        self.conv2 = ConvBn(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBn(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(hidden))


class PatchMerging(nn.Module):
    """Stage border: change the width and, with stride 2, halve the grid. NCHW."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBn(dim, out_dim, 1)
        self.conv2 = ConvBn(out_dim, out_dim, 3, stride=stride, groups=out_dim)
        self.conv3 = ConvBn(out_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Pre-normalised self-attention over the tokens of one window, with a learned bias per |row|, |column| offset."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window * window))
        cell = torch.arange(window * window)
        row, col = cell // window, cell % window
        offset = (row[:, None] - row[None, :]).abs() * window + (col[:, None] - col[None, :]).abs()
        self.register_buffer("offset", offset, persistent=False)
        self.offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[windows, tokens, dim] -> the same shape."""
        tokens, dim = x.shape[1:]
        # The fused output holds, head after head, that head's q, k and v.
        qkv = self.qkv(self.norm(x)).view(-1, tokens, self.num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1) + self.attention_biases[:, self.offset]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyVitBlock(nn.Module):
    """Window attention, a depthwise 3x3 convolution, and an MLP. NHWC, shape kept."""

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(dim, num_heads, window)
        self.local_conv = ConvBn(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(x)
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)

    def _attend(self, x: Tensor) -> Tensor:
        height, width, dim = x.shape[1:]
        w = self.window
        # Padding comes before the normalisation, so padding is a token that holds the norm's bias. None is masked.
        x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
        rows, cols = x.shape[1] // w, x.shape[2] // w
        x = x.reshape(-1, rows, w, cols, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
        x = self.attn(x)
        x = x.reshape(-1, rows, cols, w, w, dim).transpose(2, 3).reshape(-1, rows * w, cols * w, dim)
        return x[:, :height, :width]


class ConvStage(nn.Module):
    """The first stage. NCHW in, NCHW out."""

    def __init__(self, dim: int, out_dim: int, depth: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(dim) for _ in range(depth))
        self.downsample = PatchMerging(dim, out_dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class AttentionStage(nn.Module):
    """One of the windowed stages; the last has no border (`stride` None). NCHW in, NCHW out."""

    def __init__(
        self, dim: int, out_dim: int, depth: int, num_heads: int, window: int, mlp_ratio: float, stride: int | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TinyVitBlock(dim, num_heads, window, mlp_ratio) for _ in range(depth))
        self.downsample = None if stride is None else PatchMerging(dim, out_dim, stride)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        x = x.permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class TinyVit(nn.Module):
    """TinyViT image encoder.

    Args:
        config: sizes of the stages and of the neck.
        image_size: side of the square input in pixels, a multiple of 32. It fixes shapes only, no weights.

    Raises:
        ValueError: if `image_size` is not a positive multiple of 32.
    """

    def __init__(self, config: TinyVitConfig, image_size: int) -> None:
        super().__init__()
        if image_size <= 0 or image_size % 32:
            raise ValueError(f"TinyVit: image_size {image_size} is not a positive multiple of 32")
        self.config = config
        self.image_size = image_size
        dims, depths = config.embed_dims, config.depths
        self.patch_embed = PatchEmbed(dims[0])
        stages: list[nn.Module] = [ConvStage(dims[0], dims[1], depths[0], MERGE_STRIDES[0])]
        borders = [*pairwise(dims), (dims[-1], dims[-1])]
        strides: tuple[int | None, ...] = (*MERGE_STRIDES, None)
        for i in range(1, len(dims)):
            stages.append(
                AttentionStage(
                    *borders[i], depths[i], config.num_heads[i], config.window_sizes[i], config.mlp_ratio, strides[i]
                )
            )
        self.layers = nn.ModuleList(stages)
        out = config.out_chans
        self.neck = nn.ModuleList(
            [
                nn.Conv2d(dims[-1], out, 1, bias=False),
                nn.LayerNorm(out, eps=1e-6),
                nn.Conv2d(out, out, 3, padding=1, bias=False),
                nn.LayerNorm(out, eps=1e-6),
            ]
        )
        self.train(False)

    @property
    def grid(self) -> int:
        """Side of the output map."""
        return self.image_size // 16

    def train(self, mode: bool = True) -> TinyVit:
        """Always evaluates: the branch is frozen, and training mode would move the BatchNorm statistics."""
        del mode
        return super().train(False)

    def fuse_batchnorm(self) -> TinyVit:
        """Fold every BatchNorm into its convolution, in place: same function, fewer operators, safe to store in fp16.

        Afterwards the parameter names differ from the published ones (`c.bias` instead of `bn.*`). Returns self.
        """
        for module in self.modules():
            if isinstance(module, ConvBn):
                module.fuse()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Normalised RGB image [B, S, S, 3], zero right of and below the picture -> [B, S/16, S/16, out_chans]."""
        x = self.patch_embed(image.permute(0, 3, 1, 2))
        for stage in self.layers:
            x = stage(x)
        reduce, norm, smooth, norm_out = self.neck
        x = norm(reduce(x).permute(0, 2, 3, 1))
        return norm_out(smooth(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
