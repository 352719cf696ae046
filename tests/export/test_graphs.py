"""The exported graphs: names, operators, dynamic sizes, caches. Against the PyTorch model they were made from."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from deixis.bundle import Bundle
from deixis_export.cases import Sizes, make_cases
from deixis_export.graphs import graph_specs, run_torch
from deixis_export.session import GraphSession, relative_error
from deixis_export.trace import OPSET
from deixis_train.models.pixelllm import PixelLLM

LAYERS = 2


def _layers(*names: str) -> list[str]:
    return [f"{name}.{i}" for i in range(LAYERS) for name in names]


CROSS = ["encoder_mask", *_layers("cross_key", "cross_value")]
CONTRACT = {  # docs/bundle.md
    "semantic_encoder": (["image", "valid_hw"], ["semantic"]),
    "sam_encoder": (["image", "valid_hw"], ["sam", "sam_on_grid"]),
    "prompt_extractor": (["features", "image_index", "points", "labels"], ["visual_prefix"]),
    "text_encoder": (["visual_prefix", "context_ids"], CROSS),
    "decoder_step": (
        ["ids", "position", "banned", *CROSS, *_layers("self_key", "self_value")],
        ["top_ids", "top_log_probs", "features", "locations", *_layers("self_key_out", "self_value_out"), "logits"],
    ),
    "decoder_pass": (["ids", *CROSS], ["features", "locations"]),
    "mask_adapter": (["visual_prefix", "features"], ["prompt_delta"]),
    "mask_decoder": (["sam", "image_index", "points", "labels", "prompt_delta"], ["masks", "iou"]),
}

# Operators that the graphs may use; all of them standard and within what TensorRT takes.
_OPERATORS = (
    "Add And Cast Clip Concat ConstantOfShape Conv ConvTranspose Cos Div Equal Erf Expand Flatten Gather "
    "GatherElements Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual LogSoftmax MatMul Max Min "
    "Mul Neg Not Pad Pow Range Reciprocal ReduceMean Relu Reshape ScatterElements Shape Sigmoid Sin Slice Softmax "
    "Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where "
)
ALLOWED = set(_OPERATORS.split())


def _path(bundle: Bundle, role: str) -> str:
    return str(bundle.file(bundle.manifest.graphs[role].file))


def test_every_artefact_has_the_names_of_the_contract(bundle: Bundle) -> None:
    assert set(bundle.manifest.graphs) == set(CONTRACT)
    for role, graph in bundle.manifest.graphs.items():
        inputs, outputs = CONTRACT[role]
        found = onnx.load(_path(bundle, role), load_external_data=False).graph
        assert [item.name for item in found.input] == inputs
        assert [item.name for item in found.output] == outputs
        described = {info.tensor: info for info in [*graph.inputs.values(), *graph.outputs.values()]}
        assert set(graph.inputs) == set(inputs) and set(graph.outputs) == set(outputs)
        for item in [*found.input, *found.output]:
            dims = tuple(d.dim_param or d.dim_value for d in item.type.tensor_type.shape.dim)
            assert dims == described[item.name].shape, (role, item.name)


@pytest.mark.parametrize("role", CONTRACT)
def test_only_allowed_standard_operators(bundle: Bundle, role: str) -> None:
    model = onnx.load(_path(bundle, role), load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} <= {""}
    assert {node.op_type for node in model.graph.node} <= ALLOWED
    onnx.checker.check_model(_path(bundle, role))


@pytest.mark.parametrize("role", CONTRACT)
def test_nothing_is_computed_from_constants(bundle: Bundle, role: str) -> None:
    graph = onnx.load(_path(bundle, role), load_external_data=False).graph
    constants = {item.name for item in graph.initializer}
    constant_nodes = [
        f"{node.op_type} {node.name}"
        for node in graph.node
        if node.input and all(name in constants for name in node.input if name)
    ]
    assert not constant_nodes


SIZES = [
    Sizes(B=1, N=1, K=1, P=1, C=3, S=1, T=2, L=3, position=1),
    Sizes(B=3, N=2, K=4, P=7, C=9, S=6, T=20, L=12, position=2),
    Sizes(B=2, N=4, K=1, P=5, C=3, S=1, T=11, L=5, position=9),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_are_dynamic(bundle: Bundle, model: PixelLLM, sizes: Sizes) -> None:
    cases = make_cases(model, sizes, seed=5)
    for role, spec in graph_specs(model).items():
        expected = {name: value.numpy() for name, value in run_torch(spec, model, cases[role]).items()}
        with GraphSession(bundle.file(bundle.manifest.graphs[role].file), threads=1) as session:
            actual = session.run({name: value.numpy() for name, value in cases[role].items()})
        assert relative_error(actual, expected) < 1e-4, role


def _decoder_inputs(model: PixelLLM, prompts: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Cross caches of some prompts, and words [N, 8] without padding."""
    case = make_cases(model, Sizes(B=1, N=prompts, K=1, P=5, C=4, S=1, T=8, L=8), seed=3)["decoder_pass"]
    cross = {name: np.ascontiguousarray(value.numpy()) for name, value in case.items() if name != "ids"}
    words = np.random.default_rng(0).integers(2, model.config.t5.vocab, (prompts, 8))
    return cross, words


