"""Dense captions on the fake bundle: what is described, in which order, with which scores; batches, limits, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from dense_fakes import SPEC, make_dense_manifest, make_dense_model
from fakes import SIZE, make_model
from pictures import make_picture

from deixis import DecodeOptions, Model, Prompt
from deixis.bundle import DimRange
from deixis.cli import main, tasks
from deixis.errors import CancelledError, DeadlineError, EngineError, PromptError, TaskError

SHAPES = [(20, 30), (64, 48), (33, 32), (90, 31), (40, 41)]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return make_dense_model(tmp_path)[0]


def scenes_of(model: Model) -> list:
    return model.encode([make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)])


def test_objects_are_detections_with_the_captions_of_their_boxes(model: Model) -> None:
    for scene in scenes_of(model):
        found = scene.dense_captions()
        [detections] = model.pipeline.detect([scene.features], lambda: None)
        height, width = scene.size
        boxes = scene.geometry.to_original(detections.boxes[: detections.count].reshape(-1, 2, 2))
        visible = boxes.clip((0, 0), (width, height)).reshape(-1, 4)
        real = (visible[:, 2:] > visible[:, :2]).all(axis=1)
        assert [c.box for c in found] == [tuple(b) for b in visible[real].tolist()]
        assert [c.score for c in found] == detections.scores[: detections.count][real].tolist()
        for c in found:
            assert c.detection_score == c.score and c.text and len(c.words) == len(c.text.split())
            assert c.words[0].points is not None
    assert sum(len(scene.dense_captions()) for scene in scenes_of(model)) > 6


def test_a_box_is_described_as_by_caption(model: Model) -> None:
    """Where a detection lies inside the picture, its caption is that of a user's box."""
    scene = model.encode(make_picture(SIZE, SIZE, 3))
    found = scene.dense_captions()
    assert found
    for c in found:
        alone = scene.caption(box=c.box)
        assert (alone.text, alone.ids, alone.score) == (c.text, c.ids, c.caption_score)


@pytest.mark.parametrize(("beams", "join"), [(1, False), (1, True), (3, False), (3, True)])
def test_pictures_in_a_batch_equal_one_by_one(tmp_path: Path, beams: int, join: bool) -> None:
    model, _ = make_dense_model(tmp_path, end_bias=2.0)
    scenes, options = scenes_of(model), DecodeOptions(beams=beams)
    together = model.dense_captions_batch(scenes, join_scores=join, options=options)
    assert together == [scene.dense_captions(join_scores=join, options=options) for scene in scenes]
    assert len(set(together)) == len(scenes) and all(together)
    assert model.dense_captions_batch([]) == []


def test_all_boxes_decode_together_and_split_when_too_many(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, score_threshold=0.0)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    manifest = make_dense_manifest(spec)
    wide = dataclasses.replace(manifest, dims={**manifest.dims, "N": DimRange(1, 1, 64), "R": DimRange(1, 1, 64)})
    narrow, engine = make_dense_model(tmp_path / "a", spec)
    model, alone = make_model(tmp_path / "b", wide, type(engine)(-3.0))
    picture = make_picture(SIZE, SIZE, 3)
    found = model.encode(picture).dense_captions()
    assert len(found) == 5 and alone.runs["text_encoder"] == 1
    assert narrow.encode(picture).dense_captions() == found  # at most four rows at once
    assert engine.runs["text_encoder"] == 2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("join", [False, True])
def test_limit_and_least_score(model: Model, beams: int, join: bool) -> None:
    options = DecodeOptions(beams=beams)
    for scene in scenes_of(model):
        everything = scene.dense_captions(join_scores=join, options=options)
        scores = [c.score for c in everything]
        assert scores == sorted(scores, reverse=True) and all(0 < s <= 1 for s in scores)
        for least in [*scores, 0.0, 1.0]:
            some = scene.dense_captions(min_score=least, join_scores=join, options=options)
            assert some == tuple(c for c in everything if np.float32(c.score) >= np.float32(least))
        limited = scene.dense_captions(limit=2, join_scores=join, options=options)
        assert len(limited) == min(2, len(everything))
        # The two that the detector is surest of are described, and nothing else.
        surest = sorted({c.detection_score for c in scene.dense_captions()}, reverse=True)[:2]
        assert {c.detection_score for c in limited} <= set(surest)


def test_joined_scores(model: Model) -> None:
    scene = model.encode(make_picture(SIZE, SIZE, 3))
    plain = {c.box: c for c in scene.dense_captions()}
    for c in scene.dense_captions(join_scores=True):
        assert c.caption_score is not None and c.text == plain[c.box].text
        assert c.score == pytest.approx(math.sqrt(c.detection_score * math.exp(c.caption_score)), rel=1e-5)

    beams = DecodeOptions(beams=3)
    ranked = scene.dense_captions(join_scores=True, options=beams)
    assert len(ranked) == SPEC.max_detections
    for c in ranked:
        assert c.caption_score is not None
        assert c.score == pytest.approx(math.sqrt(c.detection_score * math.exp(c.caption_score)), rel=1e-5)
    assert len({(c.box, c.ids) for c in ranked}) == len(ranked)
    assert len({c.box for c in ranked}) < len(ranked)  # a box may come with several texts
    best = scene.dense_captions(join_scores=False, options=beams)
    assert ranked[0].score == pytest.approx(
        max(math.sqrt(c.detection_score * math.exp(c.caption_score or 0)) for c in best), rel=1e-5
    )


