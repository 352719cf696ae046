"""Tasks on the fake bundle, whose every place can be told by hand: words, boxes, masks, batches, streams, limits."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes import LENGTH, SIZE, FakeEngine, make_manifest, make_model, make_tokenizer
from pictures import make_picture

from deixis import DecodeOptions, Model, Prompt
from deixis.bundle import TaskSpec
from deixis.decoding import DecodeRules
from deixis.errors import (
    BundleFormatError,
    CancelledError,
    ClosedError,
    DeadlineError,
    PromptError,
    TaskError,
    TextTooLongError,
)
from deixis.readout import valid_positions
from deixis.tokenizer import words_of


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_model(tmp_path)[0]


def items(model: Model) -> list:
    """Seven prompts on three pictures of different shape, of different token counts, whole and region."""
    scenes = model.encode([make_picture(20, 30, 1), make_picture(64, 48, 2), make_picture(33, 32, 3)])
    prompts = [
        Prompt(),
        Prompt(box=(2, 3, 15, 17)),
        Prompt(points=[(4, 5)]),
        Prompt(points=[(4, 5), (9, 9)], labels=[1, 0]),
        Prompt(box=(-5, 0, 20, 90)),
        Prompt(),
        Prompt(points=[(1, 1)]),
    ]
    return [(scenes[i % 3], prompt) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("end_bias", [-10.0, 0.0, 3.0])
def test_captions_in_a_batch_equal_one_by_one(tmp_path: Path, beams: int, end_bias: float) -> None:
    model, engine = make_model(tmp_path, engine=FakeEngine(end_bias))
    options = DecodeOptions(beams=beams)
    pairs = items(model)
    together = model.caption_batch(pairs, options)
    alone = [model.caption_batch([pair], options)[0] for pair in pairs]
    assert together == alone
    assert len({caption.ids for caption in together}) > 1 or end_bias > 0
    assert engine.runs["decoder_step"] > 0


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("end_bias", [-10.0, 0.0, 1.0, 3.0])
def test_stream_equals_plain(tmp_path: Path, beams: int, end_bias: float) -> None:
    model, _ = make_model(tmp_path, engine=FakeEngine(end_bias))
    options = DecodeOptions(beams=beams)
    for scene, prompt in items(model):
        plain = model.caption_batch([(scene, prompt)], options)[0]
        stream = model.stream_caption(scene, prompt, options)
        assert tuple(stream) == plain.words
        assert stream.caption == plain
        assert model.stream_caption(scene, prompt, options).caption == plain  # without taking the words


def test_words_come_while_decoding(tmp_path: Path) -> None:
    """A word is given as soon as its last piece is consumed: at least one before the last step."""
    model, engine = make_model(tmp_path, engine=FakeEngine(-10))
    stream = model.encode(make_picture(20, 30, 1)).stream_caption()
    next(stream)
    early = engine.runs["decoder_step"]
    assert early < LENGTH - 2
    # one extra step for the last place
    assert not stream.caption.finished and engine.runs["decoder_step"] == LENGTH - 1


def test_caption_words_places_and_scores(tmp_path: Path) -> None:
    """Ids, pieces, spans, points and scores of a caption against a calculation of their own from the fake's formula."""
    model, _ = make_model(tmp_path)
    scene = model.encode(make_picture(20, 30, 1))
    caption = scene.caption()
    assert caption.ids and caption.text == make_tokenizer().decode(list(caption.ids)).rstrip()
    sums = np.cumsum(caption.ids)
    first = np.stack([(np.arange(len(sums)) + 1) / 16, np.array(caption.ids) / 32], -1) * (30, 20)
    second = np.stack([sums / 256, np.full(len(sums), 0.5)], -1) * (30, 20)
    pieces = [make_tokenizer().id_to_token(i) for i in caption.ids]
    groups: list[list[int]] = []
    for index, piece in enumerate(pieces):
        if (piece.startswith("▁") and not (groups and all(pieces[i] == "▁" for i in groups[-1]))) or not groups:
            groups.append([])
        groups[-1].append(index)
    groups = [group for group in groups if any(pieces[i] != "▁" for i in group)]
    assert len(caption.words) == len(groups) > 1
    for word, group in zip(caption.words, groups, strict=True):
        assert word.text == caption.text[word.start : word.end] == "".join(pieces[i] for i in group).replace("▁", "")
        both = np.concatenate([first[group], second[group]])
        np.testing.assert_allclose(word.points, [both.min(0), both.max(0)], rtol=1e-5)
        assert word.score is not None and word.score < 0


