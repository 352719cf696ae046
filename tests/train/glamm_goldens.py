"""The golden vectors of GLaMM as tensors, and the model they were made with."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deixis_train.loaders.glamm_names import config_from_golden, load_glamm_state
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.reference import Picture

FOLDER = Path(__file__).parent.parent / "golden" / "glamm"
TOLERANCE = 1e-4  # of an array's largest magnitude


@functools.cache
def arrays(name: str) -> dict[str, Tensor]:
    """The numeric arrays of one file; float16 becomes float32."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        found = {key: file[key] for key in file.files}
    tensors = {key: torch.from_numpy(value) for key, value in found.items() if value.dtype.kind != "U"}
    return {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()}


def manifest() -> dict:
    return json.loads((FOLDER / "manifest.json").read_text())


@functools.cache
def golden_model() -> Glamm:
    """Shared by the tests of a file: do not change it."""
    model = Glamm(config_from_golden(manifest())).eval().requires_grad_(False)
    load_glamm_state(model, arrays("state_dict")).raise_if_incomplete()
    return model


def picture(i: int) -> Picture:
    """Picture 0 or 1 as the graphs take it."""
    found = arrays("preprocess")
    resized = found[f"sam{i}_resized_uint8"]
    height, width = resized.shape[:2]
    size = found[f"sam{i}_input"].shape[-1]
    image = torch.zeros(1, size, size, 3)
    image[0, :height, :width] = resized.float()
    return Picture(found[f"clip{i}_resized_cropped_uint8"].float()[None], image, torch.tensor([[height, width]]))


def assert_close(found: Tensor, golden: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal to within the tolerance, relative to the golden array's largest magnitude; shapes exactly."""
    assert found.shape == golden.shape
    if golden.numel():
        error = float((found - golden).abs().max() / golden.abs().max())
        assert error <= tolerance, f"relative error {error:.2e}"
