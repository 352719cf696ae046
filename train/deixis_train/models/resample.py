"""The one resampling rule of the network (section 2.1): half-pixel centres, antialiased, cubic kernel with a = -0.5.

Resizing is separable and its weights depend on the sizes only, so a resize is two small matrix products. That is the
same arithmetic in PyTorch and in ONNX, where the `Resize` operators of the engines disagree about antialiasing.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Kernel = Literal["linear", "cubic"]


@lru_cache(maxsize=64)
def _weights(n_in: int, n_out: int, kernel: Kernel) -> np.ndarray:
    step = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * step - 0.5
    # Shrinking widens the kernel by the factor, which is the antialiasing; enlarging leaves it as it is.
    distance = np.abs(centres[:, None] - np.arange(n_in)[None, :]) / max(step, 1.0)
    if kernel == "linear":
        weights = np.maximum(0.0, 1.0 - distance)
    elif kernel == "cubic":
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        weights = np.where(distance < 1.0, near, np.where(distance < 2.0, far, 0.0))
    else:
        raise ValueError(f"kernel must be 'linear' or 'cubic', not {kernel!r}")
    # Taps outside the input do not exist; the ones that do share the whole weight.
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resample_matrix(n_in: int, n_out: int, kernel: Kernel) -> Tensor:
    """Weights that resample `n_in` samples to `n_out` (section 2.1): float32 [n_out, n_in], every row sums to 1."""
    return torch.tensor(_weights(n_in, n_out, kernel))


def apply_matrices(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample a map [..., H, W, C] with `rows` [h, H] and `columns` [w, W] to [..., h, w, C]."""
    x = rows @ x.flatten(-2)  # [..., h, W * C]
    return columns @ x.unflatten(-1, (columns.shape[1], -1))


def resize(x: Tensor, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """Resize a channels-last map [..., H, W, C] to [..., h, w, C] where `size` = (h, w), by the rule of section 2.1."""
    height, width = x.shape[-3], x.shape[-2]
    if (height, width) == tuple(size):
        return x
    rows = resample_matrix(height, size[0], kernel).to(x)
    columns = resample_matrix(width, size[1], kernel).to(x)
    return apply_matrices(x, rows, columns)


class Resize(nn.Module):
    """`resize` between two square sizes known beforehand; keeps its matrix, so that an exporter sees constants."""

    matrix: Tensor

    def __init__(self, n_in: int, n_out: int, kernel: Kernel) -> None:
        super().__init__()
        self.identity = n_in == n_out
        self.register_buffer("matrix", resample_matrix(n_in, n_out, kernel), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_in, n_in, C] -> [..., n_out, n_out, C]."""
        return x if self.identity else apply_matrices(x, self.matrix, self.matrix)
