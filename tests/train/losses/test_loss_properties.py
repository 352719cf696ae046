"""What holds for losses whatever the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deixis_train.losses.boxes import DELTA_SCALE, area, encode_deltas, giou, pairwise_iou
from deixis_train.losses.detection import LEVEL_RANGES, centernet_losses, centernet_targets
from deixis_train.losses.mask import mask_loss
from deixis_train.losses.point import point_loss
from deixis_train.losses.roi import BACKGROUND, OBJECT, PADDING, roi_losses, sample_rois
from deixis_train.losses.text import text_loss

NAN = float("nan")
SIZES = [(18, 18), (9, 9), (4, 4), (2, 2), (1, 1)]
PLACES = sum(h * w for h, w in SIZES)

coordinates = st.lists(st.floats(0, 120, width=32), min_size=4, max_size=4)


def ordered(values: list[float]) -> Tensor:
    x0, x1 = sorted(values[:2])
    y0, y1 = sorted(values[2:])
    return torch.tensor([x0, y0, x1 + 1, y1 + 1])


def smoothed(ids: Tensor, vocabulary: int, smoothing: float) -> Tensor:
    """Logits whose probabilities are exactly the smoothed targets."""
    labels = torch.cat([ids[..., 1:], torch.zeros_like(ids[..., :1])], dim=-1)
    target = torch.full((*ids.shape, vocabulary), smoothing / (vocabulary - 1))
    return target.scatter(-1, labels[..., None], 1 - smoothing).log()


def test_text_loss_is_least_at_the_smoothed_target() -> None:
    ids = torch.tensor([[0, 5, 7, 1, 0], [0, 3, 1, 0, 0]])
    logits = smoothed(ids, 11, 0.1).requires_grad_()
    loss = text_loss(logits, ids)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 10))
    assert loss.item() == pytest.approx(entropy, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-7
    assert text_loss(logits + torch.randn(logits.shape), ids) > loss


def test_text_loss_without_smoothing_is_cross_entropy() -> None:
    ids = torch.tensor([[0, 5, 7, 1]])
    logits = torch.randn(1, 4, 11)
    expected = torch.nn.functional.cross_entropy(logits[0, :3], ids[0, 1:])
    torch.testing.assert_close(text_loss(logits, ids, smoothing=0.0), expected)


def test_text_that_does_not_count_has_no_influence() -> None:
    ids = torch.tensor([[0, 5, 7, 1, 0], [0, 1, 0, 0, 0], [0, 4, 1, 0, 0]])
    logits = torch.randn(3, 5, 11)
    valid = torch.tensor([True, True, False])
    loss = text_loss(logits, ids, valid=valid)
    torch.testing.assert_close(loss, text_loss(logits[:1], ids[:1]))
    spoilt = logits.clone()
    spoilt[1:] = NAN
    spoilt[0, 3:] = NAN
    spoilt.requires_grad_()
    loss_of_spoilt = text_loss(spoilt, ids, valid=valid)
    torch.testing.assert_close(loss_of_spoilt, loss)
    loss_of_spoilt.backward()
    assert spoilt.grad is not None and bool(spoilt.grad.isfinite().all())
    assert not spoilt.grad[1:].any()


def test_point_loss_in_pixels() -> None:
    target = torch.tensor([[10.0, 20.0], [30.0, 60.0]]).expand(1, 3, 2, 2)
    everywhere = torch.ones(1, 3)
    shifted = target + torch.tensor([4.0, 0.0])
    assert point_loss(shifted, target, everywhere, everywhere) == 2
    assert point_loss(shifted, target, everywhere, everywhere, "l2") == 8


def test_points_that_do_not_count_have_no_influence() -> None:
    target = torch.rand(2, 4, 2, 2) * 100 + 1
    pred = target + torch.randn(target.shape)
    read, true = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    read[0, 0], true[0, 1] = False, False
    target[1, 3] = 0
    spoilt = pred.clone()
    spoilt[0, :2] = NAN
    spoilt[1, 3] = NAN
    torch.testing.assert_close(point_loss(spoilt, target, read, true), point_loss(pred, target, read, true))
    with_zero = point_loss(pred, target, read, true, "l1")
    assert with_zero > point_loss(pred, target, read, true)
    with pytest.raises(ValueError, match="l1_nonzero"):
        point_loss(pred, target, read, true, "huber")  # type: ignore[arg-type]


def text_of_nothing(x: Tensor) -> Tensor:
    return text_loss(x[:, :, 0], torch.zeros(2, 4, dtype=torch.int64))


def points_of_nothing(x: Tensor) -> Tensor:
    return point_loss(x, torch.zeros(2, 4, 2, 2), torch.ones(2, 4), torch.ones(2, 4))


def masks_of_nothing(x: Tensor) -> Tensor:
    frame = torch.ones(2, 8, 8)
    return mask_loss(x.flatten(2), x[:, :, 0, 0], frame, torch.zeros(2), frame).total


def rois_of_nothing(x: Tensor) -> Tensor:
    rois = sample_rois(torch.zeros(0, 4), torch.zeros(3, 4), samples=4)
    return sum(roi_losses(x[0, :, 0], x[0].flatten(1), rois, torch.zeros(3, 4)), torch.zeros(()))


@pytest.mark.parametrize("loss_of", [text_of_nothing, points_of_nothing, masks_of_nothing, rois_of_nothing])
def test_nothing_to_learn_is_zero_with_a_finite_gradient(loss_of: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 2, 2, requires_grad=True)
    loss = loss_of(x)
    loss.backward()
    assert loss == 0
    assert x.grad is not None and not x.grad.any()


def test_half_precision_logits_are_computed_in_float32() -> None:
    ids = torch.randint(2, 300, (2, 9))
    logits = (torch.randn(2, 9, 300) * 3).bfloat16()
    loss = text_loss(logits, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, text_loss(logits.float(), ids))
    masks, frame = torch.randn(2, 1, 4, 4).bfloat16(), (torch.rand(2, 12, 12) > 0.5).float()
    arguments = (masks[:, :, 0, 0], frame, torch.ones(2), torch.ones(2, 12, 12))
    with torch.autocast("cpu", torch.bfloat16):
        inside = mask_loss(masks, *arguments)
    torch.testing.assert_close(inside.total, mask_loss(masks.float(), *arguments).total)


def test_the_best_of_several_masks_learns() -> None:
    frame = torch.zeros(1, 8, 8)
    frame[:, 2:6, 2:6] = 1
    good = (frame[:, None] - 0.5) * 20
    logits = torch.cat([-good, good], dim=1).requires_grad_()
    losses = mask_loss(logits, torch.tensor([[0.0, 1.0]]), frame, torch.ones(1), torch.ones(1, 8, 8))
    assert losses.total < 1e-2
    losses.total.backward()
    assert logits.grad is not None and not logits.grad[:, 0].any() and bool(logits.grad[:, 1].any())


def test_padding_is_outside_the_focal_loss() -> None:
    frame = (torch.rand(1, 8, 8) > 0.5).float()
    real = torch.ones(1, 8, 8)
    real[:, 5:] = 0
    logits = torch.randn(1, 1, 8, 8)
    spoilt = logits.clone()
    spoilt[:, :, 5:] += 30
    a, b = (mask_loss(x, torch.ones(1, 1), frame, torch.ones(1), real) for x in (logits, spoilt))
    torch.testing.assert_close(a.focal, b.focal)
    assert not torch.isclose(a.dice, b.dice)


@settings(deadline=None)  # machines may be busy
@given(coordinates, coordinates)
def test_giou_bounds(a: list[float], b: list[float]) -> None:
    one, other = ordered(a), ordered(b)
    iou = pairwise_iou(one[None], other[None])[0, 0]
    value = giou(one, other)
    assert -1 <= value <= iou + 1e-6 <= 1 + 2e-6
    torch.testing.assert_close(value, giou(other, one))
    assert giou(one, one).item() == pytest.approx(1, abs=1e-5)


def test_giou_of_boxes_apart() -> None:
    assert giou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([3.0, 0, 4, 1])).item() == pytest.approx(-0.5)


@settings(deadline=None)  # machines may be busy
@given(coordinates, coordinates)
def test_deltas_move_a_box_onto_its_target(a: list[float], b: list[float]) -> None:
    box, target = ordered(a), ordered(b)
    dx, dy, dw, dh = encode_deltas(box, target) / torch.tensor(DELTA_SCALE)
    size = box[2:] - box[:2]
    wanted = target[2:] - target[:2]
    centre = box[:2] + size / 2 + torch.stack([dx, dy]) * size
    torch.testing.assert_close(centre, target[:2] + wanted / 2, rtol=1e-4, atol=1e-2)
    grown = size * torch.stack([dw, dh]).exp()
    torch.testing.assert_close(grown, torch.minimum(wanted, size * 1000 / 16), rtol=1e-4, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(coordinates, min_size=0, max_size=5))
def test_centernet_targets(boxes: list[list[float]]) -> None:
    real = torch.stack([ordered(box) for box in boxes]) if boxes else torch.zeros(0, 4)
    targets = centernet_targets(torch.cat([real, torch.zeros(2, 4)])[None], SIZES)
    without_padding = centernet_targets(real[None], SIZES)
    torch.testing.assert_close(targets.heatmap, without_padding.heatmap)
    torch.testing.assert_close(targets.regression, without_padding.regression)
    assert targets.heatmap.min() >= 0 and targets.heatmap.max() <= 1
    assert bool((targets.heatmap[targets.peaks > 0] == 1).all())
    if len(real) == 0:
        assert not targets.peaks.any() and not targets.heatmap.any()
    meant = targets.regression.amin(-1) >= 0
    assert bool((targets.regression[~meant] < 0).all())
    halves = (real[:, 2:] - real[:, :2]).norm(dim=-1) / 2
    assert all(any(low <= half <= high for low, high in LEVEL_RANGES) for half in halves.tolist())
    # A perfect regression costs nothing.
    losses = centernet_losses(torch.zeros(1, PLACES), targets.regression.clamp(min=0), targets)
    assert losses.regression.item() == pytest.approx(0, abs=1e-4)


def test_a_confident_heatmap_is_cheaper_than_a_wrong_one() -> None:
    targets = centernet_targets(torch.tensor([[[20.0, 20, 60, 70]]]), SIZES)
    sharp = (targets.peaks * 2 - 1) * 8
    right, wrong = (centernet_losses(x, torch.ones(1, PLACES, 4), targets) for x in (sharp, -sharp))
    assert right.positive < wrong.positive and right.negative < wrong.negative
    nothing = centernet_targets(torch.zeros(1, 0, 4), SIZES)
    regression = torch.rand(1, PLACES, 4, requires_grad=True)
    empty = centernet_losses(torch.full((1, PLACES), -8.0, requires_grad=True), regression, nothing)
    empty.total.backward()
    assert empty.regression == 0 and empty.positive == 0
    assert regression.grad is not None and not regression.grad.any()


def test_roi_sampling() -> None:
    truth = torch.tensor([[10.0, 10, 50, 50], [60, 60, 90, 90], [0, 0, 0, 0]])
    near = truth[:1] + torch.randn(40, 4)
    far = torch.tensor([[100.0, 0, 120, 20]]).repeat(30, 1)
    proposals, valid = torch.cat([near, far, far]), torch.arange(100) < 70
    rois = sample_rois(proposals, truth, valid=valid, samples=64, generator=torch.Generator().manual_seed(1))
    objects, background = (rois.labels == OBJECT), (rois.labels == BACKGROUND)
    assert objects.sum() == 16 and background.sum() == 30 and (rois.labels == PADDING).sum() == 18
    assert bool(objects[:16].all()) and not bool((rois.labels[46:] != PADDING).any())
    overlap = pairwise_iou(rois.boxes[objects], truth)
    assert bool((overlap.amax(1) >= 0.6).all())
    assert rois.matched[objects].tolist() == overlap.argmax(1).tolist()
    assert not area(rois.boxes[46:]).any()
    assert rois.first(20).labels.tolist() == rois.labels[:20].tolist()
    # Without proposals the true boxes remain.
    alone = sample_rois(proposals[:0], truth, samples=8)
    assert alone.labels.tolist() == [OBJECT] * 2 + [PADDING] * 6


def test_roi_losses() -> None:
    truth = torch.tensor([[10.0, 10, 50, 50]])
    rois = sample_rois(torch.tensor([[100.0, 0, 120, 20], [12.0, 10, 50, 52]]), truth, samples=4, foreground_share=0.5)
    assert rois.labels.tolist() == [OBJECT, OBJECT, BACKGROUND, PADDING]
    wanted = encode_deltas(rois.boxes, truth.expand(4, 4))
    logits = torch.tensor([[-9.0, 9], [-9, 9], [9, -9], [NAN, NAN]])
    classification, regression = roi_losses(logits, wanted, rois, truth)
    assert classification < 1e-6 and regression == 0
    _, regression = roi_losses(logits, wanted + 0.5, rois, truth)
    assert regression.item() == pytest.approx(2 * 4 * 0.5 / 3)