def test_the_bundle_says_whether_scores_are_joined(tmp_path: Path) -> None:
    model, _ = make_dense_model(tmp_path, dataclasses.replace(SPEC, join_scores=True))
    scene = model.encode(make_picture(SIZE, SIZE, 3))
    assert scene.dense_captions() == scene.dense_captions(join_scores=True)
    assert scene.dense_captions() != scene.dense_captions(join_scores=False)


def test_nothing_found_is_empty(tmp_path: Path) -> None:
    model, engine = make_dense_model(tmp_path, dataclasses.replace(SPEC, score_threshold=1.0))
    assert model.encode(make_picture(20, 30, 1)).dense_captions() == ()
    assert "prompt_extractor" not in engine.runs


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"limit": 0}, "limit must be a whole number from 1 on, found 0"),
        ({"limit": True}, "limit"),
        ({"min_score": 1.5}, "min_score must be a number from 0 to 1, found 1.5"),
        ({"min_score": float("nan")}, "min_score"),
        ({"min_score": "high"}, "min_score"),
        ({"join_scores": "yes"}, "join_scores must be True, False or None"),
        ({"options": DecodeOptions(beams=13)}, "13 beams are more than the bundle allows"),
    ],
)
def test_bad_choices(model: Model, bad: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        model.encode(make_picture(20, 30, 1)).dense_captions(**bad)


def test_a_bundle_without_a_detector_says_so(tmp_path: Path) -> None:
    model, _ = make_model(tmp_path)
    with pytest.raises(TaskError, match=r"cannot make dense captions: no graph box_proposals, graph box_refine, task "):
        model.encode(make_picture(20, 30, 1)).dense_captions()
    assert "dense_captions" not in model.info.tasks


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model, engine = make_dense_model(tmp_path)
    good = engine.box_refine
    engine.box_refine = lambda **inputs: {**good(**inputs), "deltas": np.full((1, 6, 4), np.nan, np.float32)}  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="not finite"):
        model.encode(make_picture(20, 30, 1)).dense_captions()


def test_deadline_cancel_and_warmup(tmp_path: Path) -> None:
    model, engine = make_dense_model(tmp_path)
    scene = model.encode(make_picture(20, 30, 1))
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(CancelledError):
        scene.dense_captions(options=DecodeOptions(cancel=cancel))
    with pytest.raises(DeadlineError):
        scene.dense_captions(options=DecodeOptions(deadline_ms=0))
    assert "box_proposals" not in engine.runs
    model.warmup()
    assert engine.runs["box_refine"] == 1 and "dense_captions" in model.info.tasks


def test_without_a_location_head_words_have_no_places(tmp_path: Path) -> None:
    manifest = make_dense_manifest()
    step = dataclasses.replace(manifest.graphs["decoder_step"], outputs={})
    bare = dataclasses.replace(manifest, graphs={**manifest.graphs, "decoder_step": step})
    (tmp_path / "with").mkdir()
    full, engine = make_dense_model(tmp_path / "with")
    model, _ = make_model(tmp_path, bare, type(engine)(-3.0))
    picture = make_picture(SIZE, SIZE, 3)
    scene, other = model.encode(picture), full.encode(picture)
    for mine, theirs in zip(scene.dense_captions(), other.dense_captions(), strict=True):
        assert (mine.text, mine.ids, mine.box) == (theirs.text, theirs.ids, theirs.box)
        assert all(word.points is None and word.box is None for word in mine.words)
    assert scene.caption().text == other.caption().text
    stream = scene.stream_caption()
    assert [word.text for word in stream] == [word.text for word in other.caption().words]
    assert stream.caption == scene.caption() == model.caption_batch([(scene, Prompt())])[0]
    beams = DecodeOptions(beams=3)
    assert scene.caption(options=beams).ids == other.caption(options=beams).ids


# ---- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line on a picture and the fake bundle."""
    from deixis.overlay import save_image

    save_image(tmp_path / "table.png", make_picture(60, 80, 3))
    monkeypatch.setattr(tasks, "load", lambda options: make_dense_model(tmp_path)[0])
    return ["dense-caption", str(tmp_path / "table.png")]


def test_command(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, drawn = tmp_path / "r.json", tmp_path / "o.png"
    assert main([*command, "--limit", "3", "--json", str(result), "--overlay", str(drawn)]) == 0
    out, err = capsys.readouterr()
    values = json.loads(result.read_text())
    assert err == "" and values["command"] == "dense-caption"
    assert 0 < len(values["results"]) <= 3 and drawn.stat().st_size > 1000
    for line, found in zip(out.splitlines(), values["results"], strict=True):
        assert line.startswith(f"{found['score']:.2f}  {found['text']}: box ")
        assert set(found) == {
            *("box", "text", "words", "score", "detection_score", "caption_score", "ids", "finished"),
        }

    assert main([*command, "--join-scores", "--beams", "2", "--json", "-"]) == 0
    joined = json.loads(capsys.readouterr().out)["results"]
    assert joined and all(found["score"] != found["detection_score"] for found in joined)
    assert main([*command, "--min-score", "1"]) == 0
    assert capsys.readouterr().out == "nothing found\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "0"), "'0' is not a whole number from 1 on"),
        (("--min-score", "1.1"), "'1.1' is not a number from 0 to 1"),
        (("--min-score", "much"), "'much' is not a number from 0 to 1"),
    ],
)
def test_bad_use(
    command: list[str], arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_command_on_a_bundle_without_a_detector(
    tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deixis.overlay import save_image

    save_image(tmp_path / "table.png", make_picture(60, 80, 3))
    code = main(["dense-caption", str(tmp_path / "table.png"), "--bundle", str(tiny_bundle), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "bundle 'tiny' cannot make dense captions: no graph box_proposals" in err