def test_words_of_pieces() -> None:
    text = "a mugs. ox"
    spans = [(0, 1), (1, 2), (2, 5), (5, 6), (6, 7), (7, 9), (9, 10)]  # "a", " ", "mug", "s", ".", " o", "x"
    words = words_of(text, spans)
    assert [(text[w.start : w.end], w.pieces) for w in words] == [("a", (0,)), ("mugs.", (1, 2, 3, 4)), ("ox", (5, 6))]
    assert words_of("  ", [(0, 1), (1, 2)]) == []
    assert words_of(text, [*spans[:4], (6, 6), *spans[4:]])[1].pieces == (1, 2, 3, 5)
    for i, word in enumerate(words):
        assert words_of(text, spans, word.end) == words[i + 1 :]


def test_valid_positions_are_the_reference_rule() -> None:
    spec = make_manifest().tokenizer
    ids = np.array([0, 5, 6, 1, 0, 0])
    assert valid_positions(ids, "begin,end,pad", spec).tolist() == [False, True, True, False, False, False]
    assert valid_positions(ids, "^end-1", spec).tolist() == [False, False, True, False, False, False]
    assert valid_positions(np.array([0, 5, 6]), "^end-1", spec).tolist() == [False] * 3  # cut: no end, no place
    with pytest.raises(ValueError, match="start"):
        valid_positions(ids, "start", spec)


def test_refer_reads_the_box_before_the_end(model: Model) -> None:
    scene = model.encode(make_picture(20, 30, 1))
    ids = make_tokenizer().encode("the red mug").ids
    corners = np.array([[len(ids) / 16, ids[-1] / 32], [sum(ids) / 256, 0.5]])
    expected = np.concatenate([corners.min(0), corners.max(0)]) * (30, 20, 30, 20)
    found = scene.refer("the red mug")
    np.testing.assert_allclose(found.box, expected, rtol=1e-6)
    assert found.mask is not None and found.mask.size == (20, 30) and found.score is not None
    bare = scene.refer("the red mug", mask=False)
    assert bare.box == found.box and bare.mask is None and bare.score is None


def test_refer_and_trace_and_segment_batches_equal_one_by_one(tmp_path: Path) -> None:
    model, engine = make_model(tmp_path)
    scenes = [scene for scene, _ in items(model)]
    texts = ["the mug", "red mug", "a box", "the table", "mugs", "the red box", "a"]
    pairs = list(zip(scenes, texts, strict=True))
    assert model.refer_batch(pairs) == [model.refer_batch([pair])[0] for pair in pairs]
    assert model.trace_batch(pairs) == [model.trace_batch([pair])[0] for pair in pairs]
    prompts = [pair for pair in items(model) if not pair[1].is_whole]
    before = engine.runs["mask_decoder"]
    together = model.segment_batch(prompts)
    assert engine.runs["mask_decoder"] - before == 2  # by token count: boxes and single points, two points
    assert together == [scene.segment(p.box, p.points, p.labels) for scene, p in prompts]


def test_trace_keeps_the_users_text(model: Model) -> None:
    trace = model.encode(make_picture(20, 30, 1)).trace("the  seeful box.")
    assert trace.text == "the  seeful box."
    assert [(w.text, w.start, w.end, w.score) for w in trace.words] == [
        ("the", 0, 3, None),
        ("seeful", 5, 11, None),
        ("box.", 12, 16, None),
    ]
    assert all(word.points for word in trace.words)


