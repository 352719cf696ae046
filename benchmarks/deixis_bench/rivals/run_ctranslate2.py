"""CTranslate2, by its own converter. The watch starts in the callback of the first id and stops in that of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ctranslate2  # pyright: ignore[reportMissingImports]

from deixis_bench.rivals.contract import Answer, Loaded, Spec, Stopwatch

_TYPES = {"fp32": "float32", "int8": "int8"}
_NEVER = ["t1"]  # an id whose logit is 0 and never the largest: without it, the default end of the model


def load(spec: Spec) -> Loaded:
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    folder = spec.work / "model"
    if not folder.exists():
        quantization = None if spec.precision == "fp32" else _TYPES[spec.precision]
        TransformersConverter(str(spec.folder)).convert(str(folder), quantization=quantization)
    options: dict[str, Any] = {
        "device": "cpu",
        "compute_type": _TYPES[spec.precision],
        "inter_threads": 1,
        "intra_threads": spec.threads,
    }
    make = _translator if spec.part == "text" else _generator
    run, kind = make(spec, str(folder), options)
    return Loaded(ctranslate2.__version__, run, f"compute type {kind}")


def _watched(spec: Spec, call: Callable[[Callable[[Any], bool]], list[str]]) -> Answer:
    watch, seen = Stopwatch(), 0

    def each(_step: Any) -> bool:
        nonlocal seen
        seen += 1
        if seen == 1:
            watch.start()
        elif seen == spec.new_tokens + 1:
            watch.stop()
        return False

    names = call(each)
    return Answer(watch, [int(name.removeprefix("t")) for name in names[: spec.new_tokens + 1]])


def _translator(spec: Spec, folder: str, options: dict[str, Any]) -> tuple[Callable[[], Answer], str]:
    translator = ctranslate2.Translator(folder, **options)
    prompt = [f"t{token}" for token in spec.prompt]

    def call(each: Callable[[Any], bool]) -> list[str]:
        [result] = translator.translate_batch(
            [prompt],
            beam_size=1,
            max_decoding_length=spec.new_tokens + 1,
            max_input_length=0,
            end_token=_NEVER,
            callback=each,
        )
        return result.hypotheses[0]

    return lambda: _watched(spec, call), translator.compute_type


def _generator(spec: Spec, folder: str, options: dict[str, Any]) -> tuple[Callable[[], Answer], str]:
    generator = ctranslate2.Generator(folder, **options)
    prompt = [f"t{token}" for token in spec.prompt]

    def call(each: Callable[[Any], bool]) -> list[str]:
        [result] = generator.generate_batch(
            [prompt],
            beam_size=1,
            sampling_topk=1,
            max_length=spec.new_tokens + 1,
            include_prompt_in_result=False,
            end_token=_NEVER,
            callback=each,
        )
        return result.sequences[0]

    return lambda: _watched(spec, call), generator.compute_type
