"""The graphs of a GLaMM and its language session on the fake engine: splicing, caches, rows, lazy masks, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import make_model as make_pixel_model
from glamm_fakes import (
    BBOX,
    GLOBAL,
    SIZE,
    TOKENS,
    WIDTH,
    GlammEngine,
    make_manifest,
    make_model,
    pictures,
    without,
)

import deixis
from deixis import Model
from deixis.bundle import Bundle, DimRange
from deixis.caches import SelfCache
from deixis.conversation import IMAGE_ID
from deixis.errors import BundleFormatError, EngineError, PromptError, TaskError, TextTooLongError
from deixis.families import make_pipeline
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.session import BLOCK
from deixis.image import middle
from deixis.masks import segment_mask
from deixis.pipeline import Pipeline

PROMPT = [1, 5, IMAGE_ID, 6, 7, 8]


def ids(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_model(tmp_path)[0]


def pipeline_of(model: Model) -> GlammPipeline:
    assert isinstance(model.pipeline, GlammPipeline)
    return model.pipeline


def engine_of(model: Model) -> GlammEngine:
    assert isinstance(model.pipeline.engine, GlammEngine)
    return model.pipeline.engine


def encoded(model: Model, count: int) -> list[GlammFeatures]:
    return pipeline_of(model).encode(pictures(count))


def test_pictures_in_a_batch_equal_one_by_one(model: Model) -> None:
    pipeline, engine = pipeline_of(model), engine_of(model)
    together = encoded(model, 3)
    assert engine.runs == {"global_encoder": 2}  # two pictures at once; the grounding encoder waits
    for picture, features in zip(pictures(3), together, strict=True):
        [alone] = pipeline.encode([picture])
        np.testing.assert_array_equal(features.features, alone.features)
        np.testing.assert_array_equal(features.levels[0], alone.levels[0])
        assert features.geometry == alone.geometry and features.geometry.original == picture.shape[:2]
        assert max(features.geometry.valid) == SIZE
    seen = engine.last["global_encoder"]["image"]
    assert seen.shape == (1, GLOBAL, GLOBAL, 3) and seen.dtype == np.float32
    np.testing.assert_array_equal(seen[0], middle(pictures(3)[2], pipeline.global_image))


def test_masks_encode_a_picture_once_and_only_when_asked(model: Model) -> None:
    pipeline, engine = pipeline_of(model), engine_of(model)
    scenes = encoded(model, 3)
    before = scenes[0].nbytes
    states = np.random.default_rng(0).uniform(-1, 1, (5, WIDTH)).astype(np.float32)
    owners = [scenes[i] for i in (0, 1, 0, 2, 1)]
    logits, iou = pipeline.masks(states, owners)
    assert logits.shape == (5, 16, 16) and iou.shape == (5,) and engine.runs["grounding_encoder"] == 2
    again, _ = pipeline.masks(states, owners)
    assert engine.runs["grounding_encoder"] == 2
    np.testing.assert_array_equal(logits, again)
    for i, scene in enumerate(owners):
        one, score = pipeline.masks(states[i : i + 1], [scene])
        np.testing.assert_array_equal(one[0], logits[i])
        assert score[0] == iou[i]
    assert scenes[0].resized is None and scenes[0].sam is not None
    assert scenes[0].nbytes == before - np.prod((*scenes[0].geometry.valid, 3)) + scenes[0].sam.nbytes
    fresh = encoded(model, 1)[0]
    engine.runs.clear()
    empty, scores = pipeline.masks(np.zeros((0, WIDTH), np.float32), [])
    assert len(empty) == 0 == len(scores) and engine.runs == {} and fresh.sam is None


def test_what_the_grounding_encoder_sees(model: Model) -> None:
    pipeline, engine = pipeline_of(model), engine_of(model)
    [scene] = pipeline.encode([np.full((10, 20, 3), 9, np.uint8)])
    pipeline.masks(np.zeros((1, WIDTH), np.float32), [scene])
    seen = engine.last["grounding_encoder"]
    np.testing.assert_array_equal(seen["valid_hw"], [[16, 32]])
    assert (seen["image"][0, :16] == 9).all() and not seen["image"][0, 16:].any()


def test_regions_are_shares_of_the_picture(model: Model) -> None:
    pipeline = pipeline_of(model)
    scenes = encoded(model, 3)
    boxes = [np.array([[0, 0, 30, 20], [1, 2, 3, 4]]), np.zeros((0, 4)), np.array([[5, 6, 7, 8.0]] * 5)]
    found = pipeline.regions(scenes, boxes)
    assert [own.shape for own in found] == [(2, WIDTH), (0, WIDTH), (5, WIDTH)]
    for scene, own, vectors in zip(scenes, boxes, found, strict=True):
        height, width = scene.geometry.original
        expected = (own / (width, height, width, height) * 100).astype(np.float32)
        np.testing.assert_allclose(vectors[:, :4], expected, rtol=1e-6)
        np.testing.assert_array_equal(vectors[:, 4:], np.tile(scene.levels[0].mean(axis=(0, 1))[:2], (len(own), 1)))


def test_splicing(model: Model) -> None:
    """Section 5.4: the picture takes as many places as it has features, regions one each, in their order."""
    pipeline, engine = pipeline_of(model), engine_of(model)
    scenes = encoded(model, 2)
    session = pipeline.session(scenes, 1)
    regions = [np.full((2, WIDTH), 7, np.float32) + np.arange(2)[:, None], np.full((2, WIDTH), 9, np.float32)]
    row = [1, 5, IMAGE_ID, 6, BBOX, 7, BBOX]
    _, states = session.feed(ids(row, row), regions)
    seen = engine.last["decoder_step"]
    length = len(row) - 1 + TOKENS
    assert session.position == length and states.shape == (2, length, WIDTH)
    for r in range(2):
        spliced = seen["visual"][seen["embed_index"][r]]
        index = seen["embed_index"][r]
        np.testing.assert_array_equal(spliced[2 : 2 + TOKENS], scenes[r].features)
        np.testing.assert_array_equal(spliced[[3 + TOKENS, 5 + TOKENS]], regions[r])
        text = [0, 1, 2 + TOKENS, 4 + TOKENS]
        assert (index[text] == -1).all() and (np.delete(index, text) >= 0).all()
        np.testing.assert_array_equal(seen["ids"][r, text], [1, 5, 6, 7])
        assert (seen["ids"][r] >= 0).all()


def test_rows_that_show_one_picture_share_it(model: Model) -> None:
    [scene] = encoded(model, 1)
    pipeline_of(model).session([scene, scene, scene], 1).feed(ids(PROMPT, PROMPT, PROMPT))
    assert engine_of(model).last["decoder_step"]["visual"].shape == (TOKENS, WIDTH)


def test_steps_equal_one_prefill(model: Model) -> None:
    """The same ids at once, one by one, and in parts: equal logits and states at every position."""
    pipeline = pipeline_of(model)
    scenes = encoded(model, 2)
    random = np.random.default_rng(1)
    more = random.integers(3, 20, (2, 9))
    whole = pipeline.session(scenes, 1)
    prompt = ids(PROMPT, PROMPT)
    top, states = whole.feed(np.concatenate([prompt, more], axis=1))
    stepped = pipeline.session(scenes, 1)
    stepped.feed(prompt)
    for i in range(9):
        last, state = stepped.step(more[:, i])
        np.testing.assert_allclose(state, states[:, len(PROMPT) - 1 + TOKENS + i], atol=1e-6)
    np.testing.assert_allclose(last.logits, top.logits, atol=1e-6)
    np.testing.assert_array_equal(last.ids, top.ids)
    np.testing.assert_allclose(stepped.states, whole.states, atol=1e-6)
    parted = pipeline.session(scenes, 1)
    parted.feed(prompt)
    parted.feed(more[:, :4])
    np.testing.assert_allclose(parted.feed(more[:, 4:])[0].logits, top.logits, atol=1e-6)


def test_rows_do_not_touch_each_other(model: Model) -> None:
    pipeline = pipeline_of(model)
    scenes = encoded(model, 3)
    rows = [[*PROMPT, 9 + i, 12] for i in range(3)]
    together = pipeline.session(scenes, 1)
    top, states = together.feed(ids(*rows))
    following = together.step(np.array([3, 4, 5]))[0].log_probs.copy()
    for i, (scene, row) in enumerate(zip(scenes, rows, strict=True)):
        alone = pipeline.session([scene], 1)
        own = alone.feed(ids(row))
        np.testing.assert_allclose(own[0].log_probs[0], top.log_probs[i], atol=1e-6)
        np.testing.assert_allclose(own[1][0], states[i], atol=1e-6)
        np.testing.assert_allclose(alone.step(np.array([3 + i]))[0].log_probs[0], following[i], atol=1e-6)


def test_rewind_repeats_exactly(model: Model) -> None:
    session = pipeline_of(model).session(encoded(model, 1), 1)
    session.feed(ids(PROMPT))
    position = session.position

    def steps() -> list[np.ndarray]:
        found = [session.step(np.array([token])) for token in (9, 10)]
        top, _ = found[-1]
        return [top.ids.copy(), top.log_probs.copy(), session.states[:, -2:].copy()]

    first = steps()
    session.rewind(position)
    assert session.position == position == session.states.shape[1]
    session.feed(ids([14, 15, 16]))
    session.rewind(position)
    for a, b in zip(first, steps(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="rewind"):
        session.rewind(position + 3)


def test_the_cache_grows_with_the_text(tmp_path: Path) -> None:
    """Cost follows length: room comes in blocks, and what was said before stays."""
    model, engine = make_model(tmp_path, capacity=BLOCK + 40)
    pipeline = pipeline_of(model)
    [scene] = encoded(model, 1)
    small, large = pipeline.session([scene], 1), pipeline.session([scene], BLOCK + 40)
    small.feed(ids(PROMPT)), large.feed(ids(PROMPT))
    shape = engine.last["decoder_step"]["self_key.0"].shape
    assert shape == (1, 1, BLOCK + 40, 2) and small.nbytes < large.nbytes
    random = np.random.default_rng(2)
    for count in range(BLOCK + 40 - small.position):
        token = random.integers(3, 20, 1)
        ours, theirs = small.step(token), large.step(token)
        if count % 16 == 0 or small.position > BLOCK:
            np.testing.assert_array_equal(ours[0].ids, theirs[0].ids)
            np.testing.assert_array_equal(ours[0].log_probs, theirs[0].log_probs)
    np.testing.assert_array_equal(small.states, large.states)
    for too_much in (lambda: small.step(np.array([4])), lambda: small.feed(ids([4]))):
        with pytest.raises(TextTooLongError, match=f"{BLOCK + 41} tokens"):
            too_much()
    assert small.position == BLOCK + 40
    small.rewind(4)
    small.step(np.array([4]))


def test_a_long_prompt_runs_in_parts(tmp_path: Path) -> None:
    model, engine = make_model(tmp_path)
    whole, _ = pipeline_of(model).session(encoded(model, 1), 1).feed(ids([*PROMPT, *range(3, 30)]))
    narrow, other = make_model(tmp_path, dims={**make_manifest().dims, "S": DimRange(1, 1, 10)})
    session = pipeline_of(narrow).session(encoded(narrow, 1), 1)
    parts, _ = session.feed(ids([*PROMPT, *range(3, 30)]))
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-6)
    assert other.widths == [10, 10, 10, 6] and engine.widths == [36]


@pytest.mark.parametrize(
    ("feed", "error", "message"),
    [
        (lambda s: s.feed(ids([1, 2])), ValueError, r"ids must be \[2, S\]"),
        (lambda s: s.feed(np.zeros((2, 0), np.int64)), ValueError, "ids must be"),
        (lambda s: s.feed(ids([1, IMAGE_ID], [1, 2])), ValueError, "equally many pictures"),
        (lambda s: s.feed(ids([BBOX], [BBOX]), [np.zeros((1, WIDTH), np.float32)]), ValueError, "1 rows of vectors"),
        (lambda s: s.feed(ids([BBOX], [BBOX])), PromptError, "names 1 regions by <bbox>, and 0 boxes"),
        (lambda s: s.feed(ids([3], [4]), [None, np.ones((2, WIDTH), np.float32)]), PromptError, "names 0 .* 2 boxes"),
        (lambda s: s.feed(ids(*[[3] * 500] * 2)), TextTooLongError, "509 tokens"),
    ],
)
def test_what_cannot_be_fed_changes_nothing(model: Model, feed: Callable, error: type[Exception], message: str) -> None:
    session = pipeline_of(model).session(encoded(model, 2), 1)
    session.feed(ids(PROMPT, PROMPT))
    position = session.position
    with pytest.raises(error, match=message):
        feed(session)
    assert session.position == position


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_run_that_fails_consumes_nothing(tmp_path: Path, part: int) -> None:
    model, engine = make_model(tmp_path, dims={**make_manifest().dims, "S": DimRange(1, 1, 10)})
    session = pipeline_of(model).session(encoded(model, 1), 1)
    session.feed(ids(PROMPT))
    expected = session.step(np.array([7]))[0].log_probs.copy()
    position, more = session.position, ids(list(range(3, 27)))
    engine.fail_at = engine.runs["decoder_step"] + part
    with pytest.raises(RuntimeError):
        session.feed(more)
    assert session.position == position
    if part == 1:
        with pytest.raises(RuntimeError):
            session.step(np.array([3]))
        assert session.position == position
    engine.fail_at = None
    session.rewind(position - 1)
    np.testing.assert_array_equal(session.step(np.array([7]))[0].log_probs, expected)


def test_limits_of_the_bundle(model: Model, tmp_path: Path) -> None:
    pipeline = pipeline_of(model)
    [scene] = encoded(model, 1)
    for count in (0, 4):
        with pytest.raises(PromptError, match=f"{count} texts at once"):
            pipeline.session([scene] * count, 1)
    assert pipeline.chunks([scene] * 7) == [[0, 1, 2], [3, 4, 5], [6]]
    assert pipeline.chunks([scene] * 3, regions=16) == [[0, 1], [2]]  # 40 vectors: two rows of 4 + 16
    with pytest.raises(PromptError, match="more than the bundle takes"):
        pipeline.chunks([scene], regions=40)
    with pytest.raises(ValueError, match="2 states for 1 scenes"):
        pipeline.masks(np.zeros((2, WIDTH), np.float32), [scene])
    with pytest.raises(PromptError, match="cache_capacity 601"):
        make_model(tmp_path, capacity=601)


def test_a_bundle_without_masks_or_regions(tmp_path: Path) -> None:
    graphs = without("region_encoder", "grounding_encoder", "pixel_decoder")
    conversation = replace(make_manifest().conversation, region_id=None)  # type: ignore[type-var]
    model, engine = make_model(tmp_path, graphs=graphs, conversation=conversation)
    pipeline = pipeline_of(model)
    [scene] = encoded(model, 1)
    assert scene.resized is None and model.info.tasks == ("caption", "ask")
    with pytest.raises(TaskError, match="makes no masks"):
        pipeline.masks(np.zeros((1, WIDTH), np.float32), [scene])
    with pytest.raises(TaskError, match="takes no boxes"):
        pipeline.regions([scene], [np.zeros((1, 4))])
    pipeline.session([scene], 1).feed(ids([*PROMPT, BBOX]))  # only an id, as the model knows no regions
    model.warmup()
    assert set(engine.runs) == {"global_encoder", "decoder_step"}


def test_scores_that_are_not_finite(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    [scene] = encoded(model, 1)
    broken = {"masks": np.zeros((1, 16, 16), np.float32), "iou": np.full(1, np.nan, np.float32)}
    monkeypatch.setattr(engine_of(model), "pixel_decoder", lambda **_: broken)
    with pytest.raises(EngineError, match="not finite"):
        pipeline_of(model).masks(np.zeros((1, WIDTH), np.float32), [scene])


def test_warmup_and_info(model: Model) -> None:
    model.warmup()
    assert set(engine_of(model).runs) == set(model.manifest.graphs)
    info = model.info
    assert info.family == "glamm" and info.cache_capacity == 400
    assert set(info.tasks) == set(model.manifest.tasks)


def test_many_threads_get_what_one_gets(model: Model) -> None:
    """Sessions share nothing, and threads may ask for the same picture's masks at once."""
    pipeline = pipeline_of(model)
    picture = pictures(1)

    def run(scene: GlammFeatures) -> list[np.ndarray]:
        session = pipeline.session([scene], 1)
        top, _ = session.feed(ids(PROMPT))
        said = []
        for _ in range(12):
            top, state = session.step(top.ids[:, 0].copy())
            said += [top.log_probs.copy(), state.copy()]
        return [*said, *pipeline.masks(session.states[0, -2:], [scene, scene])]

    expected = run(pipeline.encode(picture)[0])
    [shared] = pipeline.encode(picture)
    found: dict[int, list[np.ndarray]] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: run(shared)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        for a, b in zip(found[n], expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_family_has_its_pipeline(model: Model, tmp_path: Path) -> None:
    pixel, engine = make_pixel_model(tmp_path)
    assert isinstance(make_pipeline(pixel.bundle, engine), Pipeline)
    with pytest.raises(BundleFormatError, match="'pixelllm', not 'glamm'"):
        Pipeline(model.bundle, engine)
    strange = replace(model.manifest, model=replace(model.manifest.model, family="other"))
    with pytest.raises(BundleFormatError, match="'pixelllm' and 'glamm', not 'other'"):
        make_pipeline(Bundle(tmp_path, strange), engine)


def test_tasks_of_the_other_family_are_refused(model: Model, tmp_path: Path) -> None:
    other = tmp_path / "pixel"
    other.mkdir()
    pixel, _ = make_pixel_model(other)
    scene, own = model.encode(pictures(1)[0]), pixel.encode(pictures(1)[0])
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: scene.trace("a mug"), "'fake' cannot trace: models of the family 'glamm'"),
        (lambda: scene.segment(points=[(1, 1)]), "cannot segment: .*'glamm'"),
        (scene.dense_captions, "cannot make dense captions: .*'glamm'"),
        (own.grounded_caption, "cannot make grounded captions: .*'pixelllm'"),
        (own.stream_grounded_caption, "cannot make grounded captions: .*'pixelllm'"),
        (lambda: own.ask("what?"), "cannot answer questions: .*'pixelllm'"),
        (own.chat, "cannot chat: .*'pixelllm'"),
        (lambda: own.ground_phrases("a mug"), "cannot ground phrases: .*'pixelllm'"),
    ]
    for call, message in calls:
        with pytest.raises(TaskError, match=message):
            call()


