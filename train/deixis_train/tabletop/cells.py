"""The dense objective: for every cell of the grid, the kind, the colour and the box of the object that owns it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.tabletop.losses import box_loss, iou

OCCUPIED_WEIGHT = 5.0

Names = dict[str, list[str]]  # "kinds" and "colours", in the order of the class numbers


class CellHeads(nn.Module):
    """Read-outs of the dense objective; they are thrown away afterwards."""

    def __init__(self, width: int, names: Names) -> None:
        super().__init__()
        self.sizes = (1 + len(names["kinds"]), len(names["colours"]), 4)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features [..., width] -> logits of (nothing, kinds) and of colours, and a box.

        Boxes are XYXY in fractions of the real picture.
        """
        return self.linear(x).split(self.sizes, dim=-1)


class CellTargets:
    """Targets of many scenes: `owner` [n, g, g] of `scenes.cell_owners`, looked up in a table of the objects."""

    def __init__(self, scenes: list[dict[str, Any]], owner: np.ndarray, names: Names) -> None:
        self.owner = owner
        most = max(len(scene["objects"]) for scene in scenes)
        self.objects = np.zeros((len(scenes), most + 1, 6), np.float32)  # the last row serves owner -1: nothing
        for rows, scene in zip(self.objects, scenes, strict=True):
            for row, thing in zip(rows, scene["objects"], strict=False):
                row[:] = _target(thing, scene, names)

    def __getitem__(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Occupied [B, g, g] bool and targets [B, g, g, 6] (kind, colour, box in fractions of the real picture)."""
        owner = self.owner[index]
        return owner >= 0, self.objects[index][np.arange(len(index))[:, None, None], owner]


def _target(thing: dict[str, Any], scene: dict[str, Any], names: Names) -> list[float]:
    x0, y0, x1, y1 = thing["box"]
    width, height = scene["width"], scene["height"]
    kind, colour = names["kinds"].index(thing["kind"]), names["colours"].index(thing["color"])
    return [kind, colour, x0 / width, y0 / height, x1 / width, y1 / height]


def cell_losses(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropies of kind (nothing included) and colour, and the box loss; the last two on occupied cells only."""
    kinds, colours, boxes = (x.float() for x in outputs)
    weight = occupied.float()
    kind = torch.where(occupied, targets[..., 0].long() + 1, 0)
    # Most cells are empty: occupied ones count more, so that kinds are learned as soon as emptiness is.
    importance = torch.where(occupied, OCCUPIED_WEIGHT, 1.0)
    kind = F.cross_entropy(kinds.flatten(0, 2), kind.flatten(), reduction="none")
    colour = F.cross_entropy(colours.flatten(0, 2), targets[..., 1].long().flatten(), reduction="none")
    return {
        "kind": (kind * importance.flatten()).sum() / importance.sum(),
        "colour": (colour * weight.flatten()).sum() / weight.sum().clamp(min=1),
        "box": box_loss(boxes, targets[..., 2:], weight),
    }


@torch.inference_mode()
def cell_figures(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, float]:
    """Shares of occupied cells whose kind, colour and box (IoU > 0.5) are right."""
    kinds, colours, boxes = (x.float()[occupied] for x in outputs)
    wanted = targets[occupied]
    return {
        "kind_right": (kinds[:, 1:].argmax(-1) == wanted[:, 0]).float().mean().item(),
        "colour_right": (colours.argmax(-1) == wanted[:, 1]).float().mean().item(),
        "box_right": (iou(boxes, wanted[:, 2:])[0] > 0.5).float().mean().item(),
    }
