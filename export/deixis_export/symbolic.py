"""How two PyTorch functions are written in ONNX, where TorchScript's exporter does worse.

Its own `unflatten` records the traced sizes as if they were fixed, so that a dynamic dimension behind it ends up as a
constant; its own `flatten` costs five nodes. Where the axes in question are the last ones, both are a single Reshape
with a constant shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.onnx
from torch.onnx import symbolic_helper, symbolic_opset9, symbolic_opset13

# PyTorch's own type hints leave these modules' functions out.
_onnx: Any = torch.onnx
_helper: Any = symbolic_helper
_opset9: Any = symbolic_opset9
_opset13: Any = symbolic_opset13


def _reshape(g: Any, x: Any, shape: list[int]) -> Any:
    return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape, dtype=torch.int64)))


def _unflatten(g: Any, x: Any, dim: Any, sizes: Any) -> Any:
    rank, axis, parts = _helper._get_tensor_rank(x), _constant(dim, "i"), _constant(sizes, "is")
    if rank is None or axis is None or parts is None:
        return _opset13.unflatten(g, x, dim, sizes)
    axis %= rank
    tail = [_helper._get_tensor_dim_size(x, i) for i in range(axis + 1, rank)]
    if None in tail:
        return _opset13.unflatten(g, x, dim, sizes)
    head = [0] * axis  # 0 copies the dimension at the same index
    if -1 not in parts and axis:
        head[-1] = -1  # equally true, and the exporter's shape inference fails on a 0 without a -1
    return _reshape(g, x, [*head, *parts, *tail])


def _flatten(g: Any, x: Any, start: Any, end: Any) -> Any:
    rank, first, last = _helper._get_tensor_rank(x), _constant(start, "i"), _constant(end, "i")
    if rank is None or rank < 2 or first is None or last is None or last % rank != rank - 1:
        return _opset9.flatten(g, x, start, end)
    return _reshape(g, x, [0] * (first % rank) + [-1])


def _constant(value: Any, kind: str) -> Any:
    """The integer or list of integers that a traced value is, or None when it is computed in the graph."""
    found = _helper._maybe_get_const(value, kind)
    return found if isinstance(found, int | list | tuple) else None


@contextmanager
def better_reshapes(opset: int) -> Iterator[None]:
    """Use the functions above for exports within the block."""
    _onnx.register_custom_op_symbolic("aten::unflatten", _unflatten, opset)
    _onnx.register_custom_op_symbolic("aten::flatten", _flatten, opset)
    try:
        yield
    finally:
        _onnx.unregister_custom_op_symbolic("aten::unflatten", opset)
        _onnx.unregister_custom_op_symbolic("aten::flatten", opset)
