"""What the detector of dense captioning learns from, and that it does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from box_decoders import SMALL, close, golden, golden_model, small_decoder

from deixis_train.losses.boxes import pairwise_iou
from deixis_train.models.box_decoder import BoxDecoder
from deixis_train.models.box_decoder.training import CaptionProposals, caption_rows, pad_boxes, proposal_losses


@pytest.fixture(scope="module")
def decoder() -> BoxDecoder:
    decoder = golden_model().box_decoder
    assert decoder is not None
    return decoder


def test_losses_of_the_first_stage_are_the_reference_s(decoder: BoxDecoder) -> None:
    data = golden("losses")
    with torch.no_grad():
        losses, _ = proposal_losses(decoder, golden("box_decoder")["features"], data["cn_gt_boxes"])
    close(losses["heatmap"], 0.5 * (data["cn_pos_loss"] + data["cn_neg_loss"]))
    close(losses["regression"], data["cn_reg_loss"])


def test_proposals_for_captions(decoder: BoxDecoder) -> None:
    truth = golden("losses")["cn_gt_boxes"]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        features = golden("box_decoder")["features"]
        losses, proposals = proposal_losses(decoder, features, truth, generator)
        again, same = proposal_losses(decoder, features, truth, torch.Generator().manual_seed(2))
    assert torch.equal(proposals.boxes, same.boxes) and losses == again
    assert proposals.boxes.shape == (2, 32, 4) and proposals.matched.shape == (2, 32)
    overlap = pairwise_iou(proposals.boxes, truth)
    for picture in range(2):
        matched = proposals.matched[picture]
        objects = int((matched >= 0).sum())
        assert 4 <= objects < 32  # the true boxes are among them, and nothing else comes before them
        assert bool((matched[:objects] >= 0).all()) and set(matched[:objects].tolist()) == {0, 1, 2, 3}
        best = overlap[picture, torch.arange(32), matched.clamp(min=0)]
        assert bool((best[:objects] >= 0.6).all())
        assert bool((overlap[picture, objects:].amax(dim=1) < 0.6).all())


def test_a_picture_without_objects_has_losses_too() -> None:
    decoder = small_decoder(rois_per_image=16, caption_proposals=8)
    losses, proposals = proposal_losses(decoder, torch.randn(2, 9, 9, 8), torch.zeros(2, 0, 4))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())
    assert losses["regression"].item() == losses["roi_box"].item() == 0
    assert bool((proposals.matched == -1).all())


def test_every_part_learns_and_so_do_the_features() -> None:
    decoder = small_decoder(rois_per_image=32)
    features = torch.randn(2, 9, 9, 8, requires_grad=True)
    truth = pad_boxes([np.array([[10, 12, 70, 90]]), np.array([[3, 3, 30, 28], [60, 50, 120, 128.0]])])
    losses, _ = proposal_losses(decoder, features, truth)
    torch.stack(list(losses.values())).sum().backward()
    assert features.grad is not None and bool(features.grad.abs().sum() > 0)
    # A level learns to regress only when an object is its own, so the scale of one of five may stay.
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in decoder.parameters())


@pytest.mark.parametrize("scale", [1, 2])
def test_it_learns_where_a_box_is(scale: int) -> None:
    """Also where the same grid lies over a picture twice as large."""
    config = dataclasses.replace(SMALL, rois_per_image=24, pre_nms_train=100, post_nms_train=30)
    torch.manual_seed(0)
    decoder = BoxDecoder(config, 8, 128 * scale, 9).eval()
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(1, 9, 9, 8, generator=generator)
    truth = torch.tensor([[[50.0, 60, 104, 122]]]) * scale
    optimizer = torch.optim.Adam(decoder.parameters(), lr=2e-3)
    for _ in range(30):
        losses, _ = proposal_losses(decoder, features, truth, generator)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = decoder(features)
    assert int(found.num_detections[0]) >= 1
    assert float(pairwise_iou(found.boxes[0, :1], truth[0])) > 0.8


def test_rows_of_proposals() -> None:
    boxes = torch.arange(24.0).reshape(3, 2, 4)
    proposals = CaptionProposals(boxes, torch.tensor([[1, -1], [-1, -1], [0, 0]]))
    rows = caption_rows(proposals, torch.tensor([0, 0, 1, 2]))
    assert rows.row.tolist() == [1, 3, 3]
    assert torch.equal(rows.boxes, torch.stack([boxes[0, 0], boxes[2, 0], boxes[2, 1]]))


def test_boxes_of_several_pictures_are_padded() -> None:
    padded = pad_boxes([np.zeros((0, 4), np.float32), torch.tensor([[1.0, 2, 3, 4]])])
    assert padded.tolist() == [[[0, 0, 0, 0]], [[1, 2, 3, 4]]]
