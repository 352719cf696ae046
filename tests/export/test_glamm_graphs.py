"""The exported graphs of glamm: names, operators, dynamic sizes, caches written in place. Against the PyTorch model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime import InferenceSession

from deixis.bundle import Bundle, open_bundle
from deixis_export.cases_glamm import Sizes, make_cases
from deixis_export.graph_spec import run_torch
from deixis_export.graphs_glamm import graph_specs
from deixis_export.presets import random_parts
from deixis_export.session import GraphSession, relative_error
from deixis_export.trace import OPSET, trace
from deixis_export.weights import write_graph
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.roi_align import roi_align

CONFIG = GLAMM_PRESETS["glamm-tiny"]
LEVELS = [f"level.{i}" for i in range(4)]
ROLES = ["global_encoder", "region_encoder", "decoder_step", "grounding_encoder", "pixel_decoder"]


def _layers(suffix: str = "") -> list[str]:
    return [f"self_{part}{suffix}.{i}" for i in range(CONFIG.llama.layers) for part in ("key", "value")]


CONTRACT = {  # docs/bundle.md
    "global_encoder": (["image"], ["features", *LEVELS]),
    "region_encoder": ([*LEVELS, "boxes", "image_index"], ["regions"]),
    "decoder_step": (
        ["ids", "visual", "embed_index", "position", "banned", *_layers()],
        ["top_ids", "top_log_probs", "states", *_layers("_out"), "logits"],
    ),
    "grounding_encoder": (["image", "valid_hw"], ["sam"]),
    "pixel_decoder": (["states", "sam", "image_index"], ["masks", "iou"]),
}

# Operators that the graphs may use; all of them standard and within what TensorRT takes. No If, no Loop.
_OPERATORS = (
    "Add Cast Clip Concat ConstantOfShape Conv ConvTranspose Cos Div Equal Erf Expand Flatten Gather GatherElements "
    "Gemm GreaterOrEqual Identity InstanceNormalization LayerNormalization Less LessOrEqual LogSoftmax MatMul Mul Neg "
    "Pad Pow Range Reciprocal ReduceMean Relu Reshape Resize RoiAlign ScatterElements Shape Sigmoid Sin Slice Softmax "
    "Sqrt Squeeze Sub TopK Transpose Unsqueeze Where"
)
ALLOWED = set(_OPERATORS.split())


@pytest.fixture(scope="module")
def glamm() -> Glamm:
    """The random model of the tiny bundle, before its weights are rounded."""
    model, _ = random_parts("glamm-tiny", 7)
    assert isinstance(model, Glamm)
    return model


@pytest.fixture(scope="module")
def graphs(glamm: Glamm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every graph in fp32, traced on one size."""
    folder = tmp_path_factory.mktemp("graphs")
    cases = make_cases(glamm, Sizes(B=2, R=3, K=4, M=5, S=6, T=12, V=7, position=4))
    for role, spec in graph_specs(glamm).items():
        write_graph(trace(spec, glamm, cases[role]), folder / f"{role}.onnx")
    return {role: folder / f"{role}.onnx" for role in CONTRACT}


@pytest.fixture(scope="module")
def step(graphs: dict[str, Path]) -> GraphSession:
    return GraphSession(graphs["decoder_step"], threads=1)


def test_names_and_shapes_are_those_of_the_contract(graphs: dict[str, Path], glamm: Glamm) -> None:
    specs = graph_specs(glamm)
    assert list(specs) == list(CONTRACT)
    for role, (inputs, outputs) in CONTRACT.items():
        found = onnx.load(graphs[role]).graph
        assert [item.name for item in found.input] == inputs
        assert [item.name for item in found.output] == outputs
        described = {tensor.name: tensor.dims for tensor in (*specs[role].inputs, *specs[role].outputs)}
        for item in [*found.input, *found.output]:
            dims = tuple(d.dim_param or d.dim_value for d in item.type.tensor_type.shape.dim)
            assert dims == described[item.name], (role, item.name)


