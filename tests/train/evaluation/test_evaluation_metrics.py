"""Metrics against what the reference computed, and the properties that make them metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deixis_train.evaluation import boxes, dense_captions, masks, trace
from deixis_train.evaluation.dense_captions import Detections, Truth

GOLDEN = Path(__file__).parents[2] / "golden" / "pixelllm"
METRICS = np.load(GOLDEN / "metrics.npz")
LBM = np.load(GOLDEN / "lbm.npz")
PADDED = 64


def xyxy(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def some_boxes(least: int, most: int) -> st.SearchStrategy[np.ndarray]:
    """[N, 4] XYXY within the unit square, right side out."""
    corners = arrays(np.float64, st.tuples(st.integers(least, most), st.just(4)), elements=st.floats(0, 1, width=32))
    return corners.map(lambda c: np.concatenate([np.minimum(c[:, :2], c[:, 2:]), np.maximum(c[:, :2], c[:, 2:])], 1))


# ---- referring


def test_referring_as_the_reference() -> None:
    ious, of_masks, inter, union = [], [], [], []
    for image in range(5):
        values = {key: METRICS[f"ref/img{image}_{key}"] for key in ("det_boxes", "det_masks", "size", "orig_size")}
        valid, original = tuple(map(int, values["size"])), tuple(map(int, values["orig_size"]))
        wanted = xyxy(METRICS[f"ref/img{image}_gt_boxes_xywh_orig"])
        found = boxes.to_picture(values["det_boxes"], valid, original)
        ious += list(boxes.pair_iou(found, wanted))
        for row, number in enumerate(METRICS[f"ref/img{image}_ids"]):
            expected = METRICS[f"ref/pred_box_xywh_{number}"]
            np.testing.assert_allclose(found[row], xyxy(expected[None])[0], atol=1e-3)
            mask = masks.mask_of_logits(values["det_masks"][row], valid, PADDED, original)
            np.testing.assert_array_equal(mask, METRICS[f"ref/pred_mask_{number}"] > 0)
            pixels = masks.overlap(mask, METRICS[f"ref/gt_mask_{number}"] > 0)
            inter.append(pixels[0])
            union.append(pixels[1])
            of_masks.append(boxes.pair_iou([masks.box_of_mask(mask)], [wanted[row]])[0])
    assert boxes.precision_at_half(ious) == pytest.approx(METRICS["ref/out_box_Precision@1"])
    assert boxes.precision_at_half(of_masks) == pytest.approx(METRICS["ref/out_seg_box_Precision@1"])
    assert masks.mask_metrics(inter, union) == {
        "cIoU": pytest.approx(float(METRICS["ref/out_seg_cIoU"]), abs=1e-7),
        "gIoU": pytest.approx(float(METRICS["ref/out_seg_gIoU"]), abs=1e-7),
        "mask P@0.5": pytest.approx(float(METRICS["ref/out_seg_AP"])),
    }


def test_boxes_go_to_the_picture_and_are_clipped() -> None:
    size, original = tuple(map(int, METRICS["boxes/size"])), tuple(map(int, METRICS["boxes/orig"]))
    found = boxes.to_picture(METRICS["boxes/in"], size, original)
    found[:, 2:] -= found[:, :2]
    np.testing.assert_allclose(found, METRICS["boxes/out_xywh"], atol=1e-9)


def test_box_of_a_mask() -> None:
    np.testing.assert_array_equal(masks.box_of_mask(METRICS["boxes/mask"] > 0), METRICS["boxes/mask_to_box"])
    np.testing.assert_array_equal(masks.box_of_mask(np.zeros((3, 4), bool)), np.zeros(4))


def test_half_is_not_above_half() -> None:
    assert boxes.precision_at_half([0.5, 0.5 + 1e-9]) == 0.5
    with pytest.raises(ValueError, match="no expressions"):
        boxes.precision_at_half([])


@settings(max_examples=40, deadline=None)
@given(some_boxes(1, 6), some_boxes(1, 6))
def test_iou_is_symmetric_and_a_share(a: np.ndarray, b: np.ndarray) -> None:
    values = boxes.iou_matrix(a, b)
    np.testing.assert_allclose(values, boxes.iou_matrix(b, a).T, atol=1e-12)
    assert ((values >= 0) & (values <= 1)).all()
    assert 0 <= boxes.precision_at_half(values) <= 1


def test_iou_against_counted_pixels() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        pixels, found = np.zeros((2, 20, 20), bool), []
        for mask in pixels:
            (x0, y0), (w, h) = random.integers(0, 12, 2), random.integers(1, 9, 2)
            mask[y0 : y0 + h, x0 : x0 + w] = True
            found.append((x0, y0, x0 + w, y0 + h))
        inter, union = masks.overlap(*pixels)
        assert boxes.pair_iou([found[0]], [found[1]])[0] == pytest.approx(inter / union, abs=1e-5)
    assert boxes.pair_iou([(9, 9, 1, 1)], [(1, 1, 9, 9)])[0] == 0  # inside out covers nothing


@settings(max_examples=40, deadline=None)
@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_keep_the_mask(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(masks.decode(masks.encode(mask)), mask)


def test_masks_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        masks.overlap(np.ones((2, 3), bool), np.ones((1, 3), bool))


# ---- traces


def test_point_l1_as_the_reference() -> None:
    scale = METRICS["point/size_hw"][::-1]
    found = trace.point_l1(METRICS["point/pred"] / scale, METRICS["point/gt"] / scale, METRICS["point/tokens"] > 0)
    assert found == pytest.approx(float(METRICS["point/out_point_l1"]), abs=1e-6)
    assert trace.point_l1(np.ones((3, 2, 2)), np.zeros((3, 2, 2)), np.ones(3)) is None


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("k", range(3))
def test_lbm_as_the_reference(case: int, k: int) -> None:
    predicted, truth = LBM[f"case{case}/pred"], LBM[f"case{case}/gt"]
    expected = LBM[f"case{case}/lbm_k{k}_segments"]
    np.testing.assert_allclose(trace.lbm_chunks(predicted, truth, k), expected, atol=1e-6)
    assert trace.lbm(predicted, truth, k) == pytest.approx(float(LBM[f"case{case}/lbm_k{k}"]), abs=1e-6)


def test_lbm_without_any_way_to_match_keeps_the_order() -> None:
    """More boxes than partners in a chunk: the programme has no solution, and T = [I 0] stands in for it."""
    a, b = np.array([[0.0, 0, 1, 1], [0.2, 0, 1, 1], [0.4, 0, 1, 1]]), np.array([[0.4, 0, 1, 1], [0.2, 0, 1, 0.6]])
    assert trace._match(a, b, 0) == pytest.approx((0.1 + 0.1) / 3)


def test_lbm_leaves_out_boxes_of_the_whole_picture() -> None:
    thing, whole = [0.1, 0.2, 0.3, 0.4], [0.0, 0, 1, 1]
    assert trace.lbm([thing], [whole, thing, whole], 0) == 0
    assert trace.lbm([thing], [whole], 0) is None
    assert trace.lbm(np.zeros((0, 4)), [thing], 0) is None


@settings(max_examples=25, deadline=None)
@given(some_boxes(1, 24), some_boxes(1, 24))
def test_a_wider_window_never_costs_more(a: np.ndarray, b: np.ndarray) -> None:
    scores = [trace.lbm(a, b, k) for k in range(3)]
    if scores[0] is None:
        assert scores == [None] * 3
        return
    values = [score for score in scores if score is not None]
    assert values[0] + 1e-9 >= values[1] >= values[2] - 1e-9 and values[2] >= -1e-12


@settings(max_examples=25, deadline=None)
@given(some_boxes(1, 24).map(lambda x: x * 0.9), st.integers(0, 2))
def test_a_trace_matches_itself(a: np.ndarray, k: int) -> None:
    assert trace.lbm(a, a, k) == pytest.approx(0, abs=1e-9)


# ---- dense captions


def golden_pictures() -> list[tuple[Truth, Detections]]:
    """A detection's caption is its METEOR value, as text."""
    truth, found = METRICS["densecap/gt"], METRICS["densecap/pred"]
    pictures = []
    for image in np.unique(np.concatenate([truth[:, 0], found[:, 0]])):
        t, f = truth[truth[:, 0] == image], found[found[:, 0] == image]
        captions = tuple(str(value) for value in f[:, 6])
        pictures.append((Truth(xyxy(t[:, 1:5]), ("x",) * len(t)), Detections(xyxy(f[:, 1:5]), f[:, 5], captions)))
    return pictures


