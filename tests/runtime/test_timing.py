"""Spans of `Model.timed`: what is recorded, that it fits into the call, and that nothing stays behind."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

import deixis
from deixis.timing import LOAD, Span, TimedEngine

GLAMM = Path(__file__).parents[1] / "golden" / "tiny_glamm"
FEW = deixis.DecodeOptions(max_new_tokens=3, beams=1)
ENCODERS = ["semantic_encoder", "sam_encoder"]


def names(spans: list[Span]) -> list[str]:
    return [span.name for span in spans]


def test_a_request_is_recorded_graph_by_graph(tiny_bundle: Path, picture: np.ndarray) -> None:
    with deixis.load(tiny_bundle, device="cpu", threads=1) as model:
        engine = model.pipeline.engine
        with model.timed() as spans:
            start = time.perf_counter()
            scene = model.encode(picture)
            caption = scene.caption(options=FEW)
            end = time.perf_counter()
        assert model.pipeline.engine is engine
        loads = [name for name in names(spans) if name.startswith(LOAD)]
        assert set(loads) == {LOAD + role for role in model.info.loaded_graphs} and len(loads) == len(set(loads))
        rest = [name for name in names(spans) if not name.startswith(LOAD)]
        steps = rest.count("decoder_step")
        # every chosen id is one step; one that is cut at the length consumes its last id by one more
        assert steps == len(caption.ids) + 1
        assert rest == [
            *ENCODERS, "preprocess", "prompt_extractor", "text_encoder", *["decoder_step"] * steps, "postprocess"
        ]  # fmt: skip
        ordered = sorted(spans, key=lambda span: span.start)
        assert ordered[0].name == "preprocess" and ordered[-1].name == "postprocess"
        assert start <= ordered[0].start and ordered[-1].end <= end
        for before, after in itertools.pairwise(ordered):
            assert before.end <= after.start and before.seconds >= 0

        recorded = len(spans)
        scene.caption(options=FEW)  # outside of the block
        assert len(spans) == recorded
        with model.timed() as again:
            scene.refer("the red cup")
        assert names(again)[-2:] == ["mask_decoder", "postprocess"] and not set(ENCODERS) & set(names(again))


def test_timing_changes_no_result(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    scene = tiny_model.encode(picture)
    plain = scene.caption(options=FEW)
    with tiny_model.timed():
        assert scene.caption(options=FEW) == plain


def test_glamm_is_recorded_too(picture: np.ndarray) -> None:
    with deixis.load(GLAMM, device="cpu", threads=1) as model, model.timed() as spans:
        scene = model.encode(picture)
        assert names(spans) == [LOAD + "global_encoder", "global_encoder", "preprocess"]
        answer = scene.grounded_caption(options=deixis.DecodeOptions(max_new_tokens=6))
        rest = names(spans)[3:]
        assert rest.count("decoder_step") == len(answer.ids) + answer.finished
        assert ("pixel_decoder" in rest) == bool(answer.masks or any(p.mask for p in answer.phrases))
        assert rest[-1] == "postprocess"


def test_a_call_without_graphs_is_all_edge(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    tiny_model.encode(picture)
    with tiny_model.timed() as spans:
        tiny_model.encode(picture)  # seen before
    assert names(spans) == ["preprocess"] and spans[0].seconds > 0


def test_a_stream_gives_its_graphs(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    with tiny_model.timed() as spans:
        stream = tiny_model.encode(picture).stream_caption(options=FEW)
        assert "decoder_step" not in names(spans)
        steps = len(stream.caption.ids) + 1
    assert names(spans).count("decoder_step") == steps


def test_what_fails_is_recorded_and_the_engine_comes_back(tiny_bundle: Path) -> None:
    with deixis.load(tiny_bundle, device="cpu", threads=1) as model:
        engine = model.pipeline.engine
        with pytest.raises(deixis.EngineError), model.timed() as spans:
            assert isinstance(model.pipeline.engine, TimedEngine)
            model.pipeline.engine.run("mask_adapter", {"features": np.zeros((1, 1, 1), np.float32)})
        assert names(spans) == [LOAD + "mask_adapter", "mask_adapter"]
        assert model.pipeline.engine is engine


def test_blocks_do_not_nest_and_need_an_open_model(tiny_bundle: Path) -> None:
    model = deixis.load(tiny_bundle, device="cpu", threads=1)
    with model.timed():
        with pytest.raises(RuntimeError, match="timed already"), model.timed():
            pass
        model.close()  # inside of a block, and the block still ends well
    with pytest.raises(deixis.ClosedError), model.timed():
        pass