@pytest.mark.parametrize("role", ROLES)
def test_only_allowed_standard_operators(graphs: dict[str, Path], role: str) -> None:
    model = onnx.load(graphs[role])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} <= {""}
    assert {node.op_type for node in model.graph.node} <= ALLOWED
    onnx.checker.check_model(model)
    constants = {item.name for item in model.graph.initializer}
    assert not [n.name for n in model.graph.node if n.input and all(i in constants for i in n.input if i)]


SIZES = [
    Sizes(B=1, R=1, K=1, M=1, S=1, T=2, V=1, position=1),
    Sizes(B=3, R=2, K=5, M=7, S=9, T=30, V=11, position=2),
    Sizes(B=2, R=4, K=2, M=3, S=1, T=20, V=4, position=19),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_dynamic(graphs: dict[str, Path], glamm: Glamm, sizes: Sizes) -> None:
    cases = make_cases(glamm, sizes, seed=5)
    for role, spec in graph_specs(glamm).items():
        expected = {name: value.numpy() for name, value in run_torch(spec, glamm, cases[role]).items()}
        with GraphSession(graphs[role], threads=1) as session:
            actual = session.run({name: value.numpy() for name, value in cases[role].items()})
        assert relative_error(actual, expected) < 1e-4, role


def _empty(rows: int, capacity: int, value: float = 0.0) -> dict[str, np.ndarray]:
    shape = (rows, CONFIG.llama.kv_heads, capacity, CONFIG.llama.head_dim)
    return {name: np.full(shape, value, np.float32) for name in _layers()}


def _text(rows: int, length: int) -> dict[str, np.ndarray]:
    """Ids [rows, length] with some visual embeddings spliced in."""
    generator = np.random.default_rng(0)
    index = np.where(generator.random((rows, length)) < 0.4, generator.integers(0, 5, (rows, length)), -1)
    return {
        "ids": generator.integers(3, CONFIG.llama.vocab, (rows, length)),
        "visual": generator.standard_normal((5, CONFIG.llama.emb)).astype(np.float32),
        "embed_index": index,
    }


def _part(text: dict[str, np.ndarray], begin: int, end: int) -> dict[str, np.ndarray]:
    cut = {name: np.ascontiguousarray(text[name][:, begin:end]) for name in ("ids", "embed_index")}
    return {**cut, "visual": text["visual"], "position": np.array([begin]), "banned": np.full(len(text["ids"]), -1)}


def _written(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("_out", ""): value for name, value in outputs.items() if "_out." in name}


@pytest.mark.parametrize("widths", [(1,) * 9, (5, 1, 1, 1, 1), (4, 1, 3, 1)], ids=["steps", "prefill", "follow-up"])
def test_steps_of_any_width_equal_the_whole_pass(step: GraphSession, glamm: Glamm, widths: tuple[int, ...]) -> None:
    text = _text(rows=2, length=9)
    embeds = glamm.splice(*(torch.from_numpy(text[name]) for name in ("ids", "visual", "embed_index")))
    with torch.no_grad():
        whole = glamm.llama(embeds)
        logits = glamm.llama.head(whole[:, -1])
    cache, states, position, out = _empty(2, 12, value=7.5), [], 0, {}  # what lies behind is never read
    for width in widths:
        out = step.run({**_part(text, position, position + width), **cache})
        cache = _written(out)
        states.append(out["states"])
        position += width
    np.testing.assert_allclose(np.concatenate(states, axis=1), whole.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(out["logits"], logits.numpy(), rtol=0, atol=2e-5)
    assert all((value[:, :, position:] == 7.5).all() for value in cache.values())


def test_caches_may_be_written_in_place(graphs: dict[str, Path], step: GraphSession) -> None:
    """A prefill and steps with the same array bound as input and output, as the runtime binds them."""
    session = InferenceSession(str(graphs["decoder_step"]), providers=["CPUExecutionProvider"])
    text = _text(rows=2, length=8)
    cache, other = _empty(2, 10), _empty(2, 10)
    logits = np.empty((2, CONFIG.llama.vocab), np.float32)
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 8)):
        states = np.empty((2, end - begin, CONFIG.llama.emb), np.float32)
        binding = session.io_binding()
        for name, value in {**_part(text, begin, end), **cache}.items():
            binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        outputs = {"logits": logits, "states": states, **{n.replace(".", "_out."): v for n, v in cache.items()}}
        for name, value in outputs.items():
            binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        session.run_with_iobinding(binding)
        expected = step.run({**_part(text, begin, end), **other})
        other = _written(expected)
        np.testing.assert_array_equal(logits, expected["logits"])
        np.testing.assert_array_equal(states, expected["states"])
        for name, value in cache.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_attention_reads_what_is_filled_only(graphs: dict[str, Path]) -> None:
    """Cost follows the position: both products of attention take sliced keys and values, not the whole cache."""
    graph = onnx.load(graphs["decoder_step"]).graph
    producer = {name: node for node in graph.node for name in node.output}
    uses = {name: [node for node in graph.node if name in node.input] for name in _layers("_out")}
    for name, nodes in uses.items():
        assert nodes and {node.op_type for node in nodes} == {"Slice"}, name
        assert producer[name].op_type == "ScatterElements"


