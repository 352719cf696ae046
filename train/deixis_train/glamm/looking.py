"""Where the language model should look: a help for learning that is not published (`auxiliary.look` of a stage).

A state that predicts a [SEG], a word of its phrase, or a word about a region, should attend to the cells of CLIP's grid
that show the thing. Without that, finding out which cells a phrase means takes far longer than learning to speak. Only
the first group of heads of the later layers is led, so that the others are free for language.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis.conversation import IGNORED
from deixis_train.data.preparation.geometry import Placement
from deixis_train.glamm.batches import Look, Rows
from deixis_train.glamm.items import Item
from deixis_train.glamm.pictures import clip_placement
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.llama import Llama, LlamaAttention
from deixis_train.training.cells import MIN_COVER


def find_looks(items: Sequence[Sequence[Item]], rows: Rows, config: GlammConfig) -> Look | None:
    """What the rows of a batch should look at; None if they are about no thing that CLIP sees.

    Args:
        items: those of each row, with masks, one per mask token, or with boxes, one per turn.
    """
    found: list[tuple[int, int, int, NDArray[np.bool_]]] = []
    for row, asked in enumerate(items):
        index = rows.embed_index[row]
        image = ((index >= 0) & (index < len(items) * config.clip.tokens)).nonzero()
        if not len(image):
            continue
        first = int(image[0])
        spoken, answers = mask_spans(rows.ids[row].tolist(), config), _answers(rows.labels[row].tolist())
        for item in asked:
            if item.masks is not None:
                spans, spoken = spoken[: len(item.masks)], spoken[len(item.masks) :]
                shown = [_cells(mask, item, config) for mask in item.masks]
            elif len(item.boxes) == len(item.turns):
                spans = answers[: len(item.turns)]
                shown = [_cells(_filled(box, item), item, config) for box in item.boxes]
            else:
                spans, shown = [], []
            answers = answers[len(item.turns) :]
            for (start, end), cells in zip(spans, shown, strict=False):
                if cells.any():
                    found += [(row, position, first, cells) for position in range(start, end)]
    if not found:
        return None
    numbers, positions, firsts, cells = zip(*found, strict=True)
    return Look(torch.tensor(numbers), torch.tensor(positions), torch.tensor(firsts), torch.from_numpy(np.stack(cells)))


def mask_spans(ids: list[int], config: GlammConfig) -> list[tuple[int, int]]:
    """Positions [start, end) for every mask token: from the start of its phrase, if any, to the one before it."""
    spans, opened = [], -1
    for position, number in enumerate(ids):
        if number == config.ids.phrase_start:
            opened = position
        elif number == config.ids.mask:
            spans.append((opened if opened >= 0 else position - 1, position))
            opened = -1
    return spans


def _answers(labels: list[int]) -> list[tuple[int, int]]:
    """Positions [start, end) that predict each answer, its end left out."""
    spans, start = [], -1
    for position, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start < 0:
            start = position
        elif label == IGNORED and start >= 0:
            spans.append((start - 1, position - 2))
            start = -1
    return spans


def _filled(box: tuple[float, float, float, float], item: Item) -> NDArray[np.uint8]:
    mask = np.zeros((item.sample.height, item.sample.width), np.uint8)
    x0, y0, x1, y1 = (round(v) for v in box)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 1
    return mask


def _cells(mask: NDArray[np.uint8], item: Item, config: GlammConfig) -> NDArray[np.bool_]:
    """Cells [T0] of CLIP's grid that a mask [H, W] of the stored picture covers; of a small thing, the best one."""
    size, grid = config.clip.image_size, config.clip.grid
    placement: Placement = clip_placement((item.sample.height, item.sample.width), size, config.clip.fit)
    seen = placement.place_mask((mask > 0).astype(np.uint8), size).astype(np.float32)
    cover = cv2.resize(seen, (grid, grid), interpolation=cv2.INTER_AREA).reshape(-1)
    return (cover > MIN_COVER) | ((cover == cover.max()) & (cover > 0))


@contextmanager
def watched(llama: Llama, look: Look) -> Iterator[list[Tensor]]:
    """Keep how much the led heads of the later layers look at the cells: per layer [N]."""
    kept: list[Tensor] = []

    def attend(attention: LlamaAttention, x: Tensor, allowed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        query, key, _ = attention.project(x, cosine, sine)
        led = attention.group(query)[:, 0][look.row, :, look.position]  # [N, H / Hkv, Dh]
        scores = led.float() @ key[:, 0].float()[look.row].transpose(1, 2) * attention.head_dim**-0.5
        sees = allowed.expand(len(x), -1, -1, -1)[look.row, :, look.position]  # [N, 1, L]
        weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
        places = look.first[:, None] + torch.arange(look.cells.shape[1], device=x.device)
        at_picture = weights.gather(2, places[:, None].expand(-1, weights.shape[1], -1))
        kept.append((at_picture * look.cells[:, None]).sum(-1).mean(1))
        return type(attention).forward(attention, x, allowed, cosine, sine)

    # `forward` is a method of the class: an attribute of the instance goes before it, and is taken away again.
    every = [module for module in llama.modules() if isinstance(module, LlamaAttention)]
    later = every[len(every) // 3 :]
    for attention in later:
        vars(attention)["forward"] = partial(attend, attention)
    try:
        yield kept
    finally:
        for attention in later:
            del vars(attention)["forward"]


def looking_loss(kept: Sequence[Tensor]) -> Tensor:
    """-log of the attention that the cells get, averaged over positions and layers: [N] each."""
    return torch.stack([-torch.log(weights + 1e-6).mean() for weights in kept]).mean()
