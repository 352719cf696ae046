"""One golden directory of GLaMM opened for comparison: its sizes, its model and its pictures."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deixis.bundle import ImageSpec
from deixis.geometry import Geometry
from deixis.image import fit, middle, pad
from deixis_export.parity.base_context import BadDirectory, BaseContext
from deixis_export.parity.glamm.backend import Floats, GlammBackend, Prepared, Size
from deixis_export.parity.report import Absent, Array
from deixis_train.loaders.glamm_names import config_from_golden, load_glamm_state
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm

MANIFEST = "manifest.json"
PARAMS = "state_dict.npz"
PICTURES = "preprocess.npz"  # the pictures of all files


def read_manifest(directory: Path) -> dict[str, Any]:
    """What the `manifest.json` of a golden directory says. Raises BadDirectory."""
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config_from_golden(values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        raise BadDirectory(f"{path}: not the sizes of a GLaMM: {what}") from None
    return values


def load_model(directory: Path, manifest: Mapping[str, Any]) -> Glamm | None:
    """The model of a golden directory, or None where it holds no parameters.

    Raises CheckpointError if they do not fill it.
    """
    path = directory / PARAMS
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            tensors = {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: unreadable: {error}") from None
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    try:
        model = Glamm(config_from_golden(manifest, tensors))
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    load_glamm_state(model, tensors).raise_if_incomplete(path)
    return model.eval()


class GlammContext(BaseContext[GlammBackend, Glamm]):
    """What every case needs. Properties raise Absent when the directory lacks what they are made from."""

    params = PARAMS

    def __init__(self, directory: Path, manifest: dict[str, Any], backend: GlammBackend | None) -> None:
        super().__init__(directory, backend)
        self.manifest = manifest
        self._prepared: dict[int, Prepared] = {}

    @cached_property
    def config(self) -> GlammConfig:
        """From the manifest alone: ids and sizes of pictures, which no parameters decide."""
        return config_from_golden(self.manifest)

    @property
    def grounding_spec(self) -> ImageSpec:
        return ImageSpec(self.config.image_size, resize="longest_side", antialias=True)

    @property
    def global_spec(self) -> ImageSpec:
        size = self.config.clip.image_size
        return ImageSpec(size, resize="center_crop", interpolation="bicubic", antialias=True, pad="none")

    @cached_property
    def pictures(self) -> list[int]:
        """Numbers of the pictures."""
        names = (re.fullmatch(r"image(\d+)_uint8", name) for name in self.open(PICTURES))
        return sorted(int(match[1]) for match in names if match)

    def nth(self, index: int) -> Prepared:
        """The picture at that place among all."""
        if index >= len(self.pictures):
            raise Absent(f"{PICTURES} has {len(self.pictures)} pictures, not {index + 1}")
        return self.picture(self.pictures[index])

    def picture(self, number: int) -> Prepared:
        """A picture, prepared by the runtime."""
        if number not in self._prepared:
            original = self.open(PICTURES)[f"image{number}_uint8"]
            resized, geometry = fit(original, self.grounding_spec)
            whole = middle(original, self.global_spec).astype(np.float32)
            self._prepared[number] = Prepared(original, whole, pad(resized, self.grounding_spec), geometry.valid)
        return self._prepared[number]

    def picture_of(self, original: Size, otherwise: int) -> Prepared:
        """The picture of that (height, width); where several have it, the one at the place `otherwise`."""
        found = [n for n in self.pictures if self.picture(n).original.shape[:2] == original]
        if not found:
            raise Absent(f"{PICTURES} has no picture of {original[0]}x{original[1]} px")
        return self.picture(found[0]) if len(found) == 1 else self.nth(otherwise)

    def global_images(self) -> Floats:
        """All pictures as CLIP takes them, from the file's own resized ones: [B, s, s, 3] 0..255."""
        file = self.open(PICTURES)
        names = [f"clip{number}_resized_cropped_uint8" for number in self.pictures]
        if not names:
            raise Absent(f"{PICTURES} has no pictures")
        return np.stack([file[name] for name in names]).astype(np.float32)

    def geometry(self, valid: Size, original: Size) -> Geometry:
        """How a picture of `original` lies in the grounding encoder's input."""
        return Geometry(original, valid, self.config.image_size)


def maps_of(tokens: Array) -> Floats:
    """Tokens of CLIP's grid [B, T0, C] -> [B, g, g, C]."""
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(len(tokens), side, side, tokens.shape[2]).astype(np.float32)


def size_of(pair: Array) -> Size:
    return int(pair[0]), int(pair[1])
