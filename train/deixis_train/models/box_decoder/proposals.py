"""From heatmaps to a fixed number of boxes: peaks, non-maximum suppression, padding (section 10).

All boxes are XYXY px of the padded network input.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deixis_train.losses.boxes import pairwise_iou


class Proposals(NamedTuple):
    """Boxes where something may be, best first.

    boxes: [B, K, 4]. scores: [B, K] in 0..1; 0 marks a slot that no proposal filled.
    """

    boxes: Tensor
    scores: Tensor


def clip_boxes(boxes: Tensor, size: float) -> Tensor:
    """Boxes [..., 4] inside a square of `size` px."""
    return boxes.clamp(0, size)


def by_score(boxes: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best `count` of boxes [B, N, 4] and scores [B, N], descending; of equal scores the earlier one first."""
    ordered, index = torch.sort(scores, dim=1, descending=True, stable=True)
    index = index[:, :count]
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), ordered[:, :count]


def peaks(boxes: Tensor, heatmap: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places with the highest scores; neighbours are not compared.

    Args:
        boxes: the box predicted at each place [B, T, 4].
        heatmap: logits [B, T].
        count: how many to take; never more than T - 1.

    Returns:
        boxes [B, k, 4] and scores [B, k] in 0..1, best first.
    """
    return by_score(boxes, heatmap.sigmoid(), min(count, heatmap.shape[1] - 1))


def nms(boxes: Tensor, threshold: float, limit: int) -> Tensor:
    """Greedy non-maximum suppression of one picture's boxes.

    Args:
        boxes: [N, 4] in the order of their scores, best first.
        threshold: a box whose IoU with a kept one is at least this is suppressed. A box without a coordinate above 0
            counts as suppressed from the start.
        limit: stop when so many are kept.

    Returns:
        Indices of the kept boxes, ascending [at most `limit`] int64.
    """
    overlaps = (pairwise_iou(boxes, boxes) >= threshold).cpu().numpy()
    suppressed = (boxes.amax(dim=1) <= 0).cpu().numpy()
    kept: list[int] = []
    for index in range(len(boxes)):
        if len(kept) == limit:
            break
        if not suppressed[index]:
            kept.append(index)
            np.logical_or(suppressed, overlaps[index], out=suppressed)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)


def suppress(boxes: Tensor, scores: Tensor, threshold: float, count: int) -> Proposals:
    """Non-maximum suppression of every picture, padded to `count` boxes.

    Slots that no box fills have score 0; what lies in them is the last candidate, as in the reference.

    Args:
        boxes: candidates [B, N, 4], best first.
        scores: [B, N], descending.
        threshold: see `nms`.
        count: boxes that come out per picture.
    """
    out_boxes = boxes[:, -1:].repeat(1, count, 1)
    out_scores = scores.new_zeros(len(scores), count)
    for picture in range(len(boxes)):
        kept = nms(boxes[picture], threshold, count)
        out_boxes[picture, : len(kept)] = boxes[picture, kept]
        out_scores[picture, : len(kept)] = scores[picture, kept]
    return Proposals(out_boxes, out_scores)
