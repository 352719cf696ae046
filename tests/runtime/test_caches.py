"""The caches.

Reorder and rewind on arrays, and the real decoder step in place against the same without sharing buffers.
"""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest

import deixis
from deixis import caches, pipeline
from deixis.bundle import CacheSpec
from deixis.caches import CrossCache, DecodeState, SelfCache, StepDecoder, StepHead
from deixis.decoding import Top
from deixis.options import DecodeOptions
from deixis.prompts import Prompt, prompt_tokens


def filled(rows: int = 3, capacity: int = 6, position: int = 4) -> SelfCache:
    cache = SelfCache(CacheSpec(2, 2, 3), rows, capacity)
    for number, array in enumerate((*cache.keys, *cache.values)):
        array[...] = np.arange(array.size).reshape(array.shape) + 1000 * number
    cache.position = position
    return cache


def test_reorder_moves_rows_and_only_the_filled_part() -> None:
    cache, before = filled(), filled()
    cache.reorder(np.array([2, 0, 2]))
    for array, old in zip((*cache.keys, *cache.values), (*before.keys, *before.values), strict=True):
        assert np.array_equal(array[:, :, :4], old[[2, 0, 2], :, :4])
        assert np.array_equal(array[:, :, 4:], old[:, :, 4:])


def test_positions_are_guarded() -> None:
    cache = filled()
    cache.rewind(1)
    assert cache.position == 1
    for bad in (2, -1):
        with pytest.raises(ValueError):
            cache.rewind(bad)
    cache.advance(5)
    with pytest.raises(ValueError):
        cache.advance()
    assert cache.nbytes == 4 * 3 * 2 * 6 * 3 * 4


def cross_of(model: deixis.Model, picture: np.ndarray, rows: int) -> CrossCache:
    pipeline, features = model.pipeline, model.encode(picture).features
    boxes = [Prompt(box=(5 * i, 3 * i, 60 + 9 * i, 50 + 7 * i)) for i in range(rows)]
    tokens = [prompt_tokens(box, features.geometry, pipeline.manifest.prompts) for box in boxes]
    contexts = [[5, 6, 1][i % 2 :] for i in range(rows)]
    return pipeline.cross(pipeline.prefix([features] * rows, tokens), contexts)


def decoder_of(model: deixis.Model, cross: CrossCache, beams: int, capacity: int = 12) -> StepDecoder:
    manifest = model.manifest
    state = DecodeState.start(cross, manifest.caches.self_cache, beams, capacity)
    points = manifest.location.points_per_token
    return StepDecoder(model.pipeline.engine, state, StepHead.of(manifest), points)