def test_a_scene_that_grew_makes_others_go(tmp_path: Path) -> None:
    """Masks come later than the scene, and count against the budget all the same."""
    model, _ = make_model(tmp_path)
    pipeline = pipeline_of(model)
    one, two, three = pictures(3)
    fresh = model.encode(one).nbytes + model.encode(two).nbytes
    tight = Model(pipeline, scene_budget_mb=(fresh + model.encode(three).nbytes) / 1e6)
    first, second = tight.encode(one), tight.encode(two)
    features = second.features
    assert isinstance(features, GlammFeatures)
    features.sam = np.zeros(2000, np.float32)
    tight.encode(three)
    assert tight.encode(one) is not first


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    """The tiny bundle of random weights on onnxruntime."""
    with deixis.load(Path(__file__).parents[1] / "golden" / "tiny_glamm", device="cpu", threads=1) as model:
        yield model


def prompt_of(pipeline: GlammPipeline, count: int) -> tuple[list[int], np.ndarray]:
    """A prompt that shows a picture, and random ids [count, 20] without marks."""
    spec = pipeline.conversation
    prompt = [spec.begin_id, 5, spec.image_start_id, IMAGE_ID, spec.image_end_id, 7]
    return prompt, np.random.default_rng(3).integers(3, spec.image_start_id, (count, 20))


