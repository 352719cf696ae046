"""From a PyTorch module to an ONNX graph with named tensors, its constants folded.

TorchScript's exporter at opset 17 is used: fast, readable by every onnxruntime and TensorRT in use, and onnxruntime
fuses what it writes. Parameters are traced as inputs, so that the protobuf stays small however large the model is; they
are attached from the module afterwards, and every later stage handles them as arrays beside the graph.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from deixis_export.graph_spec import GraphSpec, M
from deixis_export.symbolic import own_symbolics

OPSET = 17

# A folded node may not make its inputs much larger: spreading a small table over all pairs of positions is the engine's
# to do.
_MAX_GROWTH = 2
_ALWAYS_FOLD_BYTES = 16 << 10


@dataclass
class TracedGraph:
    """A graph whose initializers live beside it: `model.graph.initializer` is empty until the graph is written."""

    model: onnx.ModelProto
    constants: dict[str, np.ndarray]


def trace(spec: GraphSpec[M], model: M, inputs: dict[str, Tensor]) -> TracedGraph:
    """Trace a graph on example inputs, whose dynamic sizes should differ from 1 and from each other."""
    module = spec.module(model).eval()  # not optional: the exporter restores the outer module's mode to all children
    traced = traced_export(spec, module, inputs)
    constants = detach_constants(traced, module.state_dict(), keep={t.name for t in (*spec.inputs, *spec.outputs)})
    graph = TracedGraph(traced, constants)
    fold_constants(graph)
    set_border(traced, spec)
    return graph


def traced_export(spec: GraphSpec[M], module: nn.Module, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The exporter's graph of a module that computes `spec`; its parameters are inputs, as the module names them."""
    tensors = (*spec.inputs, *spec.outputs)
    noise = logging.getLogger("torch.onnx")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            own_symbolics(OPSET),
            tempfile.TemporaryDirectory(prefix="deixis-trace-") as folder,
        ):
            path = Path(folder) / "graph.onnx"
            # Tracer warnings are about sizes taken as constants; the dynamic ones are checked with other sizes
            # afterwards.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(inputs[tensor.name] for tensor in spec.inputs),
                path,
                dynamo=False,
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_axes={
                    tensor.name: {axis: dim for axis, dim in enumerate(tensor.dims) if isinstance(dim, str)}
                    for tensor in tensors
                },
            )
            return onnx.load(path)
    finally:
        noise.setLevel(level)


def detach_constants(model: onnx.ModelProto, state: Mapping[str, Tensor], keep: set[str]) -> dict[str, np.ndarray]:
    """Take parameters (graph inputs, but for `keep`), initializers and Constant nodes out of the graph, as arrays."""
    graph = model.graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    del graph.initializer[:]
    wanted = []
    for item in graph.input:
        if item.name in keep:
            wanted.append(item)
        else:
            constants[item.name] = state[item.name].detach().cpu().numpy()
    del graph.input[:]
    graph.input.extend(wanted)
    nodes = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        else:
            nodes.append(node)
    _replace_nodes(graph, nodes)
    return constants


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def fold_constants(traced: TracedGraph) -> None:
    """Evaluate what depends on constants alone, so that no table is computed from parameters in a graph."""
    graph, constants = traced.model.graph, traced.constants
    outputs = {item.name for item in graph.output}
    looked_up = {
        node.input[0]
        for node in graph.node
        if node.op_type == "Gather"
        and node.input[0] in constants
        and constants[node.input[0]].nbytes > _ALWAYS_FOLD_BYTES
    }
    kept = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            constants[node.output[0]] = constants[node.input[0]]
            continue
        constant = all(name in constants for name in node.input if name) and not outputs & set(node.output)
        if node.op_type == "Transpose" and node.input[0] in looked_up:
            constant = False  # a table that is also the vocabulary head is stored once; engines fold it while loading
        if not constant or any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            kept.append(node)
            continue
        values = _evaluate(node, [constants[name] if name else None for name in node.input])
        before = sum(constants[name].nbytes for name in node.input if name)
        after = sum(value.nbytes for value in values)
        if after > max(_ALWAYS_FOLD_BYTES, _MAX_GROWTH * before):
            kept.append(node)
            continue
        constants.update(zip(node.output, values, strict=True))
    _replace_nodes(graph, kept)
    drop_unused(traced)


def _evaluate(node: onnx.NodeProto, inputs: list[np.ndarray | None]) -> list[np.ndarray]:
    if node.op_type == "Transpose" and inputs[0] is not None:  # a view: large matrices are copied when they are written
        axes = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
        return [inputs[0].transpose(axes[0] if axes else None)]
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    single = onnx.NodeProto.FromString(node.SerializeToString())
    del single.input[:]
    single.input.extend(names)
    graph = onnx.helper.make_graph(
        [single],
        "fold",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in zip(names, inputs, strict=True)
            if value is not None
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, feeds)]


def drop_unused(traced: TracedGraph) -> None:
    """Remove nodes and constants that no output depends on, and let equal constants be one."""
    graph, constants = traced.model.graph, traced.constants
    needed = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    kept.reverse()
    _replace_nodes(graph, kept)
    for name in set(constants) - needed:
        del constants[name]
    _merge_equal(traced)


def _merge_equal(traced: TracedGraph) -> None:
    """Tables repeat in every layer; keep one of each.

    Transposed weights are left alone: they are views, and never equal.
    """
    seen: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    alias: dict[str, str] = {}
    for name, value in sorted(traced.constants.items()):
        if value.flags.c_contiguous:
            digest = hashlib.sha256(value.reshape(-1).view(np.uint8).data).digest() if value.size else b""
            alias[name] = seen.setdefault((str(value.dtype), value.shape, digest), name)
    for node in traced.model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = alias.get(name, name)
    for name, kept in alias.items():
        if name != kept:
            del traced.constants[name]


def set_border(model: onnx.ModelProto, spec: GraphSpec[Any]) -> None:
    """State shapes as the contract does; the tracer infers some output dimensions under names of its own."""
    graph = model.graph
    for items, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        del items[:]
        for tensor in tensors:
            kind = onnx.TensorProto.INT64 if tensor.dtype == "int64" else onnx.TensorProto.FLOAT
            items.append(onnx.helper.make_tensor_value_info(tensor.name, kind, tensor.dims))
    del graph.value_info[:]
    graph.name = spec.role
    model.producer_name, model.producer_version, model.doc_string = "deixis", "", ""
    border = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    short: dict[str, str] = {}
    for node in graph.node:
        node.doc_string = ""
        # Node names say where a node comes from; repeating that in every tensor doubles the size of a small graph.
        for name in node.output:
            if name and name not in border:
                short[name] = f"t{len(short)}"
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]
