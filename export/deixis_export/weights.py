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

from deixis_export.trace import TracedGraph, drop_unused

PrecisionName = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "fp16", "int8")

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
    """Keep constants that fp16 holds exactly in fp16, with a Cast to float32 that engines fold while loading."""
    casts = []
    for name in sorted(traced.constants):
        value = traced.constants[name]
        if value.dtype != np.float32 or not stored_low(value.shape, value.nbytes):
            continue
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), value):
            continue  # a table made from rounded parameters; it is small
        del traced.constants[name]
        traced.constants[f"{name}.fp16"] = half
        casts.append(onnx.helper.make_node("Cast", [f"{name}.fp16"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *traced.model.graph.node]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del traced.model.graph.node[:]
    traced.model.graph.node.extend(copies)


def quantize_int8(traced: TracedGraph, work: Path) -> None:
    """Weights of MatMul to int8 per output channel, activations quantised while running (onnxruntime's dynamic scheme).

    Only plain matrices of some size are taken. `work` is a directory for temporary files.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def taken(node: onnx.NodeProto) -> bool:
        weight = traced.constants.get(node.input[1]) if node.op_type == "MatMul" else None
        return weight is not None and weight.ndim == 2 and stored_low(weight.shape, weight.nbytes)

    names = [node.name for node in traced.model.graph.node if taken(node)]
    if not names:
        return
    source, target = work / "fp32.onnx", work / "int8.onnx"
    # Says that shapes are known and silences the advice to run a preprocessing step.
    onnx.helper.set_model_props(traced.model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with WeightFile(work / "fp32.data") as weights:
        write_graph(traced, source, weights)
    quantize_dynamic(
        source,
        target,
        nodes_to_quantize=names,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    quantised = onnx.load(target)
    traced.constants = {item.name: numpy_helper.to_array(item) for item in quantised.graph.initializer}
    del quantised.graph.initializer[:]
    del quantised.metadata_props[:]
    traced.model = quantised
    for path in work.iterdir():
        path.unlink()
    drop_unused(traced)


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
