"""Weights of MatMul below 16 bits: int8 with quantised activations for encoders, blocks of 8 or 4 bits for decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from deixis_export.trace import TracedGraph, drop_unused
from deixis_export.weights import WeightFile, stored_low, write_graph

BLOCK = 32  # weights of a column that share a scale
# Of MatMulNBits: products of int8 with activations rounded block by block. Lower levels are slower, and closer by
# little.
_ACCURACY_LEVEL = 4
_CONTRIB = "com.microsoft"


def matrices(traced: TracedGraph) -> dict[str, np.ndarray]:
    """Weights [K, N] of MatMul that are worth quantising, by the name of their node.

    A table that is also looked up is transposed in the graph (a vocabulary head tied to the embeddings); its columns
    are quantised like those of any other matrix, and the table itself stays for the look-up.
    """
    transposed = {
        node.output[0]: traced.constants[node.input[0]]
        for node in traced.model.graph.node
        if node.op_type == "Transpose" and node.input[0] in traced.constants
    }
    found = {}
    for node in traced.model.graph.node:
        if node.op_type != "MatMul":
            continue
        weight = traced.constants.get(node.input[1])
        if weight is None and node.input[1] in transposed and transposed[node.input[1]].ndim == 2:
            weight = transposed[node.input[1]].T
        if weight is not None and weight.ndim == 2 and stored_low(weight.shape, weight.nbytes):
            found[node.name] = weight
    return found


def quantize_int8(traced: TracedGraph, work: Path) -> None:
    """Weights of MatMul to int8 per output channel, activations quantised while running (onnxruntime's dynamic scheme).

    Only plain matrices of some size are taken. `work` is a directory for temporary files.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    names = list(matrices(traced))
    if not names:
        return
    _detach_tables(traced, set(names))
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


def _detach_tables(traced: TracedGraph, names: set[str]) -> None:
    """Give the named MatMuls a weight of their own where theirs is a transposed table."""
    found = matrices(traced)
    for node in traced.model.graph.node:
        if node.name in names and node.input[1] not in traced.constants:
            own = f"{node.input[1]}.transposed"
            traced.constants[own] = found[node.name]
            node.input[1] = own


def quantize_blocks(traced: TracedGraph, bits: int) -> None:
    """Weights of MatMul to 8 or 4 bits in blocks of 32 along their columns, each with a float32 scale (MatMulNBits).

    Activations enter and leave in float32. Rounding is that of onnxruntime's quantiser: symmetric, to nearest.
    """
    found = matrices(traced)
    if not found:
        return
    stored: dict[tuple[object, ...], tuple[str, str]] = {}  # two nodes may share a weight
    nodes = []
    for node in traced.model.graph.node:
        if node.name not in found:
            nodes.append(node)
            continue
        weight = found[node.name]
        key = (weight.ctypes.data, weight.shape, weight.strides)
        if key not in stored:
            packed, scales = pack_blocks(weight, bits)
            stored[key] = (f"{node.input[1]}.w{bits}", f"{node.input[1]}.scales")
            traced.constants.update(zip(stored[key], (packed, scales), strict=True))
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits",
                [node.input[0], *stored[key]],
                list(node.output),
                name=node.name,
                domain=_CONTRIB,
                K=weight.shape[0],
                N=weight.shape[1],
                bits=bits,
                block_size=BLOCK,
                accuracy_level=_ACCURACY_LEVEL,
            )
        )
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del traced.model.graph.node[:]
    traced.model.graph.node.extend(copies)
    traced.model.opset_import.append(onnx.helper.make_opsetid(_CONTRIB, 1))
    drop_unused(traced)


def pack_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [K, N] float32 as MatMulNBits takes it.

    Returns:
        packed [N, ceil(K / 32), 32 * bits / 8] uint8 and scales [N, ceil(K / 32)] float32; with zero = 2 ** (bits - 1)
        a weight is about (packed - zero) * scale.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(BLOCK, is_symmetric=True, accuracy_level=_ACCURACY_LEVEL, bits=bits)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight))
    return packed, scales