def test_real_graphs_in_place_and_in_parts(tiny: Model) -> None:
    """Prefill and steps through the bound cache equal one run on arrays of their own; rows equal rows alone."""
    pipeline = pipeline_of(tiny)
    scenes = encoded(tiny, 2)
    prompt, more = prompt_of(pipeline, 2)
    whole = pipeline.session(scenes, 1)
    top, _ = whole.feed(np.concatenate([ids(prompt, prompt), more], axis=1))
    stepped = pipeline.session(scenes, 1)
    stepped.feed(ids(prompt, prompt))
    for i in range(20):
        last, _ = stepped.step(more[:, i])
    np.testing.assert_allclose(last.logits, top.logits, atol=1e-4)
    np.testing.assert_allclose(stepped.states, whole.states, atol=1e-4)
    assert np.abs(np.diff(whole.states, axis=1)).max(axis=2).min() > 1e-3  # every position says something else

    length = whole.position
    cache = SelfCache(tiny.manifest.caches.self_cache, 1, length)
    index = np.full((1, length), -1, np.int64)
    index[:, 3 : 3 + len(scenes[1].features)] = np.arange(len(scenes[1].features))
    row = np.concatenate([prompt[:3], np.zeros(len(scenes[1].features), np.int64), prompt[4:], more[1]])[None]
    feed = {"ids": row, "visual": scenes[1].features, "embed_index": index, "position": np.zeros(1, np.int64)}
    feed["banned"] = np.full(1, -1)
    alone = pipeline.engine.run("decoder_step", {**feed, **cache.inputs()})
    np.testing.assert_allclose(alone["logits"][0], top.logits[1], atol=1e-4)
    np.testing.assert_allclose(alone["top_log_probs"][0], top.log_probs[1], atol=1e-4)
    np.testing.assert_allclose(alone["states"][0], whole.states[1], atol=1e-4)