def _empty_cache(model: PixelLLM, rows: int, capacity: int) -> dict[str, np.ndarray]:
    config = model.config.t5
    shape = (rows, config.heads, capacity, config.head_dim)
    return {f"self_{part}.{i}": np.zeros(shape, np.float32) for i in range(config.layers) for part in ("key", "value")}


def _written(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.replace("_out", ""): value for name, value in outputs.items() if "_out." in name}


def test_steps_a_wide_step_and_the_pass_agree(bundle: Bundle, model: PixelLLM) -> None:
    cross, words = _decoder_inputs(model, 3)
    step = GraphSession(bundle.file(bundle.manifest.graphs["decoder_step"].file), threads=1)
    whole = GraphSession(bundle.file(bundle.manifest.graphs["decoder_pass"].file), threads=1)
    none = np.full(3, -1)
    wide = step.run({"ids": words, "position": np.array([0]), "banned": none, **cross, **_empty_cache(model, 3, 10)})

    cache, narrow = _empty_cache(model, 3, 10), []
    for position in range(words.shape[1]):
        ids = words[:, position : position + 1]
        out = step.run({"ids": ids, "position": np.array([position]), "banned": none, **cross, **cache})
        cache = _written(out)
        narrow.append(out["features"])
    np.testing.assert_allclose(np.concatenate(narrow, axis=1), wide["features"], rtol=0, atol=1e-5)
    for name, value in _written(wide).items():
        np.testing.assert_allclose(cache[name], value, rtol=0, atol=1e-5, err_msg=name)

    passed = whole.run({"ids": words, **cross})
    # The last position has no next token and is inactive in the pass.
    np.testing.assert_allclose(passed["features"][:, :-1], wide["features"][:, :-1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(passed["locations"][:, :-1], wide["locations"][:, :-1], rtol=0, atol=1e-5)


def test_beams_share_a_cross_cache_row(bundle: Bundle, model: PixelLLM) -> None:
    cross, words = _decoder_inputs(model, 2)
    session = GraphSession(bundle.file(bundle.manifest.graphs["decoder_step"].file), threads=1)
    beams = np.stack([words[:, :4], words[:, 4:]], axis=1).reshape(4, 4)  # row = prompt * 2 + beam
    new = {"ids": beams, "position": np.array([0]), "banned": np.full(4, -1)}
    shared = session.run({**new, **cross, **_empty_cache(model, 4, 6)})
    tiled = {name: np.repeat(value, 2, axis=0) for name, value in cross.items()}
    apart = session.run({**new, **tiled, **_empty_cache(model, 4, 6)})
    np.testing.assert_allclose(shared["logits"], apart["logits"], rtol=0, atol=1e-5)


def test_caches_may_be_written_in_place(bundle: Bundle, model: PixelLLM) -> None:
    cross, words = _decoder_inputs(model, 2)
    session = onnxruntime.InferenceSession(_path(bundle, "decoder_step"), providers=["CPUExecutionProvider"])
    separate = GraphSession(bundle.file(bundle.manifest.graphs["decoder_step"].file), threads=1)
    cache, other = _empty_cache(model, 2, 6), _empty_cache(model, 2, 6)
    logits = np.empty((2, model.config.t5.vocab), np.float32)
    for position in range(4):
        ids = np.ascontiguousarray(words[:, position : position + 1])
        new = {"ids": ids, "position": np.array([position]), "banned": np.full(2, -1)}
        inputs = {**new, **cross, **cache}
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        for name, value in {"logits": logits, **{n.replace(".", "_out."): v for n, v in cache.items()}}.items():
            binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        session.run_with_iobinding(binding)
        expected = separate.run({**new, **cross, **other})
        other = _written(expected)
        np.testing.assert_array_equal(logits, expected["logits"])
        for name, value in cache.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
    assert all(not value[:, :, 4:].any() for value in cache.values())  # places not reached stay as they were


def test_step_and_pass_share_one_file_of_weights(bundle: Bundle) -> None:
    step, whole = (bundle.manifest.graphs[role] for role in ("decoder_step", "decoder_pass"))
    assert step.external == whole.external == ("graphs/decoder.data",)
    assert bundle.manifest.files["graphs/decoder.data"].bytes < 1.05 * _weight_bytes(_path(bundle, "decoder_step"))


def _weight_bytes(path: str) -> int:
    total = 0
    for item in onnx.load(path, load_external_data=False).graph.initializer:
        total += next((int(e.value) for e in item.external_data if e.key == "length"), 0)
    return total


def test_position_zero_padding_never_reaches_what_is_read(bundle: Bundle, model: PixelLLM) -> None:
    """Capacity beyond what is used changes nothing, whatever finite numbers lie there."""
    cross, words = _decoder_inputs(model, 1)
    session = GraphSession(bundle.file(bundle.manifest.graphs["decoder_step"].file), threads=1)
    new = {"ids": words, "position": np.array([0]), "banned": np.array([-1])}
    small = session.run({**new, **cross, **_empty_cache(model, 1, 8)})
    filled = {name: value + 7.5 for name, value in _empty_cache(model, 1, 30).items()}
    large = session.run({**new, **cross, **filled})
    np.testing.assert_allclose(small["logits"], large["logits"], rtol=0, atol=1e-5)


def test_torch_is_left_as_it_was(model: PixelLLM) -> None:
    """Tracing must not leave a module in training mode."""
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
