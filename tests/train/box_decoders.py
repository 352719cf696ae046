"""What the tests of the box decoder share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deixis_train.loaders.flax import load_flax, read_flax
from deixis_train.loaders.golden import config_from_golden
from deixis_train.models.box_decoder import BoxDecoder
from deixis_train.models.config import BoxDecoderConfig
from deixis_train.models.pixelllm import PixelLLM

GOLDEN = Path(__file__).parents[1] / "golden" / "pixelllm"
STRIDES = (8, 16, 32, 64, 128)
SMALL = BoxDecoderConfig(
    up_channels=16, channels=64, tower_channels=64, fc_dims=(32, 32), post_nms_test=40, max_detections=20
)


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max() / want.abs().max()) <= tolerance


def golden_model() -> PixelLLM:
    """The model of the golden vectors, with their parameters."""
    model = PixelLLM(config_from_golden(json.loads((GOLDEN / "config.json").read_text())))
    load_flax(model, read_flax(GOLDEN / "params.npz")).raise_if_incomplete()
    return model.eval()


def small_decoder(seed: int = 0, **changes: object) -> BoxDecoder:
    torch.manual_seed(seed)
    return BoxDecoder(dataclasses.replace(SMALL, **changes), dim_in=8, image_size=128, grid=9).eval()
