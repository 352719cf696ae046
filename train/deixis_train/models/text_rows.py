"""What both text heads share: additive masks, and the beams of a prompt as queries of its one row of keys and values.

Letters in shapes: R rows of the decoder, N prompts (R = N * beams, beams of a prompt adjacent), H heads, S positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]

# Added to a masked score. Finite on purpose: where a whole row is masked the reference attends uniformly
# (section 7 (i)), because every score rounds to this number.
MASKED = -1e10


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask allows, MASKED elsewhere."""
    return torch.where(allowed, 0.0, MASKED).to(dtype)


def group_rows(x: Tensor, prompts: int) -> Tensor:
    """[R, H, S, X] -> [N, H, (R / N) * S, X]: the beams of a prompt become queries of its one row."""
    _, heads, length, width = x.shape
    return x.reshape(prompts, -1, heads, length, width).transpose(1, 2).reshape(prompts, heads, -1, width)


def ungroup_rows(x: Tensor, like: Tensor) -> Tensor:
    """[N, H, (R / N) * S, X] -> [R, H, S, X], where R, H and S are those of `like`."""
    rows, heads, length = like.shape[:3]
    return x.reshape(x.shape[0], heads, -1, length, x.shape[-1]).transpose(1, 2).reshape(rows, heads, length, -1)
