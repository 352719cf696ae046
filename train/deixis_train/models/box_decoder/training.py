"""What the box decoder learns from (sections 10 and 12): its losses, and the boxes that captions are learned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deixis_train.losses.detection import (
    HEATMAP_WEIGHT,
    LEVEL_RANGES,
    REGRESSION_WEIGHT,
    STRIDES,
    centernet_losses,
    centernet_targets,
)
from deixis_train.losses.roi import OBJECT, SampledRois, roi_losses, sample_rois
from deixis_train.models.box_decoder.box_decoder import BoxDecoder


class CaptionProposals(NamedTuple):
    """Boxes that prompt for captions in training, P per picture; objects first.

    boxes: [B, P, 4] XYXY px of the padded input, without gradient; zeros where a picture has fewer.
    matched: [B, P] int64, which of the picture's true boxes it is; -1 where none, and no text is learned.
    """

    boxes: Tensor
    matched: Tensor


class CaptionRows(NamedTuple):
    """Proposals that have a text to learn, M of all pictures together.

    boxes: XYXY px [M, 4], to prompt with. row: [M] int64, the row of the batch whose picture, text and context are
    theirs.
    """

    boxes: Tensor
    row: Tensor


def proposal_losses(
    decoder: BoxDecoder, features: Tensor, boxes: Tensor, generator: torch.Generator | None = None
) -> tuple[dict[str, Tensor], CaptionProposals]:
    """All losses of the box decoder, and the proposals that captions are learned on.

    Args:
        decoder: the detector that trains.
        features: fused features [B, g, g, C]; gradients flow into them.
        boxes: true boxes [B, N, 4], XYXY px of the padded input; boxes without area are padding (`pad_boxes`).
        generator: source of randomness of the sampling, on the CPU.

    Returns:
        Float32 scalars, weighted, whose sum is the loss of detection: "heatmap", "regression" (first stage),
        "roi_class", "roi_box" (second stage). And the first `caption_proposals` of the boxes that the second stage
        learned from.
    """
    config = decoder.config
    boxes = boxes.to(features.device, torch.float32)
    maps = decoder.dense(features)
    # The published ranges of sizes belong to the published strides.
    coarser = decoder.strides[0] / STRIDES[0]
    ranges = tuple((low * coarser, high * coarser) for low, high in LEVEL_RANGES)
    targets = centernet_targets(boxes, maps.shapes, strides=decoder.strides, ranges=ranges)
    first = centernet_losses(maps.heatmap, maps.regression, targets)

    proposals = decoder.select(maps, training=True)
    sampled = [
        sample_rois(
            candidates,
            truth,
            valid=scores > 0,
            samples=config.rois_per_image,
            iou=config.match_iou,
            generator=generator,
        )
        for candidates, scores, truth in zip(proposals.boxes, proposals.scores, boxes, strict=True)
    ]
    logits, deltas = decoder.roi(maps.pyramid, torch.stack([rois.boxes for rois in sampled]))
    second = [roi_losses(*picture) for picture in zip(logits, deltas, sampled, boxes, strict=True)]
    losses = {
        "heatmap": HEATMAP_WEIGHT * (first.positive + first.negative),
        "regression": REGRESSION_WEIGHT * first.regression,
        "roi_class": torch.stack([entropy for entropy, _ in second]).mean(),
        "roi_box": torch.stack([error for _, error in second]).mean(),
    }
    return losses, _for_captions([rois.first(config.caption_proposals) for rois in sampled])


def _for_captions(rois: list[SampledRois]) -> CaptionProposals:
    matched = torch.stack([torch.where(r.labels == OBJECT, r.matched, -1) for r in rois])
    return CaptionProposals(torch.stack([r.boxes for r in rois]), matched)


def pad_boxes(boxes: Sequence[Tensor | NDArray]) -> Tensor:
    """Boxes of several pictures [N_i, 4] -> [B, max N_i, 4] float32, zeros behind them."""
    return pad_sequence([torch.as_tensor(each, dtype=torch.float32).reshape(-1, 4) for each in boxes], batch_first=True)


def caption_rows(proposals: CaptionProposals, picture: Tensor) -> CaptionRows:
    """The matched proposals as rows, where the true boxes were those of the batch's rows, picture by picture, in order.

    The others bear no loss of the text and are left out. There are none at all only if no row has a box.

    Args:
        proposals: of `proposal_losses`, for `pad_boxes([boxes[picture == b] for b in range(B)])`.
        picture: the picture of each row [R] int64, ascending.
    """
    of_picture, place = torch.nonzero(proposals.matched >= 0, as_tuple=True)
    first = torch.searchsorted(picture, of_picture)  # row of the picture
    return CaptionRows(proposals.boxes[of_picture, place], first + proposals.matched[of_picture, place])
