"""Rows of ids with the picture's positions put in, and the batch that the losses of GLaMM are computed on.

Letters in shapes: B pictures, R rows (conversations), L positions with the T0 of the picture counted, K boxes, g side
of CLIP's grid, h side of the grounding encoder's map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from deixis.conversation import IGNORED, IMAGE_ID
from deixis_train.models.glamm.config import GlammConfig


@dataclass(frozen=True)
class Rows:
    """Expanded rows (section 5.4), padded at the end. Positions of the picture bear the padding id."""

    ids: Tensor  # [R, L] int64
    labels: Tensor  # [R, L] int64, IGNORED where nothing is learned
    valid: Tensor  # [R, L] bool
    # [R, L] int64: -1 takes the embedding of the id, n the nth of the pictures' features [B * T0], then regions [K]
    embed_index: Tensor
    branch: Tensor | None = None  # [R, L] int64, see `Llama.forward`; None: a row is one conversation


@dataclass(frozen=True)
class Look:
    """N positions and the cells that each should look at."""

    row: Tensor  # [N] int64
    position: Tensor  # [N] int64, with the picture counted
    first: Tensor  # [N] int64, position of the picture's first cell in that row
    cells: Tensor  # [N, T0] bool, at least one each


@dataclass(frozen=True)
class Pointed:
    """Where the things are that the [SEG]s stand for. N states that predict one."""

    row: Tensor  # [N] int64
    position: Tensor  # [N] int64, with the picture counted
    boxes: Tensor  # [N, 4] XYXY fractions of the picture
    places: Tensor  # [N, 2] (x, y) px of the grounding input, well inside the mask


@dataclass
class GlammBatch:
    """Conversations about some pictures. Rows of one picture are neighbours, in the order of the pictures.

    Pictures are RGB 0..255, channels last; instead of them there may be what frozen encoders see in them.
    """

    rows: Rows
    picture: Tensor  # [R] int64, the picture of each row
    global_images: Tensor | None = None  # [B, s, s, 3]
    levels: list[Tensor] | None = None  # cached states of CLIP, shallow first, the last one its features: [B, g, g, C]
    boxes: Tensor | None = None  # [K, 4] XYXY fractions of the picture, in the order in which rows name them
    box_picture: Tensor | None = None  # [K] int64
    grounding_images: Tensor | None = None  # [B, S, S, 3], padded right and bottom
    sam: Tensor | None = None  # cached map of the grounding encoder [B, h, h, P]
    valid_hw: Tensor | None = None  # [B, 2] real height and width of the grounding input, px
    look: Look | None = None  # where states should look
    pointed: Pointed | None = None  # where the things are that are meant
    # [M] int64: which of the [SEG]s, counted through all rows, are decoded; None: all
    decoded: Tensor | None = None
    masks: list[Tensor] | None = (
        None  # of those, per picture [m, H, W] 0/1 at the size of its masks; None: no mask is learned
    )

    @property
    def pictures(self) -> int:
        seen = self.global_images if self.global_images is not None else self.levels[0] if self.levels else None
        return 0 if seen is None else len(seen)

    def to(self, device: torch.device) -> GlammBatch:
        """The same on a device. Memory is pinned on the way to a GPU."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                value = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
                return value.to(device, non_blocking=True)
            if isinstance(value, list):
                return [move(item) for item in value]
            if isinstance(value, Rows | Look | Pointed):
                return type(value)(**{spec.name: move(getattr(value, spec.name)) for spec in fields(value)})  # pyright: ignore[reportArgumentType]
            return value

        return GlammBatch(**{spec.name: move(getattr(self, spec.name)) for spec in fields(self)})  # pyright: ignore[reportArgumentType]


def expand_rows(
    ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    picture: Sequence[int],
    boxes: Sequence[int],
    config: GlammConfig,
    pictures: int,
    branches: Sequence[Sequence[int]] | None = None,
) -> Rows:
    """Put the picture's positions into rows of ids, and say which embedding every position takes (section 5.4).

    Args:
        ids: per row, IMAGE_ID at most once and no padding. A row without it does not see the picture.
        labels: of the same lengths.
        picture: the picture of every row.
        boxes: how many boxes every row brings. Boxes are numbered through, row after row.
        config: of the model.
        pictures: B.
        branches: of the same lengths as the ids, 0 where the picture is; None: a row is one conversation.

    Raises:
        ValueError: a row that names `<image>` twice, or `<bbox>` more often than it has boxes. Boxes that are not named
            are left out, as in the reference.
    """
    image_tokens, first_box = config.clip.tokens, pictures * config.clip.tokens
    whole: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for row, (one, wanted) in enumerate(zip(ids, labels, strict=True)):
        if len(one) != len(wanted):
            raise ValueError(f"row {row} has {len(one)} ids and {len(wanted)} labels")
        index, box = [-1] * len(one), first_box
        for k, number in enumerate(one):
            if config.region is not None and number == config.ids.region:
                index[k], box = box, box + 1
        if box - first_box > boxes[row]:
            raise ValueError(f"row {row} names {box - first_box} regions, but has {boxes[row]} boxes")
        first_box += boxes[row]
        places = [k for k, number in enumerate(one) if number == IMAGE_ID]
        if len(places) > 1:
            raise ValueError(f"row {row} names the picture {len(places)} times; once is possible")
        expanded, marked, way = list(one), list(wanted), list(branches[row]) if branches else [0] * len(one)
        for k in places:
            seen = range(picture[row] * image_tokens, (picture[row] + 1) * image_tokens)
            expanded[k : k + 1] = [config.ids.pad] * image_tokens
            marked[k : k + 1] = [IGNORED] * image_tokens
            index[k : k + 1] = seen
            way[k : k + 1] = [0] * image_tokens
        whole.append((expanded, marked, index, way))
    longest = max(len(expanded) for expanded, *_ in whole)

    def padded(part: int, value: int) -> Tensor:
        return torch.tensor([row[part] + [value] * (longest - len(row[part])) for row in whole], dtype=torch.int64)

    lengths = torch.tensor([len(expanded) for expanded, *_ in whole])
    valid = torch.arange(longest)[None] < lengths[:, None]
    branch = padded(3, 0) if branches else None
    return Rows(padded(0, config.ids.pad), padded(1, IGNORED), valid, padded(2, -1), branch)


def share_beginning(
    ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int]]:
    """Conversations that begin alike up to the picture as one row: its ids, labels and branches.

    Nothing is learned otherwise than from a row each, but the picture's positions are computed once.

    Raises:
        ValueError: conversations that begin differently, or one that does not name the picture.
    """
    end = list(ids[0]).index(IMAGE_ID) + 1 if IMAGE_ID in ids[0] else 0
    if not end or any(list(one[:end]) != list(ids[0][:end]) for one in ids):
        raise ValueError("conversations can only share a beginning with the picture in it")
    row, marked, way = list(ids[0][:end]), list(labels[0][:end]), [0] * end
    for number, (one, wanted) in enumerate(zip(ids, labels, strict=True), start=1):
        row += one[end:]
        marked += wanted[end:]
        way += [number] * (len(one) - end)
    return row, marked, way
