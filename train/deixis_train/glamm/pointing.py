"""Where the things are that mask tokens stand for: helps for learning that are not published (`auxiliary` of a stage).

"box": the state that predicts a [SEG] tells the thing's box, through a read-out that is thrown away. "place": its
prompt for SAM is led to SAM's own code of a click well inside the thing, so that the mask decoder, which knows clicks,
understands it from the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from deixis_train.glamm.batches import Pointed, Rows
from deixis_train.glamm.items import Item
from deixis_train.glamm.looking import mask_spans
from deixis_train.glamm.pictures import grounding_size
from deixis_train.losses.boxes import box_loss, paired_iou
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.prompt_encoder import POSITIVE


def find_pointed(items: Sequence[Sequence[Item]], rows: Rows, config: GlammConfig) -> Pointed | None:
    """Boxes and places of what the mask tokens of some rows stand for; None if there are none.

    Args:
        items: those of each row; items with masks have one per mask token.
        rows: of these items.
        config: of the model.
    """
    found: list[tuple[int, int, list[float], list[float]]] = []
    for row, asked in enumerate(items):
        ends = [end for _, end in mask_spans(rows.ids[row].tolist(), config)]
        masks = [(mask, item) for item in asked if item.masks is not None for mask in item.masks]
        for end, (mask, item) in zip(ends, masks, strict=False):
            if mask.any():
                height, width = grounding_size((item.sample.height, item.sample.width), config.image_size)
                box, (x, y) = box_and_place(mask)
                found.append((row, end - 1, box, [x * width, y * height]))
    if not found:
        return None
    numbers, positions, boxes, places = zip(*found, strict=True)
    return Pointed(torch.tensor(numbers), torch.tensor(positions), torch.tensor(boxes), torch.tensor(places))


def box_and_place(mask: NDArray[np.uint8]) -> tuple[list[float], tuple[float, float]]:
    """Box XYXY of a mask [H, W] that is not empty, and the place (x, y) farthest from its edge, as fractions of its
    sides."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    inside = np.pad((mask[top:bottom, left:right] > 0).astype(np.uint8), 1)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    place = ((left + int(x) + 0.5) / width, (top + int(y) + 0.5) / height)
    return [left / width, top / height, right / width, bottom / height], place


def pointing_states(states: Tensor, pointed: Pointed) -> Tensor:
    """The states [N, D] that predict the [SEG]s, of [R, L, D]."""
    return states[pointed.row, pointed.position]


def told_boxes(said: Tensor, pointed: Pointed) -> tuple[Tensor, Tensor]:
    """The box loss of a read-out's boxes [N, 4], and their mean IoU, without gradient."""
    said = said.float()
    loss = box_loss(said, pointed.boxes, said.new_ones(len(said)))
    return loss, paired_iou(said.detach(), pointed.boxes)[0].mean()


def place_loss(model: Glamm, chosen: Tensor, pointed: Pointed) -> Tensor:
    """Mean square between the prompts of states [N, D] and SAM's code of a click at their things' places."""
    clicked = torch.full((len(chosen), 1), POSITIVE, device=chosen.device)
    with torch.no_grad():
        wanted = model.prompt_encoder(pointed.places[:, None].float(), clicked)[:, 0]
    return F.mse_loss(model.mask_projection(chosen).float(), wanted.float())
