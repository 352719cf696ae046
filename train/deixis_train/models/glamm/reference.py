"""GLaMM's answers the plain way (sections 5.4, 6.1, 6.6 and 7): every token runs the whole text again.

What faster ways, in torch or in exported graphs, are compared with. One picture, one conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deixis.conversation import IMAGE_ID
from deixis_train.models.glamm.glamm import Glamm


@dataclass(frozen=True)
class Picture:
    """One picture as the graphs take it: float32 RGB 0..255.

    global_image: [1, s, s, 3].
    image: [1, S, S, 3], padded right and bottom.
    valid_hw: [1, 2], real height and width in `image`.
    """

    global_image: Tensor
    image: Tensor
    valid_hw: Tensor


@dataclass(frozen=True)
class GenerateResult:
    """A text and its masks.

    ids: [n] int64, prompt (with IMAGE_ID) and answer.
    mask_positions: [M] int64, expanded positions whose states the masks are made of.
    states: [M, D], those states.
    logits: [M, 4h, 4w], masks over the padded input.
    iou: [M], predicted.
    """

    ids: Tensor
    mask_positions: Tensor
    states: Tensor
    logits: Tensor
    iou: Tensor


def expand_ids(ids: Sequence[int], image_tokens: int) -> Tensor:
    """Put IMAGE_ID as often as a picture has tokens, in place of the one that stands for it: [n] ids -> [L] int64."""
    expanded: list[int] = []
    for i in ids:
        expanded += [i] * (image_tokens if i == IMAGE_ID else 1)
    return torch.tensor(expanded, dtype=torch.int64)


def embed_index(expanded: Tensor, region_id: int, regions: int) -> Tensor:
    """Which visual embedding replaces what (section 5.4): [L] expanded ids -> [L] int64, -1 for words.

    The visual embeddings are those of the picture's tokens, then of the regions, in order. Regions beyond those the
    text mentions are left over; fewer than it mentions raise ValueError.
    """
    image, region = expanded == IMAGE_ID, expanded == region_id
    if regions and int(region.sum()) > regions:
        raise ValueError(f"the text mentions {int(region.sum())} regions, but {regions} were given")
    index = torch.full_like(expanded, -1)
    index[image] = torch.arange(int(image.sum()), device=index.device)
    if regions:
        index[region] = int(image.sum()) + torch.arange(int(region.sum()), device=index.device)
    return index


def mask_positions(expanded: Tensor, mask_id: int) -> Tensor:
    """Positions whose states say what the mask tokens stand for: the ones before them (section 6.1): [L] -> [M]."""
    return (expanded[1:] == mask_id).nonzero()[:, 0]


@torch.no_grad()
def visual_embeddings(model: Glamm, picture: Picture, boxes: Tensor | None = None) -> Tensor:
    """Embeddings of a picture's tokens and of boxes in it, fractions [k, 4] -> [T0 + k, D]."""
    features, levels = model.encode_global(picture.global_image)
    visual = features[0]
    if boxes is not None and len(boxes):
        index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        visual = torch.cat([visual, model.encode_regions(levels, boxes, index)])
    return visual


@torch.no_grad()
def generate(
    model: Glamm, ids: Sequence[int], picture: Picture, boxes: Tensor | None = None, max_new_tokens: int | None = None
) -> GenerateResult:
    """Answer greedily, then decode a mask for each mask token of the whole text, the prompt's included.

    Args:
        ids: the prompt, with one IMAGE_ID.
        boxes: XYXY as fractions [k, 4], one for each region the prompt mentions.
        max_new_tokens: of the answer; None takes the configuration's. An end token ends it sooner, and is kept.
    """
    visual = visual_embeddings(model, picture, boxes)
    answer = list(ids)
    for _ in range(model.config.max_new_tokens if max_new_tokens is None else max_new_tokens):
        states = _states(model, answer, visual)
        answer.append(int(model.llama.head(states[-1]).argmax()))
        if answer[-1] == model.config.ids.end:
            break
    return _with_masks(model, answer, visual, picture)


@torch.no_grad()
def teacher_forced(model: Glamm, ids: Sequence[int], picture: Picture, boxes: Tensor | None = None) -> GenerateResult:
    """Masks for the mask tokens of a given conversation, in one pass (section 7, end)."""
    return _with_masks(model, list(ids), visual_embeddings(model, picture, boxes), picture)


def _states(model: Glamm, ids: Sequence[int], visual: Tensor) -> Tensor:
    """States of all expanded positions [L, D]."""
    tokens = model.config.clip.tokens
    expanded = expand_ids(ids, tokens).to(visual.device)
    index = embed_index(expanded, model.config.ids.region, len(visual) - tokens)
    return model.llama(model.splice(expanded[None], visual, index[None]))[0]


def _with_masks(model: Glamm, ids: Sequence[int], visual: Tensor, picture: Picture) -> GenerateResult:
    positions = mask_positions(expand_ids(ids, model.config.clip.tokens), model.config.ids.mask)
    states = _states(model, ids, visual)[positions]
    sam = model.encode_grounding(picture.image, picture.valid_hw)
    logits, iou = model.decode_masks(states, sam, torch.zeros(len(states), dtype=torch.int64, device=sam.device))
    return GenerateResult(torch.tensor(ids), positions, states, logits, iou)


def postprocess(logits: Tensor, resize_hw: tuple[int, int], orig_hw: tuple[int, int]) -> Tensor:
    """Masks in the picture's pixels (section 6.6).

    Args:
        logits: [M, 4h, 4w] over the padded input, whose side is 4 times as many pixels.
        resize_hw: real height and width of the padded input, px.
        orig_hw: height and width of the picture, px.

    Returns:
        [M, height, width] logits; a mask is where they are above 0. M may be 0.
    """
    if not len(logits):
        return logits.new_zeros((0, *orig_hw))
    size = [4 * side for side in logits.shape[1:]]
    large = F.interpolate(logits.float()[:, None], size, mode="bilinear", align_corners=False)
    large = large[..., : resize_hw[0], : resize_hw[1]]
    return F.interpolate(large, orig_hw, mode="bilinear", align_corners=False)[:, 0]
