"""What a parity run asks of a GLaMM, and the PyTorch model as an answer to it.

All arrays are numpy, floats float32, ids int64. B pictures, s and S sides of CLIP's and of the grounding encoder's
input, g and T0 side and tokens of CLIP's grid, C its width, D width of the language model, L expanded positions, K
boxes, M masks, H and W sides of the user's picture. Sections are those of the GLaMM specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.reference import (
    GenerateResult,
    Picture,
    embed_index,
    expand_ids,
    generate,
    mask_positions,
    postprocess,
    teacher_forced,
)

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Prepared:
    """A picture as the encoders take it.

    original: uint8 [H, W, 3]. global_image: [s, s, 3] 0..255. image: [S, S, 3] 0..255, padded. valid: its real part.
    """

    original: NDArray[np.uint8]
    global_image: Floats
    image: Floats
    valid: Size


@dataclass(frozen=True)
class Answer:
    """ids [n]: prompt and answer. positions [M]: expanded, of the states [M, D] that masks are made of. Mask logits
    [M, 4h, 4w] over the padded input, and predicted IoU [M].
    """

    ids: Ids
    positions: Ids
    states: Floats
    logits: Floats
    iou: Floats


class GlammBackend(Protocol):
    """A runnable GLaMM. `model` is the PyTorch model when the backend runs exactly that; otherwise None."""

    @property
    def model(self) -> Glamm | None: ...

    def encode_global(self, images: Floats) -> tuple[Floats, list[Floats]]:
        """[B, s, s, 3] 0..255 -> features [B, T0, D] and maps [B, g, g, C], shallow first."""
        ...

    def encode_regions(self, levels: Sequence[Floats], boxes: Floats, image_index: Ids) -> Floats:
        """Boxes [K, 4] as fractions -> [K, D]."""
        ...

    def encode_grounding(self, images: Floats, valid_hw: Floats) -> Floats:
        """Padded pictures [B, S, S, 3] 0..255 -> [B, h, w, P]."""
        ...

    def read(self, ids: Sequence[int], features: Floats | None, regions: Floats | None, at: Sequence[int]) -> Reading:
        """One text [n], with the features [T0, D] of the picture it names and vectors [k, D] of its regions. `at`: the
        expanded positions whose logits are wanted, rising."""
        ...

    def generate(self, ids: Sequence[int], picture: Prepared, boxes: Floats | None, most: int) -> Answer:
        """Answer greedily with at most that many ids; boxes [k, 4] as fractions."""
        ...

    def teacher_forced(self, ids: Sequence[int], picture: Prepared) -> Answer:
        """Masks of a given conversation."""
        ...

    def masks(self, logits: Floats, valid: Size, original: Size) -> NDArray[np.bool_]:
        """Logits [M, 4h, 4w] over the padded input -> masks [M, H, W] of the picture."""
        ...


@dataclass(frozen=True)
class Reading:
    """states [L, D] after the final norm; logits [len(at), vocab]."""

    states: Floats
    logits: Floats


class TorchGlamm:
    """The PyTorch model; generation without a cache, as the reference does it."""

    def __init__(self, model: Glamm) -> None:
        self.model: Glamm | None = model.eval()
        self._model = model

    @torch.inference_mode()
    def encode_global(self, images: Floats) -> tuple[Floats, list[Floats]]:
        features, levels = self._model.encode_global(as_floats(images))
        return features.numpy(), [level.numpy() for level in levels]

    @torch.inference_mode()
    def encode_regions(self, levels: Sequence[Floats], boxes: Floats, image_index: Ids) -> Floats:
        maps = [as_floats(level) for level in levels]
        return self._model.encode_regions(maps, as_floats(boxes), as_ids(image_index)).numpy()

    @torch.inference_mode()
    def encode_grounding(self, images: Floats, valid_hw: Floats) -> Floats:
        return self._model.encode_grounding(as_floats(images), as_floats(valid_hw)).numpy()

    @torch.inference_mode()
    def read(self, ids: Sequence[int], features: Floats | None, regions: Floats | None, at: Sequence[int]) -> Reading:
        states = self._model.llama(self.embeds(ids, features, regions)[None])[0]
        return Reading(states.numpy(), self._model.llama.head(states[list(at)]).numpy())

    @torch.inference_mode()
    def embeds(self, ids: Sequence[int], features: Floats | None, regions: Floats | None) -> Tensor:
        """Embeddings of a text [L, D], spliced (section 5.4)."""
        width = self._model.config.llama.emb
        visual = [as_floats(part) for part in (features, regions) if part is not None]
        expanded = expand_ids(ids, self._model.config.clip.tokens)
        index = embed_index(expanded, self._model.config.ids.region, 0 if regions is None else len(regions))
        return self._model.splice(expanded[None], torch.cat([*visual, torch.zeros(1, width)]), index[None])[0]

    @torch.inference_mode()
    def generate(self, ids: Sequence[int], picture: Prepared, boxes: Floats | None, most: int) -> Answer:
        places = None if boxes is None else as_floats(boxes)
        return _answer(generate(self._model, ids, _picture(picture), places, most))

    @torch.inference_mode()
    def teacher_forced(self, ids: Sequence[int], picture: Prepared) -> Answer:
        return _answer(teacher_forced(self._model, ids, _picture(picture)))

    @torch.inference_mode()
    def masks(self, logits: Floats, valid: Size, original: Size) -> NDArray[np.bool_]:
        return postprocess(as_floats(logits), valid, original).numpy() > 0


def _picture(picture: Prepared) -> Picture:
    valid = torch.tensor([picture.valid], dtype=torch.float32)
    return Picture(as_floats(picture.global_image)[None], as_floats(picture.image)[None], valid)


def _answer(result: GenerateResult) -> Answer:
    parts = (result.ids, result.mask_positions, result.states, result.logits, result.iou)
    return Answer(*(part.numpy() for part in parts))


def positions_of(ids: Sequence[int], config: GlammConfig) -> Ids:
    """Expanded positions [M] of the states that masks of a text are made of (section 6.1)."""
    return mask_positions(expand_ids(ids, config.clip.tokens), config.ids.mask).numpy()


def as_floats(array: NDArray[Any]) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def as_ids(array: NDArray[Any]) -> Tensor:
    return torch.tensor(array, dtype=torch.int64)