def told(captions: list[str], references: list[list[str]]) -> list[float]:
    assert len(captions) == len(references)
    return [float(caption) for caption in captions]


def test_merging_as_the_reference() -> None:
    expected = METRICS["densecap/merged_gt"]
    merged = [dense_captions.merge_truth(truth) for truth, _ in golden_pictures()]
    assert sum(len(found) for found, _ in merged) == int(METRICS["densecap/num_gt_after_merge"])
    for image, (found, captions) in enumerate(merged):
        wanted = expected[expected[:, 0] == image]
        np.testing.assert_allclose(found, xyxy(wanted[:, 1:5]), atol=1e-4)
        assert [len(group) for group in captions] == wanted[:, 5].tolist()


def test_dense_caption_map_as_the_reference() -> None:
    found = dense_captions.dense_caption_map(golden_pictures(), told)
    prefix = "densecap/out_"
    expected = {k.removeprefix(prefix): float(METRICS[k]) for k in METRICS if k.startswith(prefix + "mAP")}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-6), name
    without = dense_captions.dense_caption_map(golden_pictures(), None)
    prefix = "densecap/out_nometeor_"
    assert without == {
        k.removeprefix(prefix): pytest.approx(float(METRICS[k]), abs=2e-6) for k in METRICS if k.startswith(prefix)
    }


