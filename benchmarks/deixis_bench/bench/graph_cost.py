"""What a run of a graph has to do at least: bytes of weights that it reads, and operations of its products.

Both are counted from what onnxruntime executes of the graph on the inputs it got in the reference request, so fused
operators and real sizes count, and weights that were widened at load count wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.bundle import Bundle
from deixis.timing import Span, TimedEngine
from deixis_bench.bench import ort_probe
from deixis_bench.bench.rounds import PROMPT, STEP

Shape = Sequence[int]
Arrays = Mapping[str, NDArray[np.generic]]

PRODUCTS = (
    "MatMul", "FusedMatMul", "TransposeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "MatMulNBits", "QLinearMatMul", "MatMulBnb4",
)  # fmt: skip
GEMMS = ("Gemm", "FusedGemm")
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv")
ATTENTIONS = (
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention",
)  # fmt: skip
LOOKUPS = ("Gather", "GatherBlockQuantized", "GatherND", "GatherElements")  # read rows of a table, not all of it


@dataclass(frozen=True)
class GraphCost:
    """Of one run. bytes_read: of weights, as they are in memory. flop: 2 per multiplication with addition, of matrix
    products, convolutions and attention alone; all else is small beside them and not counted. int8: most of these
    operations multiply integers of 8 bits.
    """

    bytes_read: int
    flop: int
    int8: bool = False


class Watched(TimedEngine):
    """An engine that keeps a copy of the first inputs of every stage."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, list[Span]())
        self.inputs: dict[str, dict[str, NDArray[np.generic]]] = {}

    def run(self, role: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        self._keep(role, inputs)
        return super().run(role, inputs)

    def bind(self, role: str, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        run = super().bind(role, inputs, outputs)

        def kept() -> None:
            self._keep(role, inputs)
            run()

        return kept

    def _keep(self, role: str, inputs: Arrays) -> None:
        # the decoder's wide run, which reads a prompt, is a stage of its own
        stage = PROMPT if role == STEP and inputs["ids"].shape[1] > 1 else role
        if stage not in self.inputs:
            self.inputs[stage] = {name: np.array(array) for name, array in inputs.items()}


def watch(model: deixis.Model, run: Callable[[], object]) -> dict[str, dict[str, NDArray[np.generic]]]:
    """Inputs by stage and logical name of the graphs that a call runs, those of the first run."""
    pipeline = model.pipeline
    engine = pipeline.engine
    watched = Watched(engine)
    pipeline.engine = watched
    try:
        run()
    finally:
        pipeline.engine = engine
    return watched.inputs


def cost_of(bundle: Bundle, role: str, inputs: Arrays) -> GraphCost:
    """What a run on these inputs costs. Raises ProbeError."""
    graph = bundle.manifest.graphs[role]
    given = {graph.inputs[name].tensor: array for name, array in inputs.items()}
    return cost_of_operators(ort_probe.profile(bundle.file(graph.file), given))


def cost_of_operators(operators: Sequence[Mapping[str, Any]]) -> GraphCost:
    """See `ort_probe.profile` for what an operator is."""
    total = of_int8 = bytes_read = 0
    for operator in operators:
        flop = operations(operator)
        total += flop
        if "Integer" in operator["op_name"] or operator["op_name"] == "DynamicQuantizeMatMul":
            of_int8 += flop
        weights = int(operator["parameter_size"])
        bytes_read += min(weights, int(operator["output_size"])) if operator["op_name"] in LOOKUPS else weights
    return GraphCost(bytes_read, total, 2 * of_int8 > total)


def operations(operator: Mapping[str, Any]) -> int:
    """Of one operator; 0 for those that are not counted."""
    name, inputs, outputs = operator["op_name"], _shapes(operator, "input"), _shapes(operator, "output")
    if name in PRODUCTS:
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if name in GEMMS:
        return 2 * math.prod(inputs[0]) * math.prod(outputs[0]) // outputs[0][0]  # whichever way they are turned
    if name in CONVOLUTIONS:
        kernel = next(shape for shape in inputs[1:] if len(shape) == len(outputs[0]))
        return 2 * math.prod(outputs[0]) * math.prod(kernel[1:])
    if name == "ConvTranspose":
        return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if name in ATTENTIONS:
        seen = max(
            (shape[2] for shape in [*inputs, *outputs] if len(shape) == 4), default=inputs[min(1, len(inputs) - 1)][1]
        )
        return 4 * math.prod(outputs[0]) * seen
    return 0


def _shapes(operator: Mapping[str, Any], side: str) -> list[Shape]:
    return [shape for tensor in operator[f"{side}_type_shape"] for shape in tensor.values()]


def weight_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of every graph's weights, as its files store them. Graphs that share weights count them each."""
    return {role: ort_probe.stored_bytes(Path(bundle.file(g.file))) for role, g in bundle.manifest.graphs.items()}
