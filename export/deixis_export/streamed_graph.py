"""A graph traced from a shell, whose large weights go from their source into its file one after the other.

Large parameters that a graph uses as they are, or transposed, are never in memory together. What is folded into tables
(relative positions, the code of pixel positions) is small, and is folded from real values as in `trace`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from deixis_export.graph_spec import GraphSpec, M
from deixis_export.shells import blank, without_arithmetic
from deixis_export.sources import WeightSource
from deixis_export.trace import TracedGraph, detach_constants, fold_constants, set_border, traced_export
from deixis_export.weights import WeightFile, store_fp16, stored_low, write_graph

STREAM_FROM_BYTES = 1 << 20
_MODEL = "model."  # how a graph's view names the model that it holds
_SIZES = {"B": 2, "R": 2, "S": 5, "T": 12, "V": 7, "K": 3, "M": 4}  # differ from each other where they meet


@dataclass(frozen=True)
class Placed:
    """A parameter as a graph uses it: by name, its axes in the order `axes` (None: as they are)."""

    parameter: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None


@dataclass
class StreamedGraph:
    """`traced` has the small constants; `weights` are large ones by their names in the graph."""

    traced: TracedGraph
    weights: dict[str, Placed]


def example_inputs(spec: GraphSpec[M]) -> dict[str, Tensor]:
    """Inputs to trace a shell with: no numbers, positions and indices 0."""
    inputs = {}
    for tensor in spec.inputs:
        shape = tuple(_SIZES[dim] if isinstance(dim, str) else dim for dim in tensor.dims)
        inputs[tensor.name] = torch.zeros(shape, dtype=torch.int64) if tensor.dtype == "int64" else blank(shape)
    return inputs


def trace_shell(
    spec: GraphSpec[M], shell: M, source: WeightSource, stream_from: int = STREAM_FROM_BYTES
) -> StreamedGraph:
    """Trace a graph of a shell. Parameters of at least `stream_from` bytes are left at their source where possible."""
    module = spec.module(shell).eval()
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    model = traced_export(spec, without_arithmetic(module), example_inputs(spec))
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    large = {
        item.name
        for item in model.graph.input
        if item.name not in names and 4 * int(np.prod(shapes[item.name])) >= stream_from
    }
    streamed = _used_as_they_are(model.graph, large)
    constants = detach_constants(model, _State(source, shapes), keep=names | streamed)
    traced = TracedGraph(model, constants)
    fold_constants(traced)
    weights = {_short(name): Placed(_short(name), shapes[name]) for name in sorted(streamed)}
    _rename_inputs(model.graph, {name: _short(name) for name in streamed})
    _take_transposes(model.graph, weights)
    set_border(model, spec)
    used = {name for node in model.graph.node for name in node.input}
    return StreamedGraph(traced, {name: placed for name, placed in weights.items() if name in used})


def _short(name: str) -> str:
    return name.removeprefix(_MODEL)


class _State(Mapping[str, Tensor]):
    """The state of a graph's view of a model, fetched when it is asked for."""

    def __init__(self, source: WeightSource, shapes: dict[str, tuple[int, ...]]) -> None:
        self._source, self._shapes = source, shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._source(_short(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _used_as_they_are(graph: onnx.GraphProto, large: set[str]) -> set[str]:
    """Those of the `large` parameters that no node computes a constant from, but for transposing them."""
    border = {item.name for item in graph.input}
    # What a constant is made from; absent: it depends on inputs of the graph.
    origins: dict[str, set[str]] = {name: {name} for name in large}
    origins |= {item.name: set() for item in graph.initializer}
    computed: set[str] = set()
    for node in graph.node:
        given = [name for name in node.input if name]
        if any(name not in origins and name in border for name in given) or not all(name in origins for name in given):
            continue
        made_from = set().union(*(origins[name] for name in given))
        if node.op_type not in ("Transpose", "Identity"):
            computed |= made_from
        origins |= dict.fromkeys(node.output, made_from)
    return large - computed


def _rename_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _take_transposes(graph: onnx.GraphProto, weights: dict[str, Placed]) -> None:
    """Store transposed what the graph would transpose, but for tables that are also looked up: they are stored once."""
    looked_up = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    kept: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        source = weights.get(renamed.get(node.input[0], node.input[0])) if len(node.input) == 1 else None
        shared = node.op_type == "Transpose" and node.input[0] in looked_up
        if source is None or shared or node.op_type not in ("Transpose", "Identity"):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        name = renamed.get(node.input[0], node.input[0])
        if node.op_type == "Transpose":
            axes = tuple(node.attribute[0].ints) if node.attribute else tuple(reversed(range(len(source.shape))))
            if source.axes is not None:
                axes = tuple(source.axes[axis] for axis in axes)
            name = f"{source.parameter}.T" if len(axes) == 2 else f"{source.parameter}.{''.join(map(str, axes))}"
            shape = tuple(source.shape[axis] for axis in axes) if source.axes is None else source.shape
            weights[name] = Placed(source.parameter, shape, axes)
        renamed[node.output[0]] = name
    del graph.node[:]
    graph.node.extend(kept)
    _rename_inputs(graph, renamed)


def write_streamed(
    graph: StreamedGraph, path: Path, source: WeightSource, *, half: bool, weights: WeightFile | None = None
) -> Path:
    """Write a graph and, beside it, its weights, fetched one at a time. Returns the file of the weights.

    `half` stores matrices in fp16 with a Cast, as `store_fp16` does; `source` must then give values that fp16 holds.
    """
    traced = graph.traced
    if half:
        store_fp16(traced)
    data = path.with_suffix(".data")
    model, casts = onnx.ModelProto.FromString(traced.model.SerializeToString()), []
    with WeightFile(data) as file:
        for name, placed in graph.weights.items():
            value = source(placed.parameter).numpy()
            low = half and stored_low(value.shape, value.nbytes)
            if low:
                value = value.astype(np.float16)
                casts.append(onnx.helper.make_node("Cast", [f"{name}.fp16"], [name], to=onnx.TensorProto.FLOAT))
            if placed.axes is not None:
                value = value.transpose(placed.axes)
            offset, length = file.add(value)
            item = model.graph.initializer.add(
                name=f"{name}.fp16" if low else name,
                data_type=onnx.helper.np_dtype_to_tensor_dtype(value.dtype),
                dims=value.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, text in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
                item.external_data.add(key=key, value=text)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend([*casts, *nodes])
        write_graph(TracedGraph(model, traced.constants), path, file)
    return data


def stream(
    spec: GraphSpec[M],
    tracing: M,
    values: WeightSource,
    path: Path,
    *,
    half: bool,
    stream_from: int = STREAM_FROM_BYTES,
) -> None:
    """Write one graph of a shell to `path`, and its weights beside it. `half`: matrices in fp16, exact in `values`."""
    write_streamed(trace_shell(spec, tracing, values, stream_from), path, values, half=half)
