"""The comparison of ways to say a location, from end to end on three tiny pictures, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from deixis_train.checkpoint import load_checkpoint, save_checkpoint
from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training import ablation
from deixis_train.training.drop_path import add_drop_path
from deixis_train.training.features import fill, read_fitted
from deixis_train.training.recipe import RecipeError, load_recipe, recipe_of
from deixis_train.training.run import Run, train
from deixis_train.training.vocabulary import build_tokenizer

VARIANTS = ("ablation-extra-tokens", "ablation-regression-no-narrations")
TINY = (
    "preset=tiny",
    'init.mobile_sam=""',
    "stages.text.precision=fp32",
    "stages.text.save_every=1",
    "stages.text.sources.refer.pictures=2",
    *(f"stages.text.auxiliary.{name}=0.0" for name in ("match", "look", "cells")),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / part / "images").mkdir(parents=True)
        (root / part / "annotations").mkdir()
        images, expressions, things, narrations = [], [], [], []
        for i in range(3):
            name = f"{i:06d}.jpg"
            cv2.imwrite(str(root / part / "images" / name), random.integers(0, 255, (48, 64, 3), dtype=np.uint8))
            images.append({"id": i, "file_name": name, "width": 64, "height": 48})
            thing = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 6, 20, 30], "area": 600, "iscrowd": 0}
            things.append(thing)
            expressions.append(thing | {"sentences": [{"sent": "the ball"}, {"sent": "red ball"}]})
            timed = {"utterance": "a ball", "start_time": 0.0, "end_time": 1.0}
            trace = [[{"x": 0.1, "y": 0.2, "t": 0.0}, {"x": 0.4, "y": 0.7, "t": 1.0}]]
            narrations.append(
                {
                    "dataset_id": "x",
                    "image_id": f"{i:06d}",
                    "caption": "a ball",
                    "timed_caption": [timed],
                    "traces": trace,
                }
            )
        common = {"images": images, "categories": [{"id": 1, "name": "ball"}]}
        files = {
            "refer.json": common | {"annotations": expressions},
            "instances.json": common | {"annotations": things},
        }
        for file, content in files.items():
            (root / part / "annotations" / file).write_text(json.dumps(content))
        lines = "".join(json.dumps(narration) + "\n" for narration in narrations)
        (root / part / "annotations" / "narrations.jsonl").write_text(lines)
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    torch.manual_seed(0)
    words = ["the", "red", "ball", "where", "is", "a", "long", "image", "caption"]
    save_checkpoint(folder, PixelLLM(PRESETS["tiny"]), build_tokenizer(words, 120).to_str(), dtype="fp32")
    return folder


def arguments(data: Path, start: Path, out: Path, *more: str) -> list[str]:
    given = ["--data", str(data), "--out", str(out), "--start", str(start), "--steps", "2", "--device", "cpu"]
    settings = [word for setting in TINY for word in ("--set", setting)]
    return [*given, *settings, "--variants", *VARIANTS, *more]


def test_variants_are_trained_measured_and_tabled(
    data: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(arguments(data, start, tmp_path / "out")) == 0, capsys.readouterr().err
    values = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert set(values["variants"]) == set(VARIANTS)
    for found in values["variants"].values():
        assert found["expressions"] == 6
        assert 0 <= found["P@0.5"] <= 1 and 0 <= found["no box"] <= 6
    assert values["variants"]["ablation-regression-no-narrations"]["no box"] == 0
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| extra tokens | with narrations |" in table and "| regression | without |" in table

    known = 192  # model.vocab of the recipes
    sizes = [load_checkpoint(tmp_path / "out" / name / "checkpoint").config.t5.vocab for name in VARIANTS]
    assert sizes == [known + 100, known]

    # Again: nothing is trained, the values stay. With another budget the folder is refused.
    marks = {name: (tmp_path / "out" / name / "text.pt").stat().st_mtime_ns for name in VARIANTS}
    assert ablation.main(arguments(data, start, tmp_path / "out")) == 0
    assert {name: (tmp_path / "out" / name / "text.pt").stat().st_mtime_ns for name in VARIANTS} == marks
    assert ablation.main([*arguments(data, start, tmp_path / "out"), "--steps", "3"]) == 1
    assert "another steps" in capsys.readouterr().err


def test_a_run_starts_with_what_it_learned_before_its_text_stage(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {
        "name": "things",
        "kind": "coco_instances",
        "files": ["train/annotations/instances.json"],
        "images": "train/images",
        "instances": "train/annotations/instances.json",
    }
    warmup = {"name": "warmup", "objective": "grid", "train": ["semantic_encoder"], "batch": 2, "sources": [source]}
    text = {"name": "text", "train": ["text"], "batch": 2, "sources": [source]}
    stages = [stage | {"steps": 2, "rate": 1e-2} for stage in (warmup, text)]
    recipe = recipe_of({"preset": "tiny", "dtype": "fp32", "stages": stages}, "a recipe")
    run = tmp_path / "run"
    assert train(Run(recipe, data, run, stage="warmup"), Accelerator(cpu=True)) is None
    assert ablation.main([*arguments(data, run, tmp_path / "out"), "--variants", VARIANTS[1]]) == 0, capsys.readouterr()

    learned = torch.load(run / "warmup.pt", weights_only=True)["trained"]
    begun = load_checkpoint(tmp_path / "out" / "start" / "checkpoint").model.state_dict()
    assert learned.keys() <= begun.keys() and all(torch.equal(begun[name], learned[name]) for name in learned)
    # The semantic encoder is frozen in the variants, so what was learned is still there.
    after = load_checkpoint(tmp_path / "out" / VARIANTS[1] / "checkpoint").model.state_dict()
    assert all(torch.allclose(after[name], learned[name], rtol=1e-3, atol=1e-4) for name in learned)


def test_a_start_that_is_none(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert ablation.main(arguments(data, tmp_path / "run", tmp_path / "out")) == 1
    assert "neither a checkpoint" in capsys.readouterr().err
    table = {
        "preset": "tiny",
        "init": {"checkpoint": None},
        "stages": [
            {"name": name, "objective": objective, "steps": 1, "rate": 1e-3, "batch": 2, "train": ["semantic_encoder"]}
            | {"sources": [{"name": "things", "kind": "coco_instances", "files": ["a.json"], "instances": "a.json"}]}
            for name, objective in (("warmup", "grid"), ("text", "text"))
        ],
    }
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(table))
    assert ablation.main(arguments(data, tmp_path / "run", tmp_path / "out")) == 1
    assert "its stage 'warmup' is not done" in capsys.readouterr().err
    (tmp_path / "run" / "recipe.json").write_text("{}")
    assert ablation.main(arguments(data, tmp_path / "run", tmp_path / "out")) == 1
    assert "recipe.json" in capsys.readouterr().err


def test_recipes_differ_in_what_they_compare() -> None:
    recipes = {name: load_recipe(name) for name in ablation.VARIANTS}
    for recipe in recipes.values():
        [stage] = recipe.stages
        assert sum(source.pictures for source in stage.sources) == 16
        assert (stage.steps, stage.rate) == (recipes["ablation-regression"].stages[0].steps, 1e-3)
    ways = [recipe.localisation for recipe in recipes.values()]
    assert ways == ["text", "tokens", "regression", "tokens", "regression"]
    with pytest.raises(RecipeError, match="must train 'text'"):
        load_recipe("ablation-extra-tokens", ["stages.text.train=['prompt_adapter']"])
    with pytest.raises(RecipeError, match="masks are learned"):
        load_recipe("ablation-raw-string", ["stages.text.sources.refer.losses=['point', 'mask']"])


def test_features_are_kept_as_evaluation_sees_them(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PixelLLM(PRESETS["tiny"])
    add_drop_path(model)
    pictures = {f"{i:06d}.jpg": data / "val" / "images" / f"{i:06d}.jpg" for i in range(3)}
    model.train()
    size = model.config.image_size
    stores = fill(model, ["sam"], tmp_path, pictures, lambda path: read_fitted(path, size))
    fitted = [read_fitted(path, size) for path in pictures.values()]
    images = torch.from_numpy(np.stack([image for image, _ in fitted])).float()
    with torch.inference_mode():
        expected, _ = model.eval().encode_sam(images, torch.tensor([valid for _, valid in fitted]).float())
    kept = torch.from_numpy(stores["sam"].get(list(pictures))).float()
    torch.testing.assert_close(kept, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
