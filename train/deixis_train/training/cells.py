"""The dense objective: for every cell of the grid, the kind, the colour and the box of the thing that owns it.

It is no part of the paper's recipe. It teaches an encoder, or the prompt extractor, what lies where before attention
has to find it. Boxes are XYXY in fractions of the real picture unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.data.samples import Instance, Sample
from deixis_train.losses.boxes import box_loss, paired_iou

OCCUPIED_WEIGHT = 5.0
# A cell belongs to the thing that covers most of it, if that is more than this share of the cell.
MIN_COVER = 0.2
# A token's box means an instance from this overlap on; otherwise it means the cells inside the box.
SAME_THING = 0.7

Floats = NDArray[np.float32]
Owners = NDArray[np.int16]


@dataclass(frozen=True)
class Names:
    """Class numbers: places in these sorted lists."""

    kinds: tuple[str, ...]
    colours: tuple[str, ...]


def names_of(samples: Iterable[Sample]) -> Names:
    """The categories and the attribute "color" of all instances."""
    instances = [instance for sample in samples for instance in sample.instances]
    colours = {colour for i in instances if (colour := i.attributes.get("color"))}
    return Names(tuple(sorted({i.category for i in instances})), tuple(sorted(colours)))


def cell_owners(sample: Sample, grid: int, size: int, valid_hw: tuple[int, int]) -> Owners:
    """Index of the instance that owns each cell of the padded network input, -1 for none: [grid, grid].

    valid_hw: height and width px of the picture as it lies in the input of side `size`. An instance without a mask
    covers its box.
    """
    height, width = valid_hw
    cover = np.zeros((len(sample.instances) + 1, grid, grid), np.float32)
    cover[0] = MIN_COVER
    for index, thing in enumerate(sample.instances, start=1):
        padded = np.zeros((size, size), np.float32)
        mask = _mask(thing, sample)
        if mask.shape != valid_hw:
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        padded[:height, :width] = mask
        cover[index] = cv2.resize(padded, (grid, grid), interpolation=cv2.INTER_AREA)
    return (cover.argmax(0) - 1).astype(np.int16)


def _mask(thing: Instance, sample: Sample) -> NDArray[np.uint8]:
    if thing.mask is not None:
        return coco_mask.decode(thing.mask)  # pyright: ignore[reportArgumentType]
    mask = np.zeros((sample.height, sample.width), np.uint8)
    x0, y0, x1, y1 = (round(v) for v in thing.box)
    mask[y0:y1, x0:x1] = 1
    return mask


def thing_table(sample: Sample, names: Names) -> Floats:
    """A row per instance, (kind, colour, box), and a last row for owner -1: [N + 1, 6]. Unknown names are -1."""
    table = np.zeros((len(sample.instances) + 1, 6), np.float32)
    scale = np.array([sample.width, sample.height] * 2, np.float32)
    for row, thing in zip(table, sample.instances, strict=False):
        row[0] = names.kinds.index(thing.category) if thing.category in names.kinds else -1
        colour = thing.attributes.get("color", "")
        row[1] = names.colours.index(colour) if colour in names.colours else -1
        row[2:] = np.array(thing.box, np.float32) / scale
    return table


def cell_targets(owners: Sequence[Owners], tables: Sequence[Floats]) -> tuple[NDArray[np.bool_], Floats]:
    """Occupied [B, g, g] and targets [B, g, g, 6] (kind, colour, box) of some pictures."""
    return np.stack([o >= 0 for o in owners]), np.stack([t[o] for o, t in zip(owners, tables, strict=True)])


def same_thing(boxes: Floats, instances: Floats) -> NDArray[np.int64]:
    """The instance [T] that each box means, -1 for none: [T, 4] against [N, 4], both XYXY in the same px."""
    if not len(instances) or not len(boxes):
        return np.full(len(boxes), -1)
    low = np.maximum(boxes[:, None, :2], instances[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], instances[None, :, 2:])
    overlap = (high - low).clip(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(-1)[:, None]
    union = area + (instances[:, 2:] - instances[:, :2]).prod(-1) - overlap
    ratio = overlap / np.maximum(union, 1e-7)
    return np.where(ratio.max(1) > SAME_THING, ratio.argmax(1), -1)


def meant_cells(boxes: Floats, instances: Floats, owner: Owners, size: int) -> NDArray[np.bool_]:
    """The cells that boxes mean: [T, 4] px of the network input of side `size` -> [T, g * g].

    Those owned by the same thing, if there is one and it owns any; else those whose centres lie in the box. A box of
    zeros means none.
    """
    grid = owner.shape[0]
    centre = (np.arange(grid, dtype=np.float32) + 0.5) * (size / grid)
    inside_x = (centre > boxes[:, :1]) & (centre < boxes[:, 2:3])
    inside_y = (centre > boxes[:, 1:2]) & (centre < boxes[:, 3:])
    inside = (inside_y[:, :, None] & inside_x[:, None, :]).reshape(len(boxes), -1)
    thing = same_thing(boxes, instances)
    owned = (owner.reshape(1, -1) == thing[:, None]) & (thing >= 0)[:, None]
    return np.where(owned.any(1, keepdims=True), owned, inside)


class CellHeads(nn.Module):
    """Read-outs of the dense objective; they are thrown away afterwards."""

    def __init__(self, width: int, names: Names) -> None:
        super().__init__()
        self.sizes = (1 + len(names.kinds), max(1, len(names.colours)), 4)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features [..., width] -> logits of (nothing, kinds) and of colours, and a box."""
        return self.linear(x).split(self.sizes, dim=-1)


def cell_losses(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropies of kind (nothing included) and colour, and the box loss; the last two on occupied cells only."""
    kinds, colours, boxes = (x.float() for x in outputs)
    weight = occupied.float()
    kind = torch.where(occupied, targets[..., 0].long() + 1, 0)
    # Most cells are empty: occupied ones count more, so that kinds are learned as soon as emptiness is.
    importance = torch.where(occupied, OCCUPIED_WEIGHT, 1.0)
    kind = F.cross_entropy(kinds.flatten(0, -2), kind.flatten(), reduction="none")
    known = (weight * (targets[..., 1] >= 0)).flatten()
    colour = targets[..., 1].long().clamp(min=0).flatten()
    colour = F.cross_entropy(colours.flatten(0, -2), colour, reduction="none")
    return {
        "kind": (kind * importance.flatten()).sum() / importance.sum(),
        "colour": (colour * known).sum() / known.sum().clamp(min=1),
        "box": box_loss(boxes, targets[..., 2:], weight),
    }


@torch.no_grad()
def cell_figures(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Shares of occupied cells whose kind, colour and box (IoU > 0.5) are right."""
    kinds, colours, boxes = (x.float()[occupied] for x in outputs)
    wanted = targets[occupied]
    return {
        "kind_right": (kinds[:, 1:].argmax(-1) == wanted[:, 0]).float().mean(),
        "colour_right": (colours.argmax(-1) == wanted[:, 1]).float().mean(),
        "box_right": (paired_iou(boxes, wanted[:, 2:])[0] > 0.5).float().mean(),
    }
