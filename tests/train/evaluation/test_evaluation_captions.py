"""METEOR and CIDEr through pycocoevalcap, and which things a text names."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from deixis_train.evaluation.captions import caption_scores
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.things import named_things, names_thing

COLOURS, KINDS = {"red", "blue"}, {"mug", "ball", "coffee pot", "pot"}


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs a Java runtime")
def test_scores_of_right_wrong_and_odd_texts(capfd: pytest.CaptureFixture[str]) -> None:
    predicted = ["Two dogs play in the snow.", "", "a green\nboat | on a lake", "a man rides a horse"]
    references = [
        ["two dogs play in the snow"],
        ["a red mug"],
        ["a green boat on a lake", ""],
        ["the tall white tower"],
    ]
    scores = caption_scores(predicted, references)
    # METEOR of the very words is 1 but for a small penalty of chunks; CIDEr of them is 10.
    assert scores.meteors[0] == pytest.approx(1.0, abs=0.01) and scores.ciders[0] == pytest.approx(10, abs=1e-3)
    assert scores.meteors[1] == 0 and scores.ciders[1] == 0
    # A line break and METEOR's own field mark are no words. CIDEr averages over references, METEOR takes the best.
    assert scores.meteors[2] == pytest.approx(1.0, abs=0.01) and scores.ciders[2] == pytest.approx(5, abs=1e-3)
    assert scores.meteors[3] < 0.2 and scores.ciders[3] < 0.1
    assert scores.cider == pytest.approx(scores.ciders.mean())
    assert 0 < scores.meteor < 1
    capfd.readouterr()  # the Java programs talk


def test_without_java_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EvaluationError, match="apt-get install default-jre-headless") as caught:
        caption_scores(["a mug"], [["a mug"]])
    assert "\n" not in str(caught.value)


def test_a_java_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(EvaluationError, match="'java -version' fails"):
        caption_scores(["a mug"], [["a mug"]])


def test_texts_need_references() -> None:
    with pytest.raises(EvaluationError, match="no reference"):
        caption_scores(["a mug"], [[]])
    with pytest.raises(EvaluationError, match="no reference has a word"):
        caption_scores(["a mug"], [["."]])
    with pytest.raises(EvaluationError, match="cannot be judged"):
        caption_scores([], [])


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("There is a Red mug, a blue ball and a red mug.", {("red", "mug"): 2, ("blue", "ball"): 1}),
        ("a red large mug", {("red", "mug"): 1}),
        ("a red one and a mug", {}),
        ("a red, mug", {}),
        ("a mug red ball", {("red", "ball"): 1}),
        ("a red mug ball", {("red", "mug"): 1}),  # the colour belongs to the first kind after it
        ("a red coffee pot, a blue pot", {("red", "coffee pot"): 1, ("blue", "pot"): 1}),
        ("a green mug, a red cat, redmug", {}),
        ("", {}),
    ],
)
def test_named_things(text: str, things: dict[tuple[str, str], int]) -> None:
    assert named_things(text, COLOURS, KINDS) == Counter(things)


def test_names_thing() -> None:
    assert names_thing("A small red Coffee Pot.", "red", "coffee pot")
    assert not names_thing("a small red pot", "red", "coffee pot")
    assert not names_thing("a reddish mug", "red", "mug")
