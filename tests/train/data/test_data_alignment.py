"""Tokens and words meet their utterances as in the reference; narrations meet their traces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deixis_train.data.formats.localized_narratives import trace_of_utterances
from deixis_train.data.preparation.alignment import (
    align_by_rank,
    align_by_text,
    boxes_of_words,
    points_of_tokens,
    valid_utterances,
)
from deixis_train.data.samples import Utterance

GOLDEN = Path(__file__).parents[2] / "golden" / "pixelllm"
fraction = st.floats(-0.2, 1.2)
utterances = st.lists(
    st.builds(
        Utterance, st.sampled_from(["", " ", "a mug"]), st.tuples(fraction, fraction), st.tuples(*[fraction] * 4)
    ),
    max_size=12,
)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_points_of_tokens_equal_the_reference(case: str) -> None:
    with np.load(GOLDEN / "data_prep.npz") as file:
        golden = {k.split("/")[1]: v for k, v in file.items() if k.startswith(case)}
    spoken = [
        Utterance("word" if said else "", tuple(center), tuple(box))
        for said, center, box in zip(
            golden["utterance_nonempty"], golden["center"].tolist(), golden["bbox"].tolist(), strict=True
        )
    ]
    height, width = golden["image_hw"].tolist()
    for tokens, expected in zip(golden["tokens"], golden["out_points"], strict=True):
        owners = align_by_rank(int((tokens > 1).sum()), valid_utterances(spoken))
        points = points_of_tokens(tokens, owners, spoken, width, height)
        np.testing.assert_array_equal(points.reshape(-1, 2, 2), expected)


def test_traces_of_utterances_equal_the_reference() -> None:
    with np.load(GOLDEN / "metrics.npz") as file:
        golden = {k[3:]: v for k, v in file.items() if k.startswith("ln/")}
    shuffled = np.random.default_rng(0).permutation(golden["trace_xyt"])
    centers, boxes, points = trace_of_utterances(shuffled, golden["utt_start_end"])
    for ours, theirs in ((centers, "out_center"), (boxes, "out_bbox"), (points, "out_points")):
        np.testing.assert_allclose(ours, golden[theirs], rtol=0, atol=1e-12)


def test_a_trace_that_rests_or_has_one_point() -> None:
    centers, boxes, _ = trace_of_utterances([[0.25, 0.5, 3.0]], [(0.0, 1.0), (2.0, 2.0)])
    np.testing.assert_allclose(centers, [[0.25, 0.5]] * 2)
    np.testing.assert_allclose(boxes, [[0.25, 0.5, 0.25, 0.5]] * 2)
    doubled = [[0.1, 0.1, 0.0], [0.2, 0.2, 1.0], [0.3, 0.3, 1.0]]  # two points at the last moment
    centers, boxes, _ = trace_of_utterances(doubled, [(2.0, 3.0)])
    np.testing.assert_allclose(boxes, [[0.3, 0.3, 0.3, 0.3]])


@given(st.integers(0, 30), st.lists(st.booleans(), max_size=15))
def test_alignment_is_monotone_and_meets_valid_utterances_only(count: int, valid: list[bool]) -> None:
    owners = align_by_rank(count, valid)
    assert len(owners) == count
    if any(valid):
        assert (np.diff(owners) >= 0).all()
        assert all(valid[owner] for owner in owners)
        if count >= 1:
            assert owners[-1] == max(i for i, v in enumerate(valid) if v)
    else:
        assert (owners == -1).all()


@given(st.lists(st.text("abc", min_size=1), max_size=20), utterances, st.sampled_from(["rank", "text"]))
def test_every_word_of_a_narration_with_a_trace_has_a_box(words: list[str], spoken: list[Utterance], by: str) -> None:
    boxes = boxes_of_words(words, spoken, by)  # pyright: ignore[reportArgumentType]
    assert boxes.shape == (len(words), 4) and boxes.min(initial=0) >= 0 and boxes.max(initial=0) <= 1
    known = {tuple(np.clip(u.box, 0, 1)) for u, v in zip(spoken, valid_utterances(spoken), strict=True) if v}
    assert {tuple(box) for box in boxes} <= (known or {(0.0,) * 4})


def spoken_scene() -> list[Utterance]:
    return [
        Utterance("a red mug", (0.2, 0.2), (0.1, 0.1, 0.3, 0.3)),
        Utterance("beside", (0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),  # the mouse had not moved yet: no place
        Utterance("A Plate", (0.7, 0.7), (0.6, 0.6, 0.8, 0.8)),
    ]


def test_words_meet_the_utterance_that_spells_them() -> None:
    words = ["a", "red", "mug", ",", "beside", "a", "plate", "."]
    boxes = boxes_of_words(words, spoken_scene(), "text")
    mug, plate = [0.1, 0.1, 0.3, 0.3], [0.6, 0.6, 0.8, 0.8]
    np.testing.assert_allclose(boxes, [mug] * 4 + [[0] * 4] + [plate] * 3)


def test_white_space_before_a_word_belongs_to_it() -> None:
    owners = align_by_text("a red mug beside a plate", [9, 10, 16, 17, 18, 24], spoken_scene())
    assert owners is not None
    assert owners.tolist() == [0, -1, -1, 2, 2, 2]


def test_utterances_that_do_not_spell_the_caption() -> None:
    assert align_by_text("two dogs", [3, 8], spoken_scene()) is None
    np.testing.assert_array_equal(
        boxes_of_words(["two", "dogs"], spoken_scene(), "text"), boxes_of_words(["two", "dogs"], spoken_scene(), "rank")
    )
