"""Half precision that breaks a graph is caught: the places are found, named in the manifest, and enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from exporting import TINY

from deixis_export import islands
from deixis_export.bundle_parts import to_numpy
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.families import PIXELLLM
from deixis_export.graph_spec import run_torch
from deixis_export.islands import HALF_TOLERANCE, HOT, WHOLE_GRAPH, Islands, find_islands, in_half
from deixis_export.presets import random_model, random_tokenizer
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.trace import TracedGraph, trace
from deixis_export.weights import write_graph
from deixis_train.models.pixelllm import PixelLLM

WO = "/encoder/layers.0/mlp/wo/MatMul"


def _overflowing() -> PixelLLM:
    """A model in whose text encoder the output of a feed-forward part is beyond fp16, as T5's are."""
    model = random_model(TINY)
    with torch.no_grad():
        model.text.encoder.layers[0].mlp.wo.weight *= 3e4  # type: ignore[union-attr]
        model.text.encoder.layers[0].mlp.wi_1.weight *= 30  # type: ignore[union-attr]
        PIXELLLM.fold(model)
    return model


def _found(model: PixelLLM, role: str) -> tuple[Islands, TracedGraph, list[Arrays], list[Arrays]]:
    spec, cases = PIXELLLM.graph_specs(model)[role], PIXELLLM.cases(model, 0)
    inputs = [to_numpy(case[role]) for case in cases]
    expected = [to_numpy(run_torch(spec, model, case[role])) for case in cases]
    traced = trace(spec, model, cases[1][role])
    return find_islands(traced, inputs, expected), traced, inputs, expected


def test_a_feed_forward_output_beyond_fp16_is_kept_in_fp32() -> None:
    found, _, _, expected = _found(_overflowing(), "text_encoder")
    assert np.isfinite(expected[0]["cross_key.0"]).all(), "in fp32 the model works"
    assert found.bare > HALF_TOLERANCE, "in half precision it does not"
    assert WO in found.nodes and "/encoder/layers.0/mlp/wi_0/MatMul" not in found.nodes
    assert found.error < HALF_TOLERANCE


def test_without_that_island_the_graph_is_broken(tmp_path: Path) -> None:
    """What is kept is what breaks: the same graph with only the masks in fp32 gives values that are not finite."""
    found, traced, inputs, expected = _found(_overflowing(), "text_encoder")
    floats = islands._float_tensors(traced)
    hot = islands._hot(traced, floats, inputs, tmp_path)
    wo = next(node.output[0] for node in traced.model.graph.node if node.name == WO)
    assert wo in hot
    masks = {name for name in hot if not _written_by_layers(traced, name)}
    for kept, works in ((hot, True), (masks, False)):
        write_graph(in_half(traced, floats, kept), tmp_path / "half.onnx")
        with GraphSession(tmp_path / "half.onnx") as session:
            error = relative_error(session.run(inputs[0]), expected[0])
        assert (error < HALF_TOLERANCE) is works
    assert found.nodes != WHOLE_GRAPH


def _written_by_layers(traced: TracedGraph, name: str) -> bool:
    makers = [node for node in traced.model.graph.node if name in node.output]
    return any("mlp" in node.name or "norm" in node.name or "Add_" in node.name for node in makers)


def test_a_graph_that_fits_needs_no_island() -> None:
    found, _, _, _ = _found(random_model(TINY), "semantic_encoder")
    assert found.nodes == () and 0 < found.error == found.bare < HALF_TOLERANCE


def test_what_no_island_saves_stays_in_fp32_as_a_whole() -> None:
    """A difference of two values that fp16 cannot tell apart, far from its end."""
    make = onnx.helper.make_node
    nodes = [make("Add", ["x", "big"], ["y"], name="add"), make("Sub", ["y", "big"], ["out"], name="sub")]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", kind, [4])],
        [onnx.helper.make_tensor_value_info("out", kind, [4])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    traced = TracedGraph(model, {"big": np.array([HOT / 2], np.float32)})
    x = np.array([0.5, 1.0, 1.5, 2.0], np.float32)
    found = find_islands(traced, [{"x": x}], [{"out": x}])
    assert found.nodes == WHOLE_GRAPH and found.bare > HALF_TOLERANCE


def test_the_manifest_names_the_islands(tmp_path: Path) -> None:
    tokenizer_json = random_tokenizer(TINY.t5.vocab)
    bundle = export_bundle(_overflowing(), tmp_path / "b", tokenizer_json=tokenizer_json, options=ExportOptions("fp16"))
    graphs, parity = bundle.manifest.graphs, bundle.manifest.parity
    assert WO in graphs["text_encoder"].precision.fp32_islands
    names = {node.name for node in onnx.load(bundle.file(graphs["text_encoder"].file)).graph.node}
    assert set(graphs["text_encoder"].precision.fp32_islands) <= names
    assert graphs["semantic_encoder"].precision.fp32_islands == ()
    record = parity["half/text_encoder"]
    assert record.error <= record.tolerance == HALF_TOLERANCE
