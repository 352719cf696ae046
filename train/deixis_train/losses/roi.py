"""The second stage of the box decoder: which proposals it learns from, and its losses (section 12)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deixis_train.losses.boxes import area, encode_deltas, pairwise_iou

SAMPLES = 512
FOREGROUND_SHARE = 0.25
MATCH_IOU = 0.6
BACKGROUND, OBJECT, PADDING = 0, 1, -1


@dataclass(frozen=True)
class SampledRois:
    """Proposals of one picture to learn from, objects first, then background, then padding.

    boxes: [K, 4] XYXY px; zeros in padding.
    labels: [K] int64, OBJECT, BACKGROUND or PADDING.
    matched: [K] int64, index of the true box that overlaps most; meaningless unless the label is OBJECT.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor

    def first(self, count: int) -> SampledRois:
        """The first `count`: the proposals that captions are learnt from."""
        return SampledRois(self.boxes[:count], self.labels[:count], self.matched[:count])


def sample_rois(
    proposals: Tensor,
    truth: Tensor,
    *,
    valid: Tensor | None = None,
    samples: int = SAMPLES,
    foreground_share: float = FOREGROUND_SHARE,
    iou: float = MATCH_IOU,
    generator: torch.Generator | None = None,
) -> SampledRois:
    """Draw proposals of one picture at random; the true boxes themselves are among those drawn from.

    A proposal is an object if it overlaps a true box by at least `iou`. At most `samples * foreground_share` objects
    are taken, background fills the rest as far as there is any, and the outcome is padded to `samples`.

    Args:
        proposals: [N, 4] XYXY px.
        truth: [M, 4] true boxes; those without area are padding.
        valid: [N] bool, proposals that exist (score above 0); None = all.
        generator: source of randomness, on the CPU.
    """
    device = proposals.device
    real = area(truth) > 0
    keep = torch.ones(len(proposals), dtype=torch.bool, device=device) if valid is None else valid > 0
    boxes = torch.cat([proposals.detach()[keep].float(), truth[real].float()])
    if not bool(real.any()):
        best, matched = (
            torch.zeros(len(boxes), device=device),
            torch.zeros(len(boxes), dtype=torch.int64, device=device),
        )
    else:
        overlap = pairwise_iou(boxes, truth.float()).masked_fill(~real, -1.0)
        best, matched = overlap.max(dim=1)
    is_object = best >= iou
    objects = _draw(is_object.nonzero()[:, 0], int(samples * foreground_share), generator)
    background = _draw((~is_object).nonzero()[:, 0], samples - len(objects), generator)
    chosen = torch.cat([objects, background])
    padding = samples - len(chosen)
    return SampledRois(
        F.pad(boxes[chosen], (0, 0, 0, padding)),
        F.pad(is_object[chosen].long(), (0, padding), value=PADDING),
        F.pad(matched[chosen], (0, padding)),
    )


def roi_losses(class_logits: Tensor, deltas: Tensor, rois: SampledRois, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Classification and box regression of the sampled proposals of one picture.

    Cross-entropy is averaged over the proposals that are no padding. Absolute errors of the encoded deltas are summed
    over objects and divided by the number of the same proposals.

    Args:
        class_logits: [K, 2], background and object.
        deltas: [K, 4] as the network says them.
        truth: [M, 4] the true boxes that `rois.matched` points into.

    Returns:
        two float32 scalars.
    """
    counts = rois.labels != PADDING
    count = counts.sum().clamp(min=1)
    entropy = F.cross_entropy(class_logits[counts].float(), rois.labels[counts], reduction="sum")
    objects = rois.labels == OBJECT
    wanted = encode_deltas(rois.boxes[objects], truth.float()[rois.matched[objects]])
    return entropy / count, (deltas[objects].float() - wanted).abs().sum() / count


def _draw(indices: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """At most `count` of the indices, in random order."""
    order = torch.randperm(len(indices), generator=generator).to(indices.device)
    return indices[order[:count]]
