"""What GLaMM's frozen encoders see in each picture, kept on disk like PixelLLM's features (`training.features`).

"clip": the states that the region encoder reads and those that the projector takes, float16 [levels, g, g, C], the
latter last. "sam": the grounding encoder's map, float16 [h, h, P]. "small": CLIP's input, uint8 [s, s, 3].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis_train.data.formats.pictures import read_picture
from deixis_train.glamm.pictures import Picture, global_input, grounding_input
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.training.features import FeatureStore, What, fill_stores


@dataclass(frozen=True)
class Inputs:
    """Both inputs of a picture, RGB uint8; None where nobody asks for it. valid_hw: of the grounding input, px."""

    small: Picture | None
    grounding: Picture | None
    valid_hw: tuple[int, int] = (0, 0)


def read_inputs(path: Path, model: Glamm, *, small: bool, grounding: bool) -> Inputs:
    """Raises DataError when the picture cannot be read."""
    image, config = read_picture(path), model.config
    padded, valid = grounding_input(image, config.image_size) if grounding else (None, (0, 0))
    return Inputs(global_input(image, config.clip.image_size, config.clip.fit) if small else None, padded, valid)


def fingerprint(model: Glamm, what: What) -> str:
    """8 hex digits that name what a store holds: weights, sizes and normalisation of its encoder."""
    config = model.config
    if what == "sam":
        seen: Any = [config.image_size, config.pixel_mean_sam, config.pixel_std_sam]
    elif what == "clip":
        seen = [asdict(config.clip), config.region_layers, config.pixel_mean_clip, config.pixel_std_clip]
    else:
        seen = [config.clip.image_size, config.clip.fit]
    digest = hashlib.sha256(json.dumps(["glamm", what, seen]).encode())
    if what != "small":
        for name, value in (model.sam_encoder if what == "sam" else model.clip).state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def store_of(model: Glamm, what: What, folder: Path) -> FeatureStore:
    """The store of `what` for this model below `folder`."""
    return FeatureStore(folder / f"{what}-{fingerprint(model, what)}")


def normalized(model: Glamm, small: Tensor) -> Tensor:
    """CLIP's input [B, s, s, 3] 0..255 as CLIP takes it."""
    return (small.float() - model.clip_mean) / model.clip_std


def clip_levels(model: Glamm, small: Tensor) -> list[Tensor]:
    """Maps [B, g, g, C] of CLIP's input [B, s, s, 3]: those that the region encoder reads, then the last state, unless
    that is one of them."""
    states, grid = model.clip(normalized(model, small)), model.config.clip.grid
    last = len(states) - 1
    layers = [layer for layer in model.config.region_layers if layer != last]
    return [states[layer][:, 1:].unflatten(1, (grid, grid)) for layer in (*layers, last)]


def fill(
    model: Glamm,
    whats: Sequence[What],
    folder: Path,
    pictures: dict[str, Path],
    *,
    batch: int = 4,
    bf16: bool = False,
    report: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[What, FeatureStore]:
    """Bring the stores of a model up to date with `pictures` (path by name). The model is put into evaluation mode."""
    model.eval()
    stores: dict[What, FeatureStore] = {what: store_of(model, what, folder) for what in whats}
    device = next(model.parameters()).device
    small, grounding = bool({"small", "clip"} & set(whats)), "sam" in whats

    @torch.inference_mode()
    def compute(what: What, group: Sequence[Inputs]) -> NDArray[Any]:
        if what == "small":
            return np.stack([inputs.small for inputs in group if inputs.small is not None])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if what == "clip":
                images = np.stack([inputs.small for inputs in group if inputs.small is not None])
                seen = torch.stack(clip_levels(model, torch.from_numpy(images).to(device)), dim=1)
            else:
                images = np.stack([inputs.grounding for inputs in group if inputs.grounding is not None])
                valid = torch.tensor([inputs.valid_hw for inputs in group], dtype=torch.float32, device=device)
                seen = model.encode_grounding(torch.from_numpy(images).to(device).float(), valid)
        return seen.half().cpu().numpy()

    def read(path: Path) -> Inputs:
        return read_inputs(path, model, small=small, grounding=grounding)

    readers = 4 if device.type == "cuda" else 1
    fill_stores(stores, pictures, read, compute, batch=batch, readers=readers, report=report)
    return stores