def test_segment_masks(model: Model) -> None:
    """The fake's mask is the prompt's box in input pixels; a picture of 64 x 48 is halved."""
    scene = model.encode(make_picture(64, 48, 2))
    found = scene.segment(box=(8, 16, 32, 48))
    box = np.array(found.box)
    np.testing.assert_allclose(box, (8, 16, 32, 48), atol=4)
    several = scene.segment(box=(8, 16, 32, 48), multimask=True)
    assert [round(s.score - several[-1].score, 4) for s in several] == [0.2, 0.1, 0]
    assert found not in several
    assert scene.segment(points=[(20, 20)], labels=[1]).mask.size == (64, 48)


def test_prompt_layout(tmp_path: Path) -> None:
    """Points and labels that reach the graphs: section 5's padding for boxes, one padding point behind points."""
    for box_as, labels in (("box", [2, 3, -2, -2, -2]), ("corners", [1, 1, 1, 1, -1])):
        manifest = make_manifest()
        manifest = dataclasses.replace(manifest, prompts=dataclasses.replace(manifest.prompts, box_as=box_as))
        model, engine = make_model(tmp_path, manifest)
        scene = model.encode(make_picture(64, 48, 2))
        scene.caption()
        given = engine.last["prompt_extractor"]
        assert given["labels"].tolist() == [labels]
        last = given["points"][0, 1 if box_as == "box" else 3].tolist()
        assert last == [SIZE * 48 // 64, SIZE]  # whole picture: its size after the resize
        scene.caption(points=[(10, 20), (30, 40)], labels=[0, 1])
        given = engine.last["prompt_extractor"]
        assert given["labels"].tolist() == [[0, 1, -1]]
        assert given["points"].tolist() == [[[5, 10], [15, 20], [0, 0]]]
    assert scene.caption(box=(-9, 10, 20, 99)).box == (0, 10, 20, 64)


def test_contexts_are_padded_to_the_fixed_length(tmp_path: Path) -> None:
    """The mask adapter reads positions that attend to the padding too, so its amount must not depend on the batch."""
    model, engine = make_model(tmp_path)
    scene = model.encode(make_picture(20, 30, 1))
    model.refer_batch([(scene, "mug"), (scene, "the red mug")])
    context = engine.last["text_encoder"]["context_ids"]
    assert context.shape == (2, model.manifest.tasks["refer"].instruction_tokens)
    assert [(row > 0).sum() for row in context] == [4, 6] and context[0, 3] == context[1, 5] == 1


def test_length_limits(tmp_path: Path) -> None:
    model, _ = make_model(tmp_path, engine=FakeEngine(-10))
    scene = model.encode(make_picture(20, 30, 1))
    whole = scene.caption()
    assert len(whole.ids) == LENGTH - 2 and not whole.finished
    short = scene.caption(options=DecodeOptions(max_new_tokens=3))
    assert short.ids == whole.ids[:3] and not short.finished and all(word.points for word in short.words)
    longer = scene.caption(options=DecodeOptions(max_new_tokens=20))
    assert len(longer.ids) == 20 and longer.ids[: LENGTH - 2] == whole.ids
    small, _ = make_model(tmp_path, engine=FakeEngine(-10), capacity=6)
    cut = small.encode(make_picture(20, 30, 1)).caption(options=DecodeOptions(max_new_tokens=20))
    assert cut.ids == whole.ids[:5] and not cut.finished  # 6 places, one of them for the begin token


def test_deadline_and_cancel(model: Model) -> None:
    scene = model.encode(make_picture(20, 30, 1))
    with pytest.raises(DeadlineError):
        scene.caption(options=DecodeOptions(deadline_ms=0))
    cancel = threading.Event()
    stream = scene.stream_caption(options=DecodeOptions(cancel=cancel))
    first = next(stream)
    cancel.set()
    with pytest.raises(CancelledError):
        list(stream)
    with pytest.raises(CancelledError):
        _ = stream.caption
    cancel.clear()
    assert scene.stream_caption().caption.words[0] == first


@pytest.mark.parametrize("task", ["caption", "refer", "trace", "segment"])
def test_every_task_takes_a_deadline_and_a_cancel_handle(tmp_path: Path, task: str) -> None:
    """A handle set during the n-th graph run ends the call before the next one; set in the last, it comes too late."""
    model, engine = make_model(tmp_path)
    scene, cancel, graph_run = model.encode(make_picture(20, 30, 1)), threading.Event(), engine.run
    ran: list[str] = []
    stop_in = 0

    def run(role: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ran.append(role)
        if len(ran) == stop_in:
            cancel.set()
        return graph_run(role, inputs)

    def call(**options: object) -> object:
        ran.clear()
        cancel.clear()
        scene.features.whole_prefix = None
        chosen = DecodeOptions(max_new_tokens=2, cancel=cancel, **options)  # type: ignore[arg-type]
        if task in ("caption", "segment"):
            return getattr(scene, task)(box=(1, 1, 9, 9), options=chosen)
        return getattr(scene, task)("the mug", options=chosen)

    engine.run = run  # type: ignore[method-assign]
    whole, count = call(deadline_ms=60_000), len(ran)
    assert count == {"caption": 5, "refer": 5, "trace": 3, "segment": 1}[task]
    for stop_in in range(1, count):
        with pytest.raises(CancelledError):
            call()
        assert len(ran) == stop_in
    stop_in = count
    assert call() == whole
    with pytest.raises(DeadlineError):
        call(deadline_ms=0)
    assert not ran


def test_the_whole_picture_is_extracted_once_per_scene(tmp_path: Path) -> None:
    model, engine = make_model(tmp_path)
    scenes = model.encode([make_picture(20, 30, 1), make_picture(64, 48, 2)])
    apart = make_model(tmp_path)[0].encode([make_picture(20, 30, 1), make_picture(64, 48, 2)])
    asked = [(scenes[i % 2], Prompt()) for i in range(4)]
    together = model.caption_batch(asked)
    assert engine.runs["prompt_extractor"] == 1 and len(engine.last["prompt_extractor"]["points"]) == 2
    assert together == [apart[i % 2].caption() for i in range(4)]
    for scene, other in zip(scenes, apart, strict=True):
        assert scene.caption() == other.caption() and scene.stream_caption().caption == other.caption()
        assert scene.refer("the mug") == other.refer("the mug") and scene.trace("mug") == other.trace("mug")
    assert engine.runs["prompt_extractor"] == 1
    assert scenes[0].caption(box=(0, 0, 30, 20)).box == (0, 0, 30, 20)  # a region has a prefix of its own
    assert engine.runs["prompt_extractor"] == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"box": (1, 2, 3)}, "four numbers"),
        ({"box": "here"}, "four numbers"),
        ({"box": (1, 2, float("nan"), 4)}, "nan"),
        ({"box": (5, 5, 5, 9)}, "no area"),
        ({"box": (9, 5, 5, 9)}, "no area"),
        ({"box": (100, 100, 120, 120)}, "outside the picture of 30x20"),
        ({"box": (1, 1, 5, 5), "points": [(1, 1)]}, "not both"),
        ({"box": (1, 1, 5, 5), "labels": [1]}, "labels belong to points"),
        ({"labels": [1]}, "labels belong to points"),
        ({"points": []}, "shape"),
        ({"points": [(1, 2, 3)]}, "shape"),
        ({"points": [(1, float("inf"))]}, "inf"),
        ({"points": [(1, 1), (31, 5)]}, "outside"),
        ({"points": [(1, 1)], "labels": [1, 0]}, "2 labels"),
        ({"points": [(1, 1)], "labels": [2]}, "0 .* or 1"),
        ({"points": [(1, 1)] * 6}, "at most 5"),
    ],
)
def test_bad_prompts(model: Model, bad: dict, message: str) -> None:
    scene = model.encode(make_picture(20, 30, 1))
    for call in (scene.caption, scene.segment):
        if call == scene.segment and set(bad) == {"labels"}:
            continue
        with pytest.raises(PromptError, match=message) as caught:
            call(**bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(PromptError):
        scene.stream_caption(**bad)  # at once, not at the first word


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("the § mug", "'§'"),
        ("a </s> b", "control"),
        (7, "string"),
        ("\ud800", "Unicode"),
    ],
)
def test_bad_texts(model: Model, text: str, message: str) -> None:
    scene = model.encode(make_picture(20, 30, 1))
    for call in (scene.refer, scene.trace):
        with pytest.raises(PromptError, match=message):
            call(text)