def one_picture(captions: tuple[str, ...], found: tuple[str, ...]) -> list[tuple[Truth, Detections]]:
    box = np.array([[0.0, 0, 10, 10]])
    truth = Truth(np.repeat(box, len(captions), 0), captions)
    return [(truth, Detections(np.repeat(box, len(found), 0), np.arange(len(found), 0, -1.0), found))]


def test_an_empty_truth_is_told_by_a_dummy_word_on_both_sides() -> None:
    asked: list[Any] = []

    def meteor(captions: list[str], references: list[list[str]]) -> list[float]:
        asked.extend(zip(captions, references, strict=True))
        return [1.0] * len(captions)

    dense_captions.dense_caption_map(one_picture(("", "a mug"), ("a cup",)), meteor)
    assert asked == [(dense_captions.EMPTY, [dense_captions.EMPTY])]


def test_a_second_detection_of_the_same_thing_is_wrong() -> None:
    found = dense_captions.dense_caption_map(one_picture(("a mug",), ("1", "1")), told)
    assert found["mAP"] == 1.0  # the best came first
    pictures = one_picture(("a mug",), ("1", "1"))
    pictures[0][1].boxes[0] += 4  # IoU 0.22 takes the thing, and is too little for any threshold
    assert dense_captions.dense_caption_map(pictures, told)["mAP"] == 0.0


def test_nothing_annotated_and_nothing_found() -> None:
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), ())
    with pytest.raises(ValueError, match="nothing annotated"):
        dense_captions.dense_caption_map([(Truth(np.zeros((0, 4)), ()), nothing)], None)
    assert dense_captions.dense_caption_map([(Truth(np.array([[0.0, 0, 1, 1]]), ("x",)), nothing)], told)["mAP"] == 0
    stray = Detections(np.array([[0.0, 0, 1, 1]]), np.ones(1), ("1",))
    pictures = [(Truth(np.zeros((0, 4)), ()), stray), *one_picture(("x",), ("1",))]
    assert (
        dense_captions.dense_caption_map(pictures, told)["mAP"] == 0.5
    )  # the stray one has the same score, and counts
