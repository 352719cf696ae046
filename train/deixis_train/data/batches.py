"""Samples made ready for the model. Coordinates are px of the square, padded network input of side S."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis_train.data.samples import Loss, Sample

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One picture with its rows, padded to equal lengths within the picture.

    K rows, L text positions, C context positions. Ids: BOS = PAD = 0, EOS = 1 for T5 (section 7).
    """

    sample: Sample
    image: NDArray[np.uint8] | None  # [S, S, 3] RGB, zero padded right and bottom; None when features are cached
    valid_hw: tuple[int, int]  # height and width of the real part, px
    scale: tuple[float, float]  # (x, y): px of the network input per px of the stored picture
    text: Ints  # [K, L], BOS w1..wn EOS PAD..
    context: Ints  # [K, C], ids EOS PAD..; all 0 when there is none
    prompts: Floats  # [K, 4] XYXY px; the whole picture is (0, 0, width, height) of the real part
    whole: NDArray[np.bool_]  # [K], the prompt means the whole picture
    boxes: Floats  # [K, 4], the row's `box`; zeros where there is none
    points: Floats  # [K, L, 4] XYXY px: the corners that each position's token points at; zeros where it points nowhere
    masks: NDArray[np.uint8] | None  # [K, S, S], or None
    instances: Floats  # [N, 4] XYXY px, boxes of `sample.instances`, in their order


@dataclass
class Batch:
    """Examples of one source, stacked: B pictures, R rows in all."""

    source: str
    losses: frozenset[Loss]
    examples: list[Example]
    images: Tensor | None  # [B, S, S, 3] float32 0..255, or None when `features` are given
    features: Tensor | None  # [B, g, g, C1 + C2] float32, fused (section 2.3)
    valid_hw: Tensor  # [B, 2] float32
    picture: Tensor  # [R] int64, the picture of each row
    text: Tensor  # [R, L] int64
    context: Tensor  # [R, C] int64
    prompts: Tensor  # [R, 4] float32 px
    whole: Tensor  # [R] bool
    boxes: Tensor  # [R, 4]
    points: Tensor  # [R, L, 4]
    masks: Tensor | None  # [R, S, S] uint8


def pad_rows(arrays: list[Ints], width: int) -> Ints:
    """Stack [K_i, L_i] arrays of ids into [sum K_i, width], padded with 0."""
    out = np.zeros((sum(len(a) for a in arrays), width), np.int64)
    start = 0
    for array in arrays:
        out[start : start + len(array), : array.shape[1]] = array
        start += len(array)
    return out


def collate(examples: list[Example], source: str, losses: frozenset[Loss], features: Tensor | None = None) -> Batch:
    """Stack examples of one source. `features`: cached fused features in the order of the examples.

    Where some examples have masks and others do not, the others' are empty.
    """
    if not examples:
        raise ValueError(f"source {source!r}: an empty batch")
    longest = max(e.text.shape[1] for e in examples)
    context = max(e.context.shape[1] for e in examples)
    points = np.concatenate([np.pad(e.points, ((0, 0), (0, longest - e.points.shape[1]), (0, 0))) for e in examples])
    images = None
    if features is None:
        if any(e.image is None for e in examples):
            raise ValueError(f"source {source!r}: examples without pictures need cached features")
        images = torch.from_numpy(np.stack([e.image for e in examples if e.image is not None])).float()
    masks = None
    if sides := [e.masks.shape[1:] for e in examples if e.masks is not None]:
        every = (np.zeros((len(e.text), *sides[0]), np.uint8) if e.masks is None else e.masks for e in examples)
        masks = torch.from_numpy(np.concatenate(list(every)))
    return Batch(
        source,
        losses,
        examples,
        images,
        features,
        torch.tensor([e.valid_hw for e in examples], dtype=torch.float32),
        torch.from_numpy(np.concatenate([np.full(len(e.text), b) for b, e in enumerate(examples)])),
        torch.from_numpy(pad_rows([e.text for e in examples], longest)),
        torch.from_numpy(pad_rows([e.context for e in examples], context)),
        torch.from_numpy(np.concatenate([e.prompts for e in examples])),
        torch.from_numpy(np.concatenate([e.whole for e in examples])),
        torch.from_numpy(np.concatenate([e.boxes for e in examples])),
        torch.from_numpy(points),
        masks,
    )
