"""How constants are stored: precision, and which file they go to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from deixis_export.trace import TracedGraph

PrecisionName = Literal["fp32", "fp16", "int8", "w8", "w4"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "fp16", "int8", "w8", "w4")
WEIGHT_ONLY: dict[str, int] = {"w8": 8, "w4": 4}  # bits of weights that are stored in blocks
ROUNDED = ("int8", *WEIGHT_ONLY)  # activations are rounded as well as weights

# Matrices and tables of at least this size are stored at the lower precision; norms, biases and small tables stay in
# fp32.
LOW_PRECISION_MIN_BYTES = 2048
# A protobuf ends at 2 GiB; a graph above this limit gets an external file.
EXTERNAL_LIMIT_BYTES = 1 << 30
_INLINE_BYTES = 1024  # onnxruntime wants small tensors (shapes, axes) inside the graph
_ALIGNMENT = 64


def stored_low(shape: tuple[int, ...], nbytes: int) -> bool:
    """Whether a float32 parameter of this shape is stored below fp32."""
    return len([size for size in shape if size > 1]) >= 2 and nbytes >= LOW_PRECISION_MIN_BYTES


def has_low(module: nn.Module | None) -> bool:
    """Whether a part of a model has a parameter that is stored below fp32."""
    return module is not None and any(stored_low(tuple(p.shape), p.numel() * 4) for p in module.parameters())


@torch.no_grad()
def round_to_fp16(module: nn.Module, part: str) -> None:
    """Round in place every parameter that is stored in fp16, so that the model is the one that the bundle holds.

    Raises ValueError for a parameter beyond fp16's range, named below `part`.
    """
    for name, value in module.named_parameters(prefix=part):
        if stored_low(tuple(value.shape), value.numel() * 4):
            rounded = value.half().float()
            if not torch.isfinite(rounded).all():
                raise ValueError(f"parameter {name} has values that fp16 cannot hold; export it with --precision fp32")
            value.copy_(rounded)


def store_fp16(traced: TracedGraph) -> None:
    """Keep constants that fp16 holds exactly in fp16, with a Cast to float32 that engines fold while loading.

    A table that is looked up stays fp16 in memory too: the rows that were found are cast instead.
    """
    halves: dict[str, str] = {}
    for name in sorted(traced.constants):
        value = traced.constants[name]
        if value.dtype != np.float32 or not stored_low(value.shape, value.nbytes):
            continue
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), value):
            continue  # a table made from rounded parameters; it is small
        del traced.constants[name]
        halves[name] = f"{name}.fp16"
        traced.constants[halves[name]] = half
    nodes: list[onnx.NodeProto] = []
    used: set[str] = set()
    for node in traced.model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        nodes.append(copy)
        if node.op_type == "Gather" and node.input[0] in halves:
            copy.input[0], copy.output[0] = halves[node.input[0]], f"{node.output[0]}.fp16"
            nodes.append(_to_float(copy.output[0], node.output[0]))
        used |= set(copy.input)
    casts = [_to_float(half, name) for name, half in halves.items() if name in used]
    del traced.model.graph.node[:]
    traced.model.graph.node.extend([*casts, *nodes])


def _to_float(source: str, target: str) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [target], to=onnx.TensorProto.FLOAT)


class WeightFile:
    """An external-data file.

    The same bytes are stored once, whichever graphs ask for them. Use as a context manager.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO | None = None
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def flush(self) -> None:
        """Make what was added readable by others."""
        if self._stream is not None:
            self._stream.flush()

    def add(self, value: np.ndarray) -> tuple[int, int]:
        """Store an array's bytes; returns offset and length."""
        data = np.ascontiguousarray(value)
        key = hashlib.sha256(data.view(np.uint8).reshape(-1).data if data.size else b"").digest()
        if key not in self._places:
            if self._stream is None:
                self._stream = self.path.open("wb")
            self._stream.write(b"\0" * (-self._stream.tell() % _ALIGNMENT))
            self._places[key] = (self._stream.tell(), data.nbytes)
            data.tofile(self._stream)
        return self._places[key]


def write_graph(traced: TracedGraph, path: Path, weights: WeightFile | None = None) -> None:
    """Write a graph. With `weights`, constants over a kilobyte go there; the file must lie beside the graph."""
    model = onnx.ModelProto.FromString(traced.model.SerializeToString())
    for name, value in traced.constants.items():
        if weights is None or value.nbytes <= _INLINE_BYTES:
            model.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
            )
            continue
        offset, length = weights.add(value)
        item = model.graph.initializer.add()
        item.name = name
        item.data_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        item.dims.extend(value.shape)
        item.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (("location", weights.path.name), ("offset", str(offset)), ("length", str(length))):
            entry = item.external_data.add()
            entry.key, entry.value = key, text
    path.write_bytes(model.SerializeToString(deterministic=True))


def total_bytes(traced: TracedGraph) -> int:
    return sum(value.nbytes for value in traced.constants.values())