def test_texts_that_are_too_long(model: Model) -> None:
    scene = model.encode(make_picture(20, 30, 1))
    with pytest.raises(TextTooLongError, match=r"6 tokens, .* at most 5"):
        scene.refer("the red mug on the table")  # the instruction would lose its end
    scene.trace("the red mug on the table")
    with pytest.raises(TextTooLongError, match=r"13 tokens, .* at most 12"):
        scene.trace(" ".join(["mug"] * 13))


def test_what_a_bundle_lacks_is_named(tmp_path: Path) -> None:
    manifest = make_manifest()
    graphs = {role: graph for role, graph in manifest.graphs.items() if role not in ("mask_decoder", "decoder_step")}
    tasks = {name: task for name, task in manifest.tasks.items() if name != "trace"}
    model, _ = make_model(tmp_path, dataclasses.replace(manifest, graphs=graphs, tasks=tasks))
    scene = model.encode(make_picture(20, 30, 1))
    assert model.info.tasks == ("refer",)
    assert scene.refer("the mug", mask=False).mask is None
    for call, named in (
        (lambda: scene.refer("the mug"), "mask_decoder.*mask=False"),
        (lambda: scene.segment(box=(1, 1, 5, 5)), "mask_decoder"),
        (scene.caption, "decoder_step"),
        (lambda: scene.trace("the mug"), "task trace"),
    ):
        with pytest.raises(TaskError, match=named):
            call()


