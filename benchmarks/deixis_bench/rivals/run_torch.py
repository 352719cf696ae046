"""PyTorch, eager and compiled: our own modules, with caches of keys and values for text.

A step gives new caches instead of writing in place, which copies 1.5 MB a step at the sizes of part "text": a hundredth
of the weights it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from deixis_bench.rivals.contract import (
    PROMPT_TOKENS,
    Answer,
    Loaded,
    RivalError,
    Spec,
    Stopwatch,
    decode_after_first,
)
from deixis_bench.rivals.weights import read_t5


def load(spec: Spec) -> Loaded:
    torch.set_num_threads(spec.threads)
    torch.set_grad_enabled(False)
    compiled = spec.name == "torch-compile"
    note = ""
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(spec.work / "inductor"))
        note = "torch.compile, default mode"
    elif spec.precision == "int8":
        note = "torch.ao dynamic int8, Linear layers"
    wrap = _compile if compiled else lambda function: function
    run = {"text": _text, "llama": _llama, "encoder": _encoder}[spec.part](spec, wrap)
    run()  # compiles; a compiler that fails is found here
    return Loaded(torch.__version__, run, note)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _lowered(model: torch.nn.Module, precision: str) -> torch.nn.Module:
    if precision == "int8":
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return model.to(torch.bfloat16) if precision == "bf16" else model


def _text(spec: Spec, wrap: Callable[..., Any]) -> Callable[[], Answer]:
    model: Any = _lowered(read_t5(spec.folder), spec.precision)
    prompt = torch.tensor([spec.prompt])

    def step(token: torch.Tensor, position: torch.Tensor, cache: Any, cross: Any, valid: torch.Tensor) -> Any:
        logits, _, written = model.step(token, position, cache, cross, valid)
        return logits.argmax(-1), written

    step = wrap(step)

    def run() -> Answer:
        encoded, valid = model.encode(model.token_embedder(prompt))
        cross, cache = model.cross_kv(encoded), model.empty_cache(1, spec.new_tokens + 1)
        position = 0

        def one(token: int) -> int:
            nonlocal cache, position
            best, cache = step(torch.tensor([[token]]), torch.tensor([position]), cache, cross, valid)
            position += 1
            return int(best)

        return decode_after_first(one, one(0), spec.new_tokens)

    return run


def _llama(spec: Spec, wrap: Callable[..., Any]) -> Callable[[], Answer]:
    from deixis_train.loaders.llama import load_llama_folder

    model: Any = _lowered(load_llama_folder(spec.folder), spec.precision)

    def run() -> Answer:
        cache = model.empty_cache(1, PROMPT_TOKENS + spec.new_tokens + 1)
        position = 0

        def feed(ids: list[int]) -> int:
            nonlocal cache, position
            states, cache = model.step(model.embed(torch.tensor([ids])), torch.tensor([position]), cache)
            position += len(ids)
            return int(model.head(states[0, -1]).argmax())

        return decode_after_first(lambda token: feed([token]), feed(spec.prompt), spec.new_tokens)

    return run


def _encoder(spec: Spec, wrap: Callable[..., Any]) -> Callable[[], Answer]:
    from deixis_train.checkpoint import load_checkpoint

    model = load_checkpoint(spec.folder).pixelllm
    image, valid = (torch.from_numpy(array) for array in spec.picture())
    if spec.precision not in ("fp32", "bf16"):
        raise RivalError(f"PyTorch's encoder is not run in {spec.precision}")
    encode = wrap(model.encode_sam)

    def run() -> Answer:
        with (
            Stopwatch() as watch,
            torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"),
        ):
            sam = encode(image, valid)[1]
        return Answer(watch, outputs={"sam": sam.float().numpy()})

    return run
