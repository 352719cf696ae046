from __future__ import annotations

import pytest
import torch
from exporting import TINY, export

from deixis.bundle import Bundle
from deixis_export.presets import random_model
from deixis_train.models.pixelllm import PixelLLM


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PixelLLM:
    """A random model; an export changes it, so everybody gets a fresh one."""
    return random_model(TINY)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The random model in fp32."""
    return export(tmp_path_factory.mktemp("export") / "bundle")
