from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deixis.bundle import Bundle
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.presets import preset, random_model, random_tokenizer
from deixis_train.models.pixelllm import PixelLLM

TINY = preset("tiny")


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PixelLLM:
    """A random model; an export changes it, so everybody gets a fresh one."""
    return random_model(TINY)


def export(destination: Path, precision: str = "fp32", **options: object) -> Bundle:
    return export_bundle(
        random_model(TINY),
        destination,
        tokenizer_json=random_tokenizer(TINY.t5.vocab),
        options=ExportOptions(precision),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The random model above in fp32."""
    return export(tmp_path_factory.mktemp("export") / "bundle")