def test_real_graphs_grow_and_rewind(tiny: Model) -> None:
    pipeline = pipeline_of(tiny)
    [scene] = encoded(tiny, 1)
    prompt, _ = prompt_of(pipeline, 1)
    tokens = np.random.default_rng(4).integers(3, 200, BLOCK)
    small, large = pipeline.session([scene], 1), pipeline.session([scene], pipeline.capacity)
    for session in (small, large):
        session.feed(ids(prompt))
        session.feed(tokens[None])
        session.rewind(session.position - 3)
    for token in tokens[:5, None]:
        ours, theirs = small.step(token), large.step(token)
        np.testing.assert_allclose(ours[0].log_probs, theirs[0].log_probs, atol=1e-4)
    assert small.nbytes == large.nbytes  # both two blocks by now


def test_real_masks_and_regions_in_batches(tiny: Model) -> None:
    pipeline = pipeline_of(tiny)
    scenes = encoded(tiny, 3)
    width = scenes[0].features.shape[1]
    states = np.random.default_rng(5).normal(size=(4, width)).astype(np.float32)
    owners = [scenes[i] for i in (2, 0, 2, 1)]
    boxes = [np.array([[2, 3, 20, 25.0]]), np.zeros((0, 4)), np.array([[0, 0, 9, 9], [5, 5, 40, 40.0]])]
    logits, iou = pipeline.masks(states, owners)
    regions = pipeline.regions(scenes, boxes)
    for i, scene in enumerate(owners):
        one, score = pipeline.masks(states[i : i + 1], [scene])
        np.testing.assert_allclose(one[0], logits[i], atol=1e-4)
        np.testing.assert_allclose(score[0], iou[i], atol=1e-4)
    for scene, own, vectors in zip(scenes, boxes, regions, strict=True):
        for box, vector in zip(own, vectors, strict=True):
            np.testing.assert_allclose(pipeline.regions([scene], [box[None]])[0][0], vector, atol=1e-4)
    mask = segment_mask(logits[0], owners[0].geometry)
    assert mask.shape == owners[0].geometry.original
