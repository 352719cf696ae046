"""How two PyTorch functions are written in ONNX, where TorchScript's exporter does worse.

Its own `unflatten` records the traced sizes as if they were fixed, so that a dynamic dimension behind it ends up as a constant; its own
`flatten` costs five nodes. Where the axes in question are the last ones, both are a single Reshape with a constant shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.onnx import (
    register_custom_op_symbolic,
    symbolic_helper,
    symbolic_opset9,
    symbolic_opset13,
    unregister_custom_op_symbolic,
)


def _reshape(g: Any, x: Any, shape: list[int]) -> Any:
    return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape, dtype=torch.int64)))


def _unflatten(g: Any, x: Any, dim: Any, sizes: Any) -> Any:
    rank = symbolic_helper._get_tensor_rank(x)
    axis, parts = symbolic_helper._maybe_get_const(dim, "i"), symbolic_helper._maybe_get_const(sizes, "is")
    if rank is None or not isinstance(axis, int) or not isinstance(parts, list | tuple):
        return symbolic_opset13.unflatten(g, x, dim, sizes)
    axis %= rank
    tail = [symbolic_helper._get_tensor_dim_size(x, i) for i in range(axis + 1, rank)]
    if any(size is None for size in tail):
        return symbolic_opset13.unflatten(g, x, dim, sizes)
    head = [0] * axis  # 0 copies the dimension at the same index
    if -1 not in parts and axis:
        head[-1] = -1  # equally true, and the exporter's shape inference fails on a 0 without a -1
    return _reshape(g, x, [*head, *parts, *tail])


def _flatten(g: Any, x: Any, start: Any, end: Any) -> Any:
    rank = symbolic_helper._get_tensor_rank(x)
    first, last = symbolic_helper._maybe_get_const(start, "i"), symbolic_helper._maybe_get_const(end, "i")
    if rank is None or rank < 2 or last % rank != rank - 1:
        return symbolic_opset9.flatten(g, x, start, end)
    return _reshape(g, x, [0] * (first % rank) + [-1])


@contextmanager
def better_reshapes(opset: int) -> Iterator[None]:
    """Use the functions above for exports within the block."""
    register_custom_op_symbolic("aten::unflatten", _unflatten, opset)
    register_custom_op_symbolic("aten::flatten", _flatten, opset)
    try:
        yield
    finally:
        unregister_custom_op_symbolic("aten::unflatten", opset)
        unregister_custom_op_symbolic("aten::flatten", opset)
