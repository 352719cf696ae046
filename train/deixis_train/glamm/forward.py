"""What GLaMM learns from a batch (section 9.1): next tokens, and the masks of every [SEG] of the given text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from deixis_train.glamm.batches import GlammBatch, Rows
from deixis_train.glamm.looking import looking_loss, watched
from deixis_train.losses.grounding import mask_losses, next_token_loss, predicting
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.reference import postprocess

CE_WEIGHT, BCE_WEIGHT, DICE_WEIGHT = 1.0, 2.0, 0.5


@dataclass(frozen=True)
class GlammOutcome:
    """Losses without weights. `bce` and `dice` are None where no mask is learned."""

    ce: Tensor
    bce: Tensor | None
    dice: Tensor | None
    masks: list[Tensor] = field(default_factory=list)  # logits of each picture [m, H, W], at the size of its masks
    logits: Tensor | None = None  # [N, vocab], where a next token counts
    wanted: Tensor | None = None  # [N], that token
    look: Tensor | None = None  # see `looking`; None where the batch does not say where to look
    states: Tensor | None = None  # [R, L, D], after the final norm


def training_outcome(model: Glamm, batch: GlammBatch) -> GlammOutcome:
    """One forward pass in training. Gradients flow into whatever parameters ask for them.

    Raises:
        ValueError: a picture has more [SEG]s than masks.
    """
    if batch.look is None:
        look, states = None, language_states(model, batch)
    else:
        with watched(model.llama, batch.look) as kept:
            states = language_states(model, batch)
        look = looking_loss(kept)
    rows = batch.rows
    counted = predicting(rows.labels)
    logits, wanted = model.llama.head(states[counted]), rows.labels[:, 1:][counted[:, :-1]]
    ce = next_token_loss(logits, wanted)
    if batch.masks is None:
        return GlammOutcome(ce, None, None, [], logits, wanted, look, states)
    sizes = [(int(mask.shape[-2]), int(mask.shape[-1])) for mask in batch.masks]
    masks = predicted_masks(model, batch, states, sizes)
    bce, dice = mask_losses(masks, batch.masks)
    return GlammOutcome(ce, bce, dice, masks, logits, wanted, look, states)


def total_loss(
    outcome: GlammOutcome, *, text: float = CE_WEIGHT, bce: float = BCE_WEIGHT, dice: float = DICE_WEIGHT
) -> Tensor:
    """The weighted sum that is descended."""
    total = text * outcome.ce
    if outcome.bce is not None and outcome.dice is not None:
        total = total + bce * outcome.bce + dice * outcome.dice
    return total


def teacher_forced_masks(model: Glamm, batch: GlammBatch, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Mask logits per picture [m, H, W] of the [SEG]s in given text (section 7); `sizes` are heights and widths."""
    return predicted_masks(model, batch, language_states(model, batch), sizes)


def language_states(model: Glamm, batch: GlammBatch) -> Tensor:
    """States [R, L, D] of all rows, after the final norm."""
    features, levels = picture_features(model, batch)
    visual = features.flatten(0, 1)
    if batch.boxes is not None and batch.box_picture is not None and len(batch.boxes):
        regions = model.encode_regions(levels, batch.boxes, batch.box_picture)
        visual = torch.cat([visual, regions.to(visual.dtype)])
    embeds = model.splice(batch.rows.ids, visual, batch.rows.embed_index)
    return model.llama(embeds, batch.rows.valid, branch=batch.rows.branch)


def picture_features(model: Glamm, batch: GlammBatch) -> tuple[Tensor, list[Tensor]]:
    """Features [B, T0, D] behind the projector, and the maps that the region encoder reads."""
    if batch.levels is not None:
        levels = [level.float() for level in batch.levels]
        return model.projector(levels[-1].flatten(1, 2)), levels
    if batch.global_images is None:
        raise ValueError("a batch needs pictures, or what CLIP sees in them")
    return model.encode_global(batch.global_images.float())


def mask_states(rows: Rows, states: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The states that stand for the [SEG]s: those of the positions before them (section 6.1).

    Returns:
        States [M, D], row after row, and the row of each [M] int64.
    """
    found = (rows.ids[:, 1:] == mask_id) & rows.valid[:, 1:]
    row, position = found.nonzero(as_tuple=True)
    return states[row, position], row


def predicted_masks(model: Glamm, batch: GlammBatch, states: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Mask logits per picture [m, H, W] at the given (height, width), float32 (sections 6.2 to 6.6)."""
    if batch.valid_hw is None:
        raise ValueError("masks need the grounding encoder's pictures, or its maps")
    sam = batch.sam
    if sam is None:
        if batch.grounding_images is None:
            raise ValueError("masks need the grounding encoder's pictures, or its maps")
        sam = model.encode_grounding(batch.grounding_images.float(), batch.valid_hw)
    sam = sam.float()
    chosen, row = mask_states(batch.rows, states, model.config.ids.mask)
    if batch.decoded is not None:
        chosen, row = chosen[batch.decoded], row[batch.decoded]
    picture = batch.picture[row]
    logits, _ = model.decode_masks(chosen, sam, picture)
    masks = []
    for number, size in enumerate(sizes):
        height, width = (int(side) for side in batch.valid_hw[number])
        masks.append(postprocess(logits[picture == number].float(), (height, width), size))
    return masks
