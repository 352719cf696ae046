"""Where a graph must stay in fp32 when an engine computes the rest of it in half precision.

fp16 ends at 65504. Feed-forward outputs and the residual stream of T5, squares inside norms, and attention scores of
some image encoders go beyond, and what comes out is infinite or NaN. Such places are found by running: the largest
value of every tensor is measured on the example requests, what comes near the end of fp16 is kept in fp32 together with
the nodes that write or read it, and the graph is run with everything else in fp16 to see that this is enough.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.trace import TracedGraph
from deixis_export.weights import EXTERNAL_LIMIT_BYTES, WeightFile, total_bytes, write_graph

# A tensor above this on the example requests stays in fp32: other requests may have values four times as large.
HOT = 2.0**14
# How far half precision may move a graph whose islands are in fp32.
HALF_TOLERANCE = 5e-2
WHOLE_GRAPH = ("",)  # every name begins with it
# Constants beyond fp16 are masks, added to scores before a softmax. In fp16 they are half its range, which hides a
# position as well and, where all are hidden, leaves nothing of the scores either. For the peaks they are made small.
_MASK_HALF, _MASK_PEAK = 2.0**15, 2.0**11
_FP16_MAX = 65504.0
_FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Islands:
    """nodes: by name, those that stay in fp32; `WHOLE_GRAPH` where islands do not help.

    error: of the graph in half precision but for them, against fp32; of the graph without islands in `bare`. Infinite
    for values that are not finite.
    """

    nodes: tuple[str, ...]
    error: float
    bare: float


def find_islands(traced: TracedGraph, cases: Sequence[Arrays], expected: Sequence[Arrays]) -> Islands:
    """The nodes of a graph in float32 that half precision would break. `expected` are its outputs by case, in fp32.

    Raises ExportError where onnxruntime cannot run the graph.
    """
    kinds = _float_tensors(traced)
    masked = _masked(traced, _MASK_HALF)
    with tempfile.TemporaryDirectory(prefix="deixis-islands-") as name:
        folder = Path(name)

        def error(graph: TracedGraph, hot: set[str]) -> float:
            found = _run(in_half(graph, kinds, hot), cases, folder)
            return max(relative_error(a, e) for a, e in zip(found, expected, strict=True))

        def found(graph: TracedGraph, like: TracedGraph) -> Islands | None:
            hot = _hot(like, kinds, cases, folder)
            kept = error(graph, hot) if hot else bare
            nodes = tuple(node.name for node in graph.model.graph.node if _touches(node, hot))
            return Islands(nodes, kept, bare) if kept <= HALF_TOLERANCE else None

        bare = error(masked, set())
        # Where hidden positions matter (rows whose every position is hidden), masks stay in fp32 as they are.
        small = _masked(traced, _MASK_PEAK)
        return found(masked, small) or found(traced, traced) or Islands(WHOLE_GRAPH, 0.0, bare)


def _masked(traced: TracedGraph, mask: float) -> TracedGraph:
    """The graph with constants beyond fp16 replaced by `mask` of their sign."""

    def limited(value: np.ndarray) -> np.ndarray:
        if value.dtype != np.float32 or not _beyond(value):
            return value
        return np.where(np.abs(value) > _FP16_MAX, np.copysign(np.float32(mask), value), value).astype(np.float32)

    return TracedGraph(traced.model, {name: limited(value) for name, value in traced.constants.items()})


def _beyond(value: np.ndarray) -> bool:
    return bool(value.size) and not np.abs(value).max() <= _FP16_MAX


def _float_tensors(traced: TracedGraph) -> set[str]:
    """Names of all tensors of float32, constants and inputs included."""
    model = onnx.ModelProto.FromString(traced.model.SerializeToString())
    for name, value in traced.constants.items():  # types are enough
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    graph = onnx.shape_inference.infer_shapes(model).graph
    items = (*graph.input, *graph.output, *graph.value_info)
    return {item.name for item in items if item.type.tensor_type.elem_type == _FLOAT}


def _touches(node: onnx.NodeProto, hot: set[str]) -> bool:
    return not hot.isdisjoint(node.input) or not hot.isdisjoint(node.output)


def _hot(traced: TracedGraph, floats: set[str], cases: Sequence[Arrays], folder: Path) -> set[str]:
    """Float tensors and constants whose largest magnitude over the cases is near the end of fp16, or not finite."""
    model = onnx.ModelProto.FromString(traced.model.SerializeToString())
    graph = model.graph
    watched = [name for node in traced.model.graph.node for name in node.output if name in floats]
    constants = {**traced.constants, "peak.flat": np.array([-1]), "peak.zero": np.zeros(1, np.float32)}
    for i, name in enumerate(watched):  # a tensor may be empty: a zero is put behind its values
        make = onnx.helper.make_node
        graph.node.append(make("Abs", [name], [f"abs.{i}"]))
        graph.node.append(make("Reshape", [f"abs.{i}", "peak.flat"], [f"flat.{i}"]))
        graph.node.append(make("Concat", [f"flat.{i}", "peak.zero"], [f"some.{i}"], axis=0))
        graph.node.append(make("ReduceMax", [f"some.{i}"], [f"peak.{i}"], keepdims=0))
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(f"peak.{i}", _FLOAT, ()) for i in range(len(watched)))
    hot = {
        watched[int(name.removeprefix("peak."))]
        for values in _run(TracedGraph(model, constants), cases, folder)
        for name, value in values.items()
        if not value <= HOT
    }
    return hot | {name for name, value in traced.constants.items() if name in floats and _beyond(value)}


def in_half(traced: TracedGraph, floats: set[str], hot: set[str]) -> TracedGraph:
    """The graph as half precision computes it: every float tensor is rounded to fp16 where it is written, and constants
    are. `hot` tensors are not, and constants of the nodes at them are not; sums inside of an operator are in float32.
    """
    constants = {name: value for name, value in traced.constants.items() if name not in floats}
    nodes: list[onnx.NodeProto] = []

    def round_(source: str, target: str) -> None:
        nodes.append(onnx.helper.make_node("Cast", [source], [f"{target}.half"], to=onnx.TensorProto.FLOAT16))
        nodes.append(onnx.helper.make_node("Cast", [f"{target}.half"], [target], to=_FLOAT))

    def read(name: str, single: bool) -> str:
        if name in given:
            return given[name]
        if name not in traced.constants or name not in floats:
            return name
        value, found = traced.constants[name], f"{name}.{'single' if single else 'rounded'}"
        constants[found] = value if single else value.astype(np.float16).astype(np.float32)
        return found

    given = {item.name: f"{item.name}.rounded" for item in traced.model.graph.input if item.name in floats}
    for name, rounded in given.items():
        round_(name, rounded)
    for node in traced.model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [read(name, _touches(node, hot)) for name in node.input]
        written = [name for name in node.output if name in floats and name not in hot]
        copy.output[:] = [f"{name}.wide" if name in written else name for name in node.output]
        nodes.append(copy)
        for name in written:
            round_(f"{name}.wide", name)
    model = onnx.ModelProto.FromString(traced.model.SerializeToString())
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return TracedGraph(model, constants)


def _run(traced: TracedGraph, cases: Sequence[Arrays], folder: Path) -> list[Arrays]:
    path = folder / "graph.onnx"
    with WeightFile(folder / "graph.data") as weights:
        write_graph(traced, path, weights if total_bytes(traced) >= EXTERNAL_LIMIT_BYTES else None)
        weights.flush()
        with GraphSession(path) as session:
            return [session.run(case) for case in cases]
