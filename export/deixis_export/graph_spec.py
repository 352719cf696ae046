"""What a graph is to the export, whatever the family of the model: named tensors and a module that computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)  # the model that a graph is cut from
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor at the border of a graph. A string in `dims` is a symbolic dimension."""

    name: str
    dims: Dims
    dtype: str = "float32"


@dataclass(frozen=True)
class GraphSpec(Generic[M]):
    """What a graph takes, gives and computes.

    `module` builds the function, whose arguments are `inputs` in their order. `parts` are the members of the model
    whose parameters it holds: they are rounded when the graph is stored below fp32.
    """

    role: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    module: Callable[[M], nn.Module]
    parts: tuple[str, ...]


class View(nn.Module, Generic[M]):
    """A graph's view of the model."""

    def __init__(self, model: M) -> None:
        super().__init__()
        self.model: M = model


def pairs_of(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values by layer, from the flat list that a graph takes."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


@torch.no_grad()
def run_torch(spec: GraphSpec[M], model: M, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself computes for a graph's inputs."""
    module = spec.module(model).eval()
    result = module(*(inputs[tensor.name] for tensor in spec.inputs))
    values = result if isinstance(result, tuple) else (result,)
    return {tensor.name: value for tensor, value in zip(spec.outputs, values, strict=True)}
