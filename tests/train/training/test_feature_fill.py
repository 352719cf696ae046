"""Features on disk: what lacks is computed, once, and semantic maps may come from small inputs that are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training import features
from deixis_train.training.features import Fitted, fill, store_of

SIZE = PRESETS["tiny"].image_size


def read(path: Path) -> Fitted:
    rng = np.random.default_rng(int(path.stem))
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[:100] = rng.integers(0, 256, (100, SIZE, 3))
    return image, (100, SIZE)


@pytest.fixture
def model() -> PixelLLM:
    torch.manual_seed(0)
    return PixelLLM(PRESETS["tiny"]).requires_grad_(False)


def test_semantic_maps_of_small_inputs_are_those_of_the_pictures(model: PixelLLM, tmp_path: Path) -> None:
    pictures = {f"{i}.jpg": Path(f"{i}.jpg") for i in range(3)}
    quiet = lambda line: None  # noqa: E731
    live = fill(model, ["semantic"], tmp_path / "live", pictures, read, report=quiet)["semantic"]
    fill(model, ["small"], tmp_path / "kept", pictures, read, report=quiet)
    kept = fill(model, ["semantic"], tmp_path / "kept", pictures, read, report=quiet)["semantic"]
    expected = live.get(list(pictures)).astype(np.float32)
    # The small input was rounded to whole grey levels.
    np.testing.assert_allclose(kept.get(list(pictures)), expected, atol=0.02 * np.abs(expected).max())


def test_only_what_lacks_is_computed(model: PixelLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {f"{i}.jpg": Path(f"{i}.jpg") for i in range(3)}
    quiet = lambda line: None  # noqa: E731
    fill(model, ["sam"], tmp_path, pictures, read, report=quiet)
    encoded: list[tuple[str, int]] = []
    real = features.encode

    def watched(model, what, images, valid_hw, bf16):
        encoded.append((what, len(images)))
        return real(model, what, images, valid_hw, bf16)

    monkeypatch.setattr(features, "encode", watched)
    pictures["3.jpg"] = Path("3.jpg")
    stores = fill(model, ["sam", "semantic"], tmp_path, pictures, read, report=quiet)
    assert sum(count for what, count in encoded if what == "sam") == 1
    assert sum(count for what, count in encoded if what == "semantic") == 4
    assert set(store_of(model, "sam", tmp_path).places) == set(pictures) == set(stores["semantic"].places)