def test_in_place_equals_separate_buffers(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    """Every step through the bound, shared buffers equals the same step run on copies; also with beams and after
    reorder.
    """
    cross = cross_of(tiny_model, picture, 2)
    decoder = decoder_of(tiny_model, cross, beams=2)
    copy = SelfCache(tiny_model.manifest.caches.self_cache, 4, 12)
    random = np.random.default_rng(0)
    for place in range(8):
        ids = random.integers(3, 100, 4)
        banned = np.where(random.random(4) < 0.5, -1, ids)
        feed = {"ids": ids[:, None], "position": np.array([place]), "banned": banned, **cross.inputs(), **copy.inputs()}
        expected = tiny_model.pipeline.engine.run("decoder_step", feed)
        top, locations = decoder.step(ids, banned)
        np.testing.assert_array_equal(top.logits, expected["logits"])
        np.testing.assert_array_equal(top.ids, expected["top_ids"])
        np.testing.assert_array_equal(top.log_probs, expected["top_log_probs"])
        same = Top.of_logits(expected["logits"], banned, top.ids.shape[1])
        np.testing.assert_array_equal(top.ids, same.ids)
        np.testing.assert_allclose(top.log_probs, same.log_probs, atol=1e-5)
        np.testing.assert_array_equal(locations, expected["locations"][:, 0])
        copy.keys = tuple(expected[f"self_key_out.{i}"] for i in range(len(copy.keys)))
        copy.values = tuple(expected[f"self_value_out.{i}"] for i in range(len(copy.values)))
        copy.position = place + 1
        if place % 3 == 2:
            rows = np.array([1, 1, 3, 2])
            decoder.reorder(rows)
            copy.reorder(rows)


def test_a_graph_without_reductions_is_reduced_here(tmp_path: Path) -> None:
    """Bundles before format 1.3: the same captions, greedy and with beams, from graphs that only give logits."""
    captions, options = [], [DecodeOptions(), DecodeOptions(beams=3)]
    for changes in ({}, {"reductions": None}):
        engine = fakes.FakeEngine(end_bias=-4)
        model, _ = fakes.make_model(tmp_path, fakes.make_manifest(**changes), engine)
        scene = model.encode(np.random.default_rng(3).integers(0, 255, (24, 32, 3)).astype(np.uint8))
        captions.append([scene.caption(options=chosen) for chosen in options])
        assert ("banned" in engine.last["decoder_step"]) == (not changes)
    assert captions[0] == captions[1] and all(caption.ids for caption in captions[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_the_cache_grows_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beams: int) -> None:
    """Blocks of any size give the same captions, up to the last place of the cache."""
    captions, capacities = [], []
    for block in (64, 4, 1):
        for module in (caches, pipeline):
            monkeypatch.setattr(module, "BLOCK", block)
        model, engine = fakes.make_model(tmp_path, None, fakes.FakeEngine(end_bias=-9))
        scene = model.encode(np.random.default_rng(3).integers(0, 255, (24, 32, 3)).astype(np.uint8))
        captions.append(scene.caption(options=DecodeOptions(beams=beams)))
        capacities.append(engine.last["decoder_step"]["self_key.0"].shape[2])
    assert captions[0] == captions[1] == captions[2] and len(captions[0].ids) == fakes.LENGTH - 2
    assert capacities == [fakes.LENGTH - 1] * 3


def test_rewind_repeats_exactly(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    decoder = decoder_of(tiny_model, cross_of(tiny_model, picture, 1), beams=1)
    for token in (0, 7, 9):
        top, locations = decoder.step(np.array([token]))
        first = [top.ids.copy(), top.log_probs.copy(), locations.copy()]
    for token in (50, 60, 70):
        decoder.step(np.array([token]))
    decoder.state.self_cache.rewind(2)
    top, locations = decoder.step(np.array([9]))
    for a, b in zip(first, (top.ids, top.log_probs, locations), strict=True):
        np.testing.assert_array_equal(a, b)


def test_steps_equal_one_wide_step_and_the_pass(tiny_model: deixis.Model, picture: np.ndarray) -> None:
    """Token by token, as one wide step, and teacher-forced: the same locations, whatever the capacity."""
    cross = cross_of(tiny_model, picture, 2)
    ids = np.random.default_rng(1).integers(3, 100, (2, 6))
    ids[:, 0] = 0
    decoder = decoder_of(tiny_model, cross, beams=1)
    stepped = np.stack([decoder.step(ids[:, i])[1].copy() for i in range(6)], axis=1)
    cache = SelfCache(tiny_model.manifest.caches.self_cache, 2, 9)
    feed = {"ids": ids, "position": np.array([0]), "banned": np.full(2, -1), **cross.inputs(), **cache.inputs()}
    wide = tiny_model.pipeline.engine.run("decoder_step", feed)["locations"]
    padded = np.concatenate([ids, np.ones((2, 1), np.int64), np.zeros((2, 3), np.int64)], axis=1)
    passed = tiny_model.pipeline.teacher_forced(cross, padded)[1][:, :6]
    np.testing.assert_allclose(wide, stepped, atol=2e-6)
    np.testing.assert_allclose(passed, stepped, atol=2e-6)
