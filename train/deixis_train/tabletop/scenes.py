"""What the stages need of rendered scenes: pictures, frozen features and targets, as arrays on disk per shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.preprocess import padding_mask

# A cell belongs to the object that covers most of it, if that is more than this share of the cell.
MIN_COVER = 0.2


def read_shard(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shards(data: Path) -> list[Path]:
    """The finished shards of a scene folder, in order."""
    return sorted(data.glob("scenes-*.jsonl"))


def read_padded(path: Path, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture of a longest side up to `size`: [size, size, 3] float32 RGB, zero padded, and its (height, width)."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path} is not a readable picture")
    height, width = image.shape[:2]
    if max(height, width) > size:
        raise ValueError(
            f"{path} is {width}x{height}; scenes for this model are rendered with a longest side of {size}"
        )
    padded = np.zeros((size, size, 3), np.float32)
    padded[:height, :width] = image[..., ::-1]
    return padded, (height, width)


def semantic_input(model: PixelLLM, image: torch.Tensor, valid_hw: torch.Tensor) -> torch.Tensor:
    """What the semantic encoder sees, before normalisation, as uint8 [B, s, s, 3].

    Resizing commutes with normalisation when the padding holds the mean, so the small picture can be stored in bytes.
    """
    preprocess = model.semantic_preprocess
    inside = padding_mask(valid_hw, image.shape[1])
    small = preprocess.resize(image * inside + preprocess.mean * (1 - inside))
    return small.round().clamp(0, 255).to(torch.uint8)


def normalize_small(model: PixelLLM, small: torch.Tensor) -> torch.Tensor:
    """uint8 [B, s, s, 3] of `semantic_input` -> the encoder's normalised input."""
    return (small.float() - model.semantic_preprocess.mean) / model.semantic_preprocess.std


def cell_owners(scene: dict[str, Any], grid: int, size: int) -> np.ndarray:
    """Index of the object that owns each cell of the grid over the padded picture, -1 for none: [grid, grid] int16."""
    cell = size // grid
    cover = np.zeros((len(scene["objects"]) + 1, grid, grid), np.float32)
    cover[0] = MIN_COVER
    for index, thing in enumerate(scene["objects"], start=1):
        mask = coco_mask.decode(thing["rle"])
        padded = np.zeros((size, size), np.float32)
        padded[: mask.shape[0], : mask.shape[1]] = mask
        cover[index] = padded.reshape(grid, cell, grid, cell).mean(axis=(1, 3))
    return (cover.argmax(0) - 1).astype(np.int16)


def save_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    temporary.replace(path)


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@torch.inference_mode()
def prepare_pictures(model: PixelLLM, data: Path, cache: Path, shard: Path) -> None:
    """Write `<shard>.small.npy` (semantic encoder input, uint8) and `<shard>.owner.npy`, unless they are there."""
    targets = [cache / f"{shard.stem}.{name}.npy" for name in ("small", "owner")]
    if all(path.exists() for path in targets):
        return
    size, grid = model.config.image_size, model.grid
    small, owners = [], []
    for scene in read_shard(shard):
        padded, valid = read_padded(data / scene["file"], size)
        small.append(semantic_input(model, torch.from_numpy(padded)[None], torch.tensor([valid]))[0].numpy())
        owners.append(cell_owners(scene, grid, size))
    save_array(targets[0], np.stack(small))
    save_array(targets[1], np.stack(owners))


@torch.inference_mode()
def prepare_sam(model: PixelLLM, data: Path, cache: Path, shard: Path) -> None:
    """Write `<shard>.sam.npy`: frozen SAM features on the fused grid, float16 [n, grid, grid, C2]."""
    target = cache / f"{shard.stem}.sam.npy"
    if target.exists():
        return
    features = []
    scenes = read_shard(shard)
    for part in batches(len(scenes), 4):
        padded, valid = zip(
            *(read_padded(data / s["file"], model.config.image_size) for s in scenes[part]), strict=True
        )
        on_grid, _ = model.encode_sam(torch.from_numpy(np.stack(padded)), torch.tensor(valid))
        features.append(on_grid.half().numpy())
    save_array(target, np.concatenate(features))