def test_bad_manifest_rule_is_refused_at_load(tmp_path: Path) -> None:
    tasks = {"caption": TaskSpec("a", 8, 8, points_at="middle")}
    with pytest.raises(BundleFormatError, match="middle"):
        make_model(tmp_path, make_manifest(tasks=tasks))
    with pytest.raises(PromptError, match="cache_capacity"):
        make_model(tmp_path, capacity=1)


def test_scenes_are_kept_by_content_within_the_budget(tmp_path: Path) -> None:
    model, engine = make_model(tmp_path)
    one, two = make_picture(20, 30, 1), make_picture(20, 30, 2)
    first = model.encode(one)
    assert model.encode(one.copy()) is first and model.encode([two, one])[1] is first
    assert model.encode(one[..., ::-1].copy(), channels="BGR") is first
    assert engine.runs["sam_encoder"] == 2
    small = Model(model.pipeline, scene_budget_mb=first.nbytes * 1.5 / 1e6)
    kept = small.encode(one)
    small.encode(two)
    assert small.encode(one) is not kept
    none = Model(model.pipeline, scene_budget_mb=0)
    assert none.encode(one) is not none.encode(one)


def test_close_and_foreign_scenes(tmp_path: Path) -> None:
    model, engine = make_model(tmp_path)
    other, _ = make_model(tmp_path)
    scene = model.encode(make_picture(20, 30, 1))
    with pytest.raises(PromptError, match="not one of this model"):
        other.caption_batch([(scene, Prompt())])
    with model:
        pass
    model.close()
    assert engine.closed
    for call in (scene.caption, lambda: model.encode(make_picture(20, 30, 1)), lambda: model.info):
        with pytest.raises(ClosedError):
            call()


def test_more_beams_than_the_bundle_allows(model: Model) -> None:
    with pytest.raises(PromptError, match="13 beams"):
        model.encode(make_picture(20, 30, 1)).caption(options=DecodeOptions(beams=13))
    assert DecodeRules(8, 0, 1).beams == 1
