"""Peaks, suppression and scores of the detector against plain loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis import detection
from deixis.bundle import DetectionSpec

# No ratio of small whole numbers comes near these, so rounding decides nothing; ties have a test of their own.
THRESHOLDS = [math.pi / 24, 1 / math.pi, math.pi / 6, math.sqrt(math.pi) / 2]
corner = st.integers(-6, 12)
side = st.integers(0, 12)
box = st.tuples(corner, corner, side, side).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
SPEC = DetectionSpec(candidates=9, proposals=5, max_detections=4)


def plain_iou(a: list[float], b: list[float]) -> float:
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / (union + 1e-8)


def plain_nms(boxes: list[list[float]], threshold: float, limit: int) -> list[int]:
    kept: list[int] = []
    for i, own in enumerate(boxes):
        if max(own) > 0 and len(kept) < limit and all(plain_iou(own, boxes[j]) < threshold for j in kept):
            kept.append(i)
    return kept


@given(st.lists(box, min_size=1, max_size=24), st.sampled_from(THRESHOLDS), st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_nms_is_the_plain_loop(boxes: list[list[float]], threshold: float, limit: int) -> None:
    found = detection.nms(np.array(boxes, np.float32), threshold, limit)
    assert found.tolist() == plain_nms(boxes, threshold, limit)


def test_the_threshold_itself_suppresses() -> None:
    boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 1], [0, 1, 2, 3]], np.float32)  # IoU 1/2 and 1/3 with the first
    assert detection.nms(boxes, 0.5, 3).tolist() == [0, 2]
    assert detection.nms(boxes, 0.500001, 3).tolist() == [0, 1, 2]


def test_boxes_without_a_coordinate_above_zero_and_empty_boxes() -> None:
    boxes = np.array([[-5, -5, 0, 0], [0, 0, 0, 0], [3, 3, 3, 3], [3, 3, 3, 3]], np.float32)
    assert detection.nms(boxes, 0.5, 4).tolist() == [2, 3]


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=20), st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_top_places(logits: list[int], count: int) -> None:
    boxes = np.arange(4.0 * len(logits), dtype=np.float32).reshape(-1, 4)
    found, scores = detection.top_places(boxes, np.array(logits, np.float32), count)
    # Stable: of equal scores the earlier place; and never all of them.
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: min(count, len(logits) - 1)]
    np.testing.assert_array_equal(found, boxes[order])
    np.testing.assert_allclose(scores, [1 / (1 + math.exp(-logits[i])) for i in order], rtol=1e-6)


def test_extreme_logits() -> None:
    with np.errstate(all="raise", under="ignore"):
        _, scores = detection.top_places(np.ones((3, 4), np.float32), np.array([-300, 0, 300], np.float32), 2)
    assert scores.tolist() == [1.0, 0.5]


def test_missing_proposals_are_the_last_candidate_without_a_score() -> None:
    boxes = np.array([[0, 0, 20, 20], [1, 0, 20, 20], [-8, 2, 4, 70]], np.float32)
    heatmap = np.array([2, 1, 0], np.float32)
    found, scores = detection.propose(boxes, heatmap, SPEC, 64)
    assert found.tolist() == [[0, 0, 20, 20]] + [[1, 0, 20, 20]] * 4  # one of three places is never a candidate
    assert (scores > 0).tolist() == [True, False, False, False, False]
    found, scores = detection.propose(boxes[[2, 0, 0]], heatmap, SPEC, 64)
    assert found[0].tolist() == [0, 2, 4, 64]  # clipped


def test_finish() -> None:
    boxes = np.array([[10, 10, 20, 30], [10, 10, 20, 30], [40, 40, 50, 50], [0, 0, 5, 5], [60, 60, 64, 64]], np.float32)
    scores = np.array([0.81, 0.64, 0.5, 0.4, 0.0], np.float32)
    logits = np.array([[0, 20], [0, 20], [0, 0], [20, 0], [0, 20]], np.float32)
    deltas = np.zeros((5, 4), np.float32)
    deltas[2] = [10, -5, 5 * math.log(2), 5 * 100]  # one width right, half a height up, twice as wide, capped height
    found = detection.finish(boxes, scores, logits, deltas, SPEC, 64)
    # The second lies on the first; the last two score too little, and stay as slots of -1 where there is room.
    assert found.count == 2
    np.testing.assert_allclose(found.scores, [0.9, 0.5, -1, -1], rtol=1e-6)
    half = 5 * math.exp(SPEC.max_log_scale)
    expected = [45, max(0, 40 - half), 64, min(64, 40 + half)]
    np.testing.assert_allclose(found.boxes[:2], [[10, 10, 20, 30], expected], rtol=1e-6)


def test_empty_slots_are_zero() -> None:
    boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (3, 1))
    found = detection.finish(
        boxes, np.full(3, 0.5, np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 4), np.float32), SPEC, 64
    )
    assert found.count == 1
    assert found.scores.tolist() == [0.5, 0, 0, 0] and not found.boxes[1:].any()


@pytest.mark.parametrize("threshold", [0.0, 0.49, 0.51])
def test_the_score_threshold(threshold: float) -> None:
    spec = dataclasses.replace(SPEC, score_threshold=threshold)
    one = (np.array([[1, 1, 9, 9]], np.float32), np.array([0.5], np.float32))
    found = detection.finish(*one, np.zeros((1, 2), np.float32), np.zeros((1, 4), np.float32), spec, 64)
    assert found.count == (threshold < 0.5)


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ranking_pairs_of_box_and_beam(scores: list[float], beams: int, count: int, seed: int) -> None:
    log_probs = -np.random.default_rng(seed).exponential(size=(len(scores), beams)).astype(np.float32)
    joint, of_box, of_beam = detection.rank_beams(np.array(scores, np.float32), log_probs, count)
    assert len(joint) == min(count, len(scores) * beams) == len(set(zip(of_box, of_beam, strict=True)))
    for value, i, k in zip(joint, of_box, of_beam, strict=True):
        assert value == pytest.approx(math.sqrt(max(scores[i], 0) * math.exp(log_probs[i, k])), rel=1e-5)
    assert (np.diff(joint) <= 0).all()
    everything = detection.join_scores(np.array(scores, np.float32)[:, None], log_probs)
    assert joint[0] == everything.max()


def test_slots_that_no_hypothesis_filled_have_no_score() -> None:
    joint = detection.join_scores(np.array([0.9, -1.0], np.float32), np.array([-1e7, -0.1], np.float32))
    assert joint.tolist() == [0, 0]
