"""The same questions to the exported bundle and to the PyTorch model of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deixis
from deixis.errors import PromptError, TextTooLongError
from deixis_bench.eval.bundle_predictor import BundlePredictor
from deixis_export.manifest import task_table
from deixis_export.presets import preset, random_model, random_tokenizer
from deixis_train.checkpoint import save_checkpoint
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.model_tasks import model_tasks
from deixis_train.evaluation.torch_predictor import TorchPredictor, load_predictor
from deixis_train.models.config import PRESETS
from make_tiny_bundle import SEED, TINY_BUNDLE

TEXTS = ["the red mug on the left", "a cup", "two books behind the green bottle"]
BOXES = [(10.0, 20.0, 90.0, 110.0), (0.0, 0.0, 150.0, 60.0), (100.5, 3.25, 149.0, 119.0)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = preset("tiny")
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(folder, random_model(config, SEED), random_tokenizer(config.t5.vocab))
    return folder


@pytest.fixture(scope="module")
def torch_side(checkpoint: Path) -> TorchPredictor:
    return load_predictor(checkpoint, threads=1)[0]


@pytest.fixture(scope="module")
def bundle_side() -> Iterator[BundlePredictor]:
    with deixis.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        yield BundlePredictor(model)


@pytest.fixture(scope="module", params=[(120, 150), (90, 60)], ids=["shrunk", "grown"])
def picture(request: pytest.FixtureRequest) -> np.ndarray:
    """Larger and smaller than the network input of 128 px."""
    return np.random.default_rng(3).integers(0, 256, (*request.param, 3), dtype=np.uint8)


def test_refer_and_its_masks(torch_side: TorchPredictor, bundle_side: BundlePredictor, picture: np.ndarray) -> None:
    ours, our_masks = torch_side.refer(picture, TEXTS)
    theirs, their_masks = bundle_side.refer(picture, TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=0.1)
    assert our_masks is not None and their_masks is not None
    for a, b in zip(our_masks, their_masks, strict=True):
        assert a.shape == b.shape == picture.shape[:2] and a.dtype == bool
        assert (a != b).mean() < 0.01
    assert torch_side.refer(picture, TEXTS, masks=False) == (ours, None)


def test_trace(torch_side: TorchPredictor, bundle_side: BundlePredictor, picture: np.ndarray) -> None:
    text = "a Red mug, and two  blue cups."
    ours, theirs = torch_side.trace(picture, text), bundle_side.trace(picture, text)
    assert [word.text for word in ours] == [word.text for word in theirs] == text.split()
    np.testing.assert_allclose([word.box for word in ours], [word.box for word in theirs], atol=0.1)  # type: ignore[arg-type]


def test_captions(torch_side: TorchPredictor, bundle_side: BundlePredictor, picture: np.ndarray) -> None:
    assert torch_side.caption(picture) == bundle_side.caption(picture) != ""  # beam search
    boxes = [tuple(np.minimum(box, [picture.shape[1], picture.shape[0]] * 2)) for box in BOXES[:2]]
    ours, theirs = torch_side.region_captions(picture, boxes), bundle_side.region_captions(picture, boxes)
    assert ours == theirs and len(ours) == 2  # greedy


def test_segment(torch_side: TorchPredictor, bundle_side: BundlePredictor, picture: np.ndarray) -> None:
    ours, theirs = torch_side.segment(picture, BOXES[:2]), bundle_side.segment(picture, BOXES[:2])
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == picture.shape[:2] and (a != b).mean() < 0.01


@pytest.mark.parametrize("text", ["é", "", "a " * 20])
def test_both_refuse_the_same_texts(
    torch_side: TorchPredictor, bundle_side: BundlePredictor, picture: np.ndarray, text: str
) -> None:
    expected = TextTooLongError if len(text) > 20 else PromptError
    for predictor in (torch_side, bundle_side):
        with pytest.raises(expected):
            predictor.refer(picture, [text])
        with pytest.raises(expected):
            predictor.trace(picture, text)


@pytest.mark.parametrize("name", PRESETS)
def test_a_checkpoint_is_asked_as_its_bundle_will_be(name: str) -> None:
    overrides = {"caption": {"instruction": "describe", "beams": 1}}
    assert model_tasks(PRESETS[name], overrides) == task_table(PRESETS[name], overrides)
    with pytest.raises(EvaluationError, match="not known here"):
        model_tasks(PRESETS[name], {"caption": {"beam": 1}})


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no config\.json"):
        load_predictor(tmp_path)
