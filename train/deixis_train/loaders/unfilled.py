"""Models that are about to be filled from files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def unfilled(build: Callable[[], M]) -> M:
    """Build a module without drawing start values: its parameters hold whatever is in memory.

    Memory is taken by what is written to it only, and nothing is computed, so the largest models are there at once.
    Buffers are real. The module may not share parameters among its parts.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = build()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    return module
