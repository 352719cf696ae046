"""deixis itself: an exported bundle, run by the runtime's own greedy search and caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import deixis
from deixis.decoding import DecodeRules, Stepper, greedy_steps
from deixis.glamm.generation import PromptedDecoder
from deixis_bench.rivals.contract import PROMPT_TOKENS, Answer, Loaded, Spec, Stopwatch
from deixis_bench.rivals.make_bundle import bundle_of


def load(spec: Spec) -> Loaded:
    model = deixis.load(bundle_of(spec, spec.precision), device="cpu", threads=spec.threads, verify=False)
    make = {"text": _text, "llama": _llama, "encoder": _encoder}[spec.part]
    return Loaded(deixis.__version__, make(spec, model.pipeline))


def _generate(decoder: Stepper, begin_id: int, end_id: int, count: int) -> Answer:
    """The first step gives the first id, and is not timed."""
    rules = DecodeRules(count + 3, begin_id, end_id, ban_repeat=False)
    steps, watch, tokens = greedy_steps(decoder, 1, rules, lambda: None), Stopwatch(), []
    for step in steps:
        assert step.ids is not None, "the search went on behind its last id"
        tokens.append(int(step.ids[0]))
        if len(tokens) == 1:
            watch.start()
        if len(tokens) > count:
            break
    watch.stop()
    return Answer(watch, tokens)


def _text(spec: Spec, pipeline: Any) -> Callable[[], Answer]:
    from safetensors import safe_open

    with safe_open(spec.folder / "model.safetensors", "np") as tensors:
        first = np.asarray(tensors.get_slice("shared.weight")[spec.prompt[0]], np.float32)
    tokens = pipeline.manifest.tokenizer

    def run() -> Answer:
        cross = pipeline.cross(first[None, None], [spec.prompt[1:]])
        decoder = pipeline.decoder(cross, 1, spec.new_tokens + 3)
        return _generate(decoder, tokens.begin_id, tokens.end_id, spec.new_tokens)

    return run


def _llama(spec: Spec, pipeline: Any) -> Callable[[], Answer]:
    from deixis.geometry import Geometry
    from deixis.glamm.pipeline import GlammFeatures

    width = pipeline.manifest.graphs["decoder_step"].inputs["visual"].shape[1]
    side = pipeline.manifest.image.size
    nothing = GlammFeatures(
        Geometry.of((side, side), side), np.zeros((1, width), np.float32), (), None
    )  # the prompt has no picture in it
    tokens = pipeline.manifest.tokenizer

    def run() -> Answer:
        session = pipeline.session([nothing], PROMPT_TOKENS + spec.new_tokens + 1)
        decoder = PromptedDecoder(session, np.array([spec.prompt]), [None])
        return _generate(decoder, tokens.begin_id, tokens.end_id, spec.new_tokens)

    return run


def _encoder(spec: Spec, pipeline: Any) -> Callable[[], Answer]:
    image, valid = spec.picture()
    dtype = pipeline.manifest.graphs["sam_encoder"].inputs["valid_hw"].dtype
    inputs = {"image": image, "valid_hw": valid.astype(dtype)}

    def run() -> Answer:
        with Stopwatch() as watch:
            outputs = pipeline.engine.run("sam_encoder", inputs)
        return Answer(watch, outputs={"sam": outputs["sam"]})

    return run
