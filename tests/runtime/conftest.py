"""Shared by the runtime's tests: the tiny bundle (real topology, random weights) and a model on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import make_picture

import deixis

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"


@pytest.fixture(scope="session")
def tiny_bundle() -> Path:
    """Path of the tiny bundle. Read only: copy it to change it."""
    return TINY


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle: Path) -> Iterator[deixis.Model]:
    """The tiny bundle on one CPU thread. Do not close it."""
    with deixis.load(tiny_bundle, device="cpu", threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """RGB uint8 [90, 120, 3]: smooth colours with a few blocks."""
    return make_picture(90, 120, 0)
