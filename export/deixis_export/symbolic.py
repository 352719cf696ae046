"""How functions are written in ONNX that TorchScript's exporter does not know, or writes worse.

Its own `unflatten` records the traced sizes as if they were fixed, so that a dynamic dimension behind it ends up as a
constant; its own `flatten` costs five nodes. Where the axes in question are the last ones, both are a single Reshape
with a constant shape. RoIAlign is an operator of `deixis_train`, and one node of ONNX; so is a resize between known
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.onnx
from torch.onnx import symbolic_helper, symbolic_opset9, symbolic_opset13

from deixis.errors import ExportError
from deixis_train.models.glamm.roi_align import OPERATOR, SAMPLES

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


def _gelu(g: Any, x: Any, approximate: Any) -> Any:
    """The approximation by a tanh as x * sigmoid(x * (a + b * x^2)): the same function in six nodes instead of ten."""
    if _constant(approximate, "s") != "tanh":
        return _opset9.gelu(g, x, approximate)
    a = 2 * (2 / math.pi) ** 0.5
    scale, cubic = (g.op("Constant", value_t=torch.tensor(value)) for value in (a, a * 0.044715))
    inner = g.op("Add", g.op("Mul", g.op("Mul", x, x), cubic), scale)
    return g.op("Mul", x, g.op("Sigmoid", g.op("Mul", x, inner)))


def _roi_align(g: Any, maps: Any, boxes: Any, index: Any, size: Any, scale: Any) -> Any:
    """mmcv's RoIAlign with `aligned` (GLaMM section 4), which is ONNX's from opset 16 on."""
    side = _constant(size, "i")
    found = g.op(
        "RoiAlign",
        maps,
        boxes,
        index,
        coordinate_transformation_mode_s="half_pixel",
        mode_s="avg",
        output_height_i=side,
        output_width_i=side,
        sampling_ratio_i=SAMPLES,
        spatial_scale_f=_constant(scale, "f"),
    )
    return found.setType(maps.type().with_sizes([None, _helper._get_tensor_dim_size(maps, 1), side, side]))


def _resize_aligned(g: Any, x: Any, size: Any, align_corners: Any, *scale_factors: Any) -> Any:
    """Bilinear with aligned corners: one Resize with constant scales. The sides must not be dynamic.

    The wanted sides are those of the traced result, for a model takes them from another map's shape.
    """
    wanted, sides = g.original_node.output().type().sizes()[2:], [_helper._get_tensor_dim_size(x, i) for i in (2, 3)]
    if not _constant(align_corners, "b") or None in sides:
        raise ExportError("a bilinear resize can only be exported with aligned corners and from a fixed size")
    scales = torch.tensor([new / old for new, old in zip(wanted, sides, strict=True)], dtype=torch.float32)
    if [int(old * scale) for old, scale in zip(sides, scales.tolist(), strict=True)] != wanted:
        raise ExportError(f"a resize from {sides} to {wanted} cannot be exported: the ratio is not exact")
    constants = [g.op("Constant", value_t=value) for value in (torch.zeros(0), torch.cat([torch.ones(2), scales]))]
    found = g.op("Resize", x, *constants, coordinate_transformation_mode_s="align_corners", mode_s="linear")
    return found.setType(x.type().with_sizes([None, _helper._get_tensor_dim_size(x, 1), *wanted]))


def _constant(value: Any, kind: str) -> Any:
    """The number or list of integers that a traced value is, or None when it is computed in the graph."""
    found = _helper._maybe_get_const(value, kind)
    return found if isinstance(found, int | float | str | list | tuple) else None


@contextmanager
def own_symbolics(opset: int) -> Iterator[None]:
    """Use the functions above for exports within the block."""
    own = {
        "aten::unflatten": _unflatten,
        "aten::flatten": _flatten,
        "aten::gelu": _gelu,
        "aten::upsample_bilinear2d": _resize_aligned,
        OPERATOR: _roi_align,
    }
    for name, function in own.items():
        _onnx.register_custom_op_symbolic(name, function, opset)
    try:
        yield
    finally:
        for name in own:
            _onnx.unregister_custom_op_symbolic(name, opset)
