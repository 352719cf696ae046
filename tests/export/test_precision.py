"""Precisions below 16 bits: what is stored, what it costs, what is refused, and that a broken graph is caught."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import TINY, export
from onnx import numpy_helper

from deixis.bundle import Bundle
from deixis.errors import ExportError
from deixis_export import export as exporting
from deixis_export.bundle_parts import ExportOptions
from deixis_export.graph_spec import run_torch
from deixis_export.graphs_glamm import empty_caches, language_step_spec
from deixis_export.presets import random_model, random_tokenizer
from deixis_export.quantize import BLOCK, pack_blocks, quantize_blocks
from deixis_export.session import GraphSession, relative_error
from deixis_export.trace import TracedGraph
from deixis_export.weights import PrecisionName, round_to_fp16, store_fp16, write_graph
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.llama import Llama

TEXT = ("text_encoder", "decoder_step", "decoder_pass")


def _graph(bundle: Bundle, role: str) -> onnx.GraphProto:
    return onnx.load(bundle.file(bundle.manifest.graphs[role].file)).graph


def _unpacked(packed: np.ndarray, scales: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """The weight [K, N] that MatMulNBits sees."""
    values = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], BLOCK)
    whole = (values.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return whole.reshape(len(whole), -1).T[:rows]


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_within_half_a_step_of_the_weight(bits: int) -> None:
    weight = np.random.default_rng(0).normal(size=(70, 48)).astype(np.float32)  # the last block is not full
    packed, scales = pack_blocks(weight, bits)
    assert packed.shape == (48, 3, BLOCK * bits // 8) and scales.shape == (48, 3)
    error = np.abs(_unpacked(packed, scales, bits, 70) - weight)
    steps = np.repeat(np.abs(scales), BLOCK, axis=1).T[:70]
    # 2 ** bits levels cannot lie evenly on both sides of zero: the far end of one side is a whole step off.
    assert (error <= steps * 1.01).all() and np.mean(error <= steps * 0.51) > 0.95


@pytest.fixture(scope="module")
def w8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tmp_path_factory.mktemp("precision") / "w8", "w8")


def test_w8_is_for_text_and_leaves_the_rest_in_fp16(w8: Bundle) -> None:
    for role, graph in w8.manifest.graphs.items():
        stored = "w8" if role in TEXT else "fp16"
        assert graph.precision.weights == stored, role
        assert graph.precision.compute == ("int8" if role in TEXT else "fp32")
        blocks = [node for node in _graph(w8, role).node if node.op_type == "MatMulNBits"]
        assert bool(blocks) == (role in TEXT)
        drift = w8.manifest.parity[f"drift/{role}"]
        assert 0 < drift.error < drift.tolerance <= 0.1
    found = {item.name: tuple(item.dims) for item in _graph(w8, "decoder_step").initializer}
    weights = [shape for shape in found.values() if len(shape) == 2 and shape[0] * shape[1] > 2048]
    assert weights == [(TINY.t5.vocab, TINY.t5.emb)], "only the embedding table is left above 8 bits"


def test_weights_of_step_and_pass_are_stored_once(w8: Bundle) -> None:
    folder = w8.path / "graphs"
    assert w8.manifest.graphs["decoder_step"].external == w8.manifest.graphs["decoder_pass"].external

    def places(role: str) -> set[tuple[str, ...]]:
        graph = onnx.load(folder / f"{role}.onnx", load_external_data=False).graph
        external = [item for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
        return {tuple(entry.value for entry in item.external_data) for item in external}

    assert places("decoder_pass") <= places("decoder_step")
    size = (folder / "decoder.data").stat().st_size
    assert size < 1.2 * sum(int(length) for _, _, length in places("decoder_step"))


def test_w4_is_smaller_and_says_how_far_it_is_off(tmp_path: Path, w8: Bundle) -> None:
    w4 = export(tmp_path / "w4", "w4")
    name = "graphs/decoder.data"
    assert w4.manifest.files[name].bytes < w8.manifest.files[name].bytes
    for role in TEXT:
        assert w4.manifest.parity[f"drift/{role}"].error > 2 * w8.manifest.parity[f"drift/{role}"].error


def test_one_graph_may_differ_from_those_that_share_its_weights(tmp_path: Path) -> None:
    options = ExportOptions("fp16", precision_of={"decoder_step": "w8"})
    bundle = exporting.export_bundle(
        random_model(TINY), tmp_path / "b", tokenizer_json=random_tokenizer(TINY.t5.vocab), options=options
    )
    stored = {role: graph.precision.weights for role, graph in bundle.manifest.graphs.items()}
    assert stored.pop("decoder_step") == "w8" and set(stored.values()) == {"fp16"}


@pytest.mark.parametrize("role", ["sam_encoder", "mask_decoder"])
def test_blocks_are_refused_for_other_graphs(tmp_path: Path, role: str) -> None:
    options = ExportOptions("fp16", precision_of={role: "w4"})
    with pytest.raises(ExportError, match=f"w4 is for graphs of text .*store {role} in fp16 or int8"):
        exporting.export_bundle(random_model(TINY), tmp_path / "b", tokenizer_json="", options=options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_blocks_that_are_wrong_fail_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    def shifted(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
        packed, scales = pack_blocks(weight, bits)
        return packed, np.roll(scales, 1, axis=0) * 2  # the scales of other columns

    monkeypatch.setattr("deixis_export.quantize.pack_blocks", shifted)
    with pytest.raises(ExportError, match="text_encoder differs"):
        export(tmp_path / "bundle", precision)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["int8", "w8"])
def test_a_tied_head_is_quantised_and_its_table_kept(tmp_path: Path, precision: PrecisionName) -> None:
    config = dataclasses.replace(GLAMM_PRESETS["glamm-tiny"].llama, tied=True)
    torch.manual_seed(0)
    llama = Llama(config).eval()
    round_to_fp16(llama, "llama")
    spec = language_step_spec(config)
    case = {tensor.name: torch.zeros(2, 5, dtype=torch.int64) for tensor in spec.inputs[:1]}
    case |= {tensor.name: torch.full((2,), -1) for tensor in spec.inputs if tensor.name == "banned"}
    case |= {"position": torch.tensor([1]), **empty_caches(config, 2, 12)}
    exporting.trace_and_write(spec, llama, case, tmp_path, None, precision)
    expected = run_torch(spec, llama, case)["logits"].numpy()
    with GraphSession(tmp_path / "decoder_step.onnx") as session:
        logits = session.run({name: value.numpy() for name, value in case.items()})["logits"]
    assert 0 < relative_error({"x": logits}, {"x": expected}) < 0.1
    graph = onnx.load(tmp_path / "decoder_step.onnx").graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tables = [stored[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in stored]
    assert [table.shape for table in tables if table.dtype == np.float16] == [(config.vocab, config.emb)]
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert not [node for node in products if node.input[1] in stored and stored[node.input[1]].nbytes >= 2048]
    assert not [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in stored]


def test_looked_up_rows_are_cast_not_the_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(64, 32)).astype(np.float16).astype(np.float32)
    make = onnx.helper.make_node
    nodes = [make("Gather", ["table", "ids"], ["rows"]), make("MatMul", ["rows", "w"], ["out"], name="head")]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [3])],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [3, 64])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    traced = TracedGraph(model, {"table": table, "w": np.ascontiguousarray(table.T)})
    store_fp16(traced)
    write_graph(traced, tmp_path / "g.onnx")
    kinds = [node.op_type for node in traced.model.graph.node]
    assert kinds == ["Cast", "Gather", "Cast", "MatMul"] and "table" not in traced.model.graph.node[0].input
    ids = np.array([5, 0, 63])
    with GraphSession(tmp_path / "g.onnx") as session:
        np.testing.assert_allclose(session.run({"ids": ids})["out"], table[ids] @ table.T, atol=1e-4)
    before = [node.name for node in traced.model.graph.node]
    quantize_blocks(traced, 8)  # its weight is fp16 already: there is nothing of float32 to take
    assert [node.name for node in traced.model.graph.node] == before
