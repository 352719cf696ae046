"""OpenVINO. Text parts: optimum's graphs of the decoder, made stateful, so that caches stay inside. Encoder: ours.

OpenVINO's own 8-bit weights need the package nncf, which is not run here; int8 of the encoder is onnxruntime's dynamic
graph, read by OpenVINO.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov  # pyright: ignore[reportMissingImports]
from openvino._offline_transformations import apply_make_stateful_transformation  # pyright: ignore[reportMissingImports]

from deixis_bench.rivals.contract import PROMPT_TOKENS, Answer, Loaded, Spec, Stopwatch, decode_after_first

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def load(spec: Spec) -> Loaded:
    core = ov.Core()
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[spec.precision],
        "INFERENCE_NUM_THREADS": spec.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    make, note = {
        "text": (_text, "optimum's graph with caches, stateful"),
        "llama": (_llama, "optimum's graph, stateful"),
        "encoder": (_encoder, "our graph"),
    }[spec.part]
    return Loaded(ov.get_version().split("-")[0], make(spec, core, options), note)


def _stateful(model: ov.Model, pairs: dict[str, str]) -> None:
    """Inputs and outputs of the graph that are one state each, by name."""
    for name in pairs:
        port = model.input(name)
        shape = port.get_partial_shape()
        shape[0] = 1
        model.reshape({name: shape})
    apply_make_stateful_transformation(model, pairs)


def _fill(request: ov.InferRequest, values: dict[str, Any]) -> None:
    """Set every state; a state's name is made of those of its input and output."""
    for state in request.query_state():
        [name] = [name for name in values if state.name.startswith(name)]
        state.state = ov.Tensor(np.ascontiguousarray(values[name]))


def _text(spec: Spec, core: ov.Core, options: dict[str, Any]) -> Callable[[], Answer]:
    from deixis_bench.rivals.run_optimum import exported

    folder = exported(spec)
    encoder = core.compile_model(folder / "encoder_model.onnx", "CPU", options)
    first = core.compile_model(folder / "decoder_model.onnx", "CPU", options)
    model = core.read_model(folder / "decoder_with_past_model.onnx")
    written = {port.any_name for port in model.outputs}
    names = [port.any_name for port in model.inputs]
    pairs = {name: name.replace("past_key_values", "present") for name in names if ".decoder." in name}
    assert set(pairs.values()) <= written
    _stateful(model, pairs)
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    needed = {port.any_name for port in compiled.inputs}
    prompt, mask = np.array([spec.prompt]), np.ones((1, PROMPT_TOKENS), np.int64)

    def run() -> Answer:
        encoded = encoder({"input_ids": prompt, "attention_mask": mask})["last_hidden_state"]
        given = {"encoder_hidden_states": encoded, "encoder_attention_mask": mask}
        begun = first({"input_ids": np.zeros((1, 1), np.int64), **given})
        caches = {name: np.array(begun[name.replace("past_key_values", "present")]) for name in names if "past" in name}
        _fill(request, {name: caches[name] for name in pairs})
        fixed = {name: value for name, value in {**given, **caches}.items() if name in needed}
        for name, value in fixed.items():
            request.set_tensor(name, ov.Tensor(value))
        token = np.zeros((1, 1), np.int64)
        request.set_tensor("input_ids", ov.Tensor(token, shared_memory=True))

        def step(previous: int) -> int:
            token[0, 0] = previous
            request.infer()
            return int(request.get_tensor("logits").data[0, -1].argmax())

        return decode_after_first(step, int(begun["logits"][0, -1].argmax()), spec.new_tokens)

    return run


def _llama(spec: Spec, core: ov.Core, options: dict[str, Any]) -> Callable[[], Answer]:
    from deixis_bench.rivals.run_optimum import exported

    model = core.read_model(exported(spec) / "model.onnx")
    pairs = {
        port.any_name: re.sub("^past_key_values", "present", port.any_name)
        for port in model.inputs
        if port.any_name.startswith("past_key_values")
    }
    empty = {}
    for name in pairs:
        _, heads, _, width = model.input(name).get_partial_shape()
        empty[name] = np.zeros((1, heads.get_length(), 0, width.get_length()), np.float32)
    _stateful(model, pairs)
    compiled = core.compile_model(model, "CPU", options)
    request = compiled.create_infer_request()
    needed = {port.any_name for port in compiled.inputs}

    def run() -> Answer:
        _fill(request, empty)
        position = 0

        def feed(ids: list[int]) -> int:
            nonlocal position
            end = position + len(ids)
            values = {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(position, end)[None],
            }
            request.infer({name: value for name, value in values.items() if name in needed}, share_inputs=True)
            position = end
            return int(request.get_tensor("logits").data[0, -1].argmax())

        return decode_after_first(lambda token: feed([token]), feed(spec.prompt), spec.new_tokens)

    return run


def _encoder(spec: Spec, core: ov.Core, options: dict[str, Any]) -> Callable[[], Answer]:
    from deixis_bench.rivals.run_onnxruntime import encoder_graph

    image, valid = spec.picture()
    model = core.read_model(encoder_graph(spec))
    model.reshape({"image": list(image.shape), "valid_hw": list(valid.shape)})
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def run() -> Answer:
        with Stopwatch() as watch:
            request.infer({"image": image, "valid_hw": valid}, share_inputs=True)
        return Answer(watch, outputs={"sam": np.array(request.get_tensor("sam").data)})

    return run
