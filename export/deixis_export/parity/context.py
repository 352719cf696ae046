"""One golden directory opened for comparison: its sizes, its model and its shared inputs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from deixis_export.parity.backend import Backend, Decoding, EncodedImages, Floats, Ids
from deixis_export.parity.base_context import BadDirectory, BaseContext
from deixis_export.parity.report import Absent, Array, TorchOnly
from deixis_train.loaders.flax import load_flax, read_flax
from deixis_train.loaders.golden import config_from_golden
from deixis_train.models.config import PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM

CONFIG = "config.json"
PARAMS = "params.npz"
INPUTS = "preprocess.npz"  # pictures and padding masks of the encoders and of every chain
# Parts that a directory may lack: their name in the configuration and in the parameter tree.
OPTIONAL_PARTS = ("point_predictor", "mask_decoder", "mask_adapter", "box_decoder")

Part = TypeVar("Part")
OpenBackend = Callable[[PixelLLM], AbstractContextManager[Backend]]


def read_config(directory: Path) -> tuple[PixelLLMConfig, dict[str, Any]]:
    """The sizes in a golden directory, and everything its `config.json` says. Raises BadDirectory."""
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return config_from_golden(values), values
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadDirectory(f"{path}: not the sizes of a PixelLLM: {error}") from None


def load_model(directory: Path, config: PixelLLMConfig) -> PixelLLM | None:
    """The model of a golden directory, or None where it holds no parameters.

    Optional parts without any parameter are left out of the model. Raises CheckpointError if the rest does not fill it.
    """
    path = directory / PARAMS
    if not path.is_file():
        return None
    tree = read_flax(path)
    present = {name.split("/")[0] for name in tree}
    absent = {part: None for part in OPTIONAL_PARTS if part not in present}
    model = PixelLLM(dataclasses.replace(config, **absent))
    load_flax(model, tree).raise_if_incomplete(path)
    return model.eval()


class Context(BaseContext[Backend, PixelLLM]):
    """What every case needs. Properties raise Absent when the directory lacks what they are made from."""

    params = PARAMS

    def __init__(
        self, directory: Path, values: dict[str, Any], backend: Backend | None, open_backend: OpenBackend
    ) -> None:
        super().__init__(directory, backend)
        self.values = values
        self._open_backend = open_backend

    def open_backend(self, model: PixelLLM) -> AbstractContextManager[Backend]:
        """The kind of thing that is being checked, with another model than the directory's own."""
        _ = self.backend
        return self._open_backend(model)

    @cached_property
    def valid_hw(self) -> Floats:
        """Real (height, width) [B, 2] of the pictures: rows and columns that hold a valid pixel (section 2)."""
        mask = self.open(INPUTS)["padding_mask"] > 0
        return np.stack([mask.any(axis=2).sum(axis=1), mask.any(axis=1).sum(axis=1)], axis=1).astype(np.float32)

    @cached_property
    def image(self) -> Floats:
        """Pictures [B, S, S, 3], 0..255, the input of the encoders and of every chain."""
        return self.open(INPUTS)["image"].astype(np.float32)

    @cached_property
    def images(self) -> EncodedImages:
        return self.backend.encode_images(self.image, self.valid_hw)

    def decoding(self, beams: int, per_node: int | None = None) -> Decoding:
        return Decoding(
            beams=beams,
            per_node=self.values.get("per_node_beam_size", 1) if per_node is None else per_node,
            alpha=self.values.get("brevity_alpha", 0.6),
            begin_id=self.values.get("begin_token_id", 0),
            end_id=self.values.get("end_token_id", 1),
        )


def part(module: Part | None, name: str) -> Part:
    """An optional part of the model, or Absent."""
    if module is None:
        raise Absent(f"the model has no {name}")
    return module


def emitted(value: Part | None) -> Part:
    """A value that a backend may not emit, or TorchOnly."""
    if value is None:
        raise TorchOnly
    return value


def scores_of_filled(scores: Array) -> Array:
    """Beam scores with those of unfilled slots (about -1e7) set to 0: they must not set the scale of the error."""
    return np.where(scores < -1e6, 0.0, scores)


def as_floats(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.float32)


def as_ids(array: Array) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.int64)


def rows(ids: Array) -> Ids:
    """[B, N, ...] -> [B * N, ...] int64."""
    return ids.reshape(-1, *ids.shape[2:]).astype(np.int64)