class _RoiAlign(torch.nn.Module):
    def forward(self, maps: torch.Tensor, boxes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return roi_align(maps, boxes, index, 5, 0.25)


def test_roi_align_is_one_standard_node(graphs: dict[str, Path]) -> None:
    nodes = [node for node in onnx.load(graphs["region_encoder"]).graph.node if node.op_type == "RoiAlign"]
    assert len(nodes) == len(LEVELS)
    for node in nodes:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert values["coordinate_transformation_mode"] == b"half_pixel" and values["mode"] == b"avg"
        assert values["sampling_ratio"] == 2 and values["output_height"] == CONFIG.region.crop  # type: ignore[union-attr]


def test_roi_align_is_onnxs() -> None:
    """Boxes inside, across every edge, outside, and without extent: the training's operator and the graph's agree."""
    boxes = np.array(
        [[2, 3, 30, 20], [-9, -9, 12, 12], [20, 24, 70, 60], [44, 0, 90, 30], [8, 8, 8, 8], [0, 0, 48, 40]], np.float32
    )
    maps = np.random.default_rng(0).standard_normal((2, 3, 10, 12)).astype(np.float32)
    index = np.array([0, 1, 1, 0, 1, 0])
    expected = _RoiAlign()(torch.from_numpy(maps), torch.from_numpy(boxes), torch.from_numpy(index)).numpy()
    node = onnx.helper.make_node(
        "RoiAlign",
        ["maps", "boxes", "index"],
        ["out"],
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=5,
        output_width=5,
        sampling_ratio=2,
        spatial_scale=0.25,
    )
    info, single = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "roi",
        [
            info("maps", single, maps.shape),
            info("boxes", single, boxes.shape),
            info("index", onnx.TensorProto.INT64, index.shape),
        ],
        [info("out", single, expected.shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = session.run(None, {"maps": maps, "boxes": boxes, "index": index})[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_every_parameter_belongs_to_a_graph(glamm: Glamm) -> None:
    """Otherwise it would not be rounded as its graph stores it. Points and mask prompts are not used."""
    parts = {part for spec in graph_specs(glamm).values() for part in spec.parts}
    assert parts == {name.split(".")[0] for name, _ in glamm.named_parameters()}


def test_without_regions_there_is_no_region_encoder() -> None:
    import dataclasses

    model = Glamm(dataclasses.replace(CONFIG, region=None)).eval()
    specs = graph_specs(model)
    assert "region_encoder" not in specs
    assert [tensor.name for tensor in specs["global_encoder"].outputs] == ["features"]
    assert set(make_cases(model, SIZES[1])) == set(specs)


def test_the_tiny_bundle_opens() -> None:
    from make_tiny_bundle import TINY_GLAMM

    bundle: Bundle = open_bundle(TINY_GLAMM)
    assert list(bundle.manifest.graphs) == sorted(CONTRACT)
