"""The mask loss, as SAM is trained: focal, dice and the predicted quality (section 12)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deixis_train.models.resample import resize

FOCAL_WEIGHT = 20.0
ALPHA = 0.5
GAMMA = 2.0


@dataclass(frozen=True)
class MaskLosses:
    """Float32 scalars. `focal` holds its weight of 20 already."""

    focal: Tensor
    dice: Tensor
    iou: Tensor

    @property
    def total(self) -> Tensor:
        return self.focal + self.dice + self.iou


def mask_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor, valid: Tensor, real: Tensor) -> MaskLosses:
    """Losses of the best of the masks that were predicted for each prompt, averaged over valid prompts.

    Logits are resized bilinearly to the size of the target. Focal loss looks at real pixels only; dice and the IoU that
    the quality head is to predict look at the whole frame.

    Args:
        logits: [R, M, h, w], M masks per prompt.
        predicted_iou: [R, M].
        target: [R, S, S] bool or 0/1.
        valid: [R] bool or 0/1, prompts that have a true mask.
        real: [R, S, S] bool or 0/1, pixels that are not padding.
    """
    keep = valid > 0
    wanted = target[keep].float()[:, None]
    inside = real[keep].float()[:, None]
    prompts, masks = int(wanted.shape[0]), logits.shape[1]
    if prompts == 0:
        nothing = logits[keep].float().sum()
        return MaskLosses(nothing, nothing, predicted_iou[keep].float().sum())
    size = (int(target.shape[-2]), int(target.shape[-1]))
    with torch.autocast(logits.device.type, enabled=False):  # resizing is a matrix product
        predicted = resize(logits[keep].float().permute(0, 2, 3, 1), size, "linear").permute(0, 3, 1, 2)
    focal = (sigmoid_focal(predicted, wanted.expand_as(predicted)) * inside).sum((-2, -1))
    focal = FOCAL_WEIGHT * focal / inside.sum((-2, -1)).clamp(min=1)
    dice = dice_loss(predicted, wanted)
    best = (focal + dice).argmin(dim=1, keepdim=True)
    quality = (predicted_iou[keep].float() - mask_iou(predicted > 0, wanted > 0)).square()
    chosen = (values.gather(1, best).mean() if masks > 1 else values.mean() for values in (focal, dice, quality))
    return MaskLosses(*chosen)


def sigmoid_focal(logits: Tensor, target: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> Tensor:
    """Binary focal loss per element. With alpha = 0.5 both classes weigh the same."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = torch.where(target > 0.5, 1 - logits.sigmoid(), logits.sigmoid())
    weight = torch.where(target > 0.5, alpha, 1 - alpha)
    return weight * missed.pow(gamma) * entropy


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - (2 sum(p g) + 1) / (sum(p) + sum(g) + 1) over the last two dimensions."""
    probability = logits.sigmoid()
    overlap = (probability * target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of bool masks over the last two dimensions; 0 where both are empty."""
    union = (a | b).sum((-2, -1))
    return (a & b).sum((-2, -1)).float() / union.clamp(min=1)
