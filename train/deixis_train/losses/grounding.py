"""The losses of GLaMM (section 9.1): next tokens, and masks at the size of the true ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deixis.conversation import IGNORED

DICE_SCALE = 1000.0  # sums of probabilities are divided by this, so that the smoothing means what it was tuned for
DICE_SMOOTH = 1e-6
SMALL = 1e-8


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [N, vocab] and labels [N] that all count; 0 if there are none."""
    return F.cross_entropy(logits.float(), labels) if len(labels) else logits.float().sum()


def predicting(labels: Tensor) -> Tensor:
    """Positions [R, L] bool whose next label counts: where the logits of `next_token_loss` are read."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def mask_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of masks [m, H, W] against 0/1 (or sums of parts): mean over pixels, sum over masks."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1).sum()


def mask_dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dice of every mask [m, H, W], summed over masks."""
    probability, wanted = logits.sigmoid().flatten(1), target.flatten(1)
    overlap = (probability / DICE_SCALE * wanted).sum(1)
    total = (probability / DICE_SCALE).sum(1) + (wanted / DICE_SCALE).sum(1)
    return (1 - (2 * overlap + DICE_SMOOTH) / (total + DICE_SMOOTH)).sum()


def mask_losses(logits: list[Tensor], target: list[Tensor]) -> tuple[Tensor, Tensor]:
    """BCE and dice of all pictures of a batch, averaged over their masks (section 9.1).

    Args:
        logits: per picture [m, H, W] float.
        target: per picture [M, H, W], M >= m. True masks that were not asked for are left out, and so are pictures for
            which none was predicted.

    Raises:
        ValueError: more predictions than true masks, or other sizes.
    """
    bce = dice = torch.zeros((), device=logits[0].device if logits else None)
    count = 0
    for number, (predicted, wanted) in enumerate(zip(logits, target, strict=True)):
        masks = len(predicted)
        if masks == 0:
            continue
        if masks > len(wanted):
            raise ValueError(f"picture {number}: {masks} [SEG]s in the text, but only {len(wanted)} masks")
        if predicted.shape[1:] != wanted.shape[1:]:
            raise ValueError(f"picture {number}: logits {tuple(predicted.shape)}, masks {tuple(wanted.shape)}")
        # The reference divides by masks + 1e-8 here and multiplies by masks again.
        share = masks / (masks + SMALL)
        bce = bce + share * mask_bce(predicted.float(), wanted[:masks].float())
        dice = dice + share * mask_dice(predicted.float(), wanted[:masks].float())
        count += masks
    return bce / (count + SMALL), dice / (count + SMALL)
