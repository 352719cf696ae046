"""Whole runs: killed ones end like others, two processes learn what one does, features on disk are the live ones."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from made_up_data import make_data

from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.features import FeatureStore, encode, fill, read_fitted
from deixis_train.training.recipe import load_recipe
from deixis_train.training.run import Run, train

INSTANCES = "annotations/instances.json"
RECIPE = f"""
preset = "tiny"
dtype = "fp32"

[[stages]]
name = "extractor"
objective = "prompt_grid"
train = ["prompt_adapter", "visual_projection"]
steps = 2
batch = 2
rate = 1e-2
cache = ["sam", "semantic"]
auxiliary = {{ standardize = true }}
report_every = 1
[[stages.sources]]
name = "things"
kind = "coco_instances"
files = ["{INSTANCES}"]
instances = "{INSTANCES}"

[[stages]]
name = "text"
train = ["prompt_adapter", "visual_projection", "text", "point_predictor"]
mixing = "all"
steps = 12
rate = 1e-2
warmup_steps = 2
clip_norm = 1.0
save_every = 2
report_every = 1
cache = ["sam", "semantic"]
losses = {{ point = 1.0, point_kind = "box", before_end = 0.2 }}
auxiliary = {{ match = 1.0, look = 1.0, cells = 0.5, standardize = true }}
[[stages.sources]]
name = "narrations"
kind = "localized_narratives"
files = ["annotations/narrations.jsonl"]
instances = "{INSTANCES}"
losses = ["text", "point"]
alignment = "text"
pictures = 2
[[stages.sources]]
name = "refer"
kind = "refer"
files = ["annotations/refer.json"]
instances = "{INSTANCES}"
losses = ["point"]
referring = "where is "
pictures = 2
rows = 2
[[stages.held_out]]
name = "held_out"
kind = "refer"
files = ["annotations/refer.json"]
instances = "{INSTANCES}"
losses = ["point"]
referring = "where is "
pictures = 2
rows = 2
"""


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with `recipe.toml` and data/. The tiny preset reads out of image tokens where the recipe asks for it."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    make_data(tmp_path / "data", load_recipe(str(recipe)))
    return tmp_path


@pytest.fixture(autouse=True)
def dense_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(PRESETS, "tiny", DENSE)


DENSE = dataclasses.replace(PRESETS["tiny"], prompt_fuse="dense")
# What a child process runs: the command, with the same preset.
CHILD = """
import dataclasses, sys
from deixis_train.models.config import PRESETS
PRESETS["tiny"] = dataclasses.replace(PRESETS["tiny"], prompt_fuse="dense")
from deixis_train.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(made: Path, out: str, *more: str) -> list[str]:
    recipe, data = str(made / "recipe.toml"), str(made / "data")
    options = ["--data", data, "--out", str(made / out), "--device", "cpu", "--threads", "1", *more]
    return [sys.executable, "-c", CHILD, recipe, *options]


def weights(run: Path, stage: str = "text") -> dict[str, torch.Tensor]:
    state = torch.load(run / f"{stage}.pt", weights_only=True)
    assert state["done"]
    return state["trained"] | {f"helpers.{name}": value for name, value in state["helpers"].items()}


def test_a_killed_run_ends_like_one_that_was_not(made: Path) -> None:
    recipe = load_recipe(str(made / "recipe.toml"))
    train(Run(recipe, made / "data", made / "whole"), Accelerator(cpu=True))
    assert (made / "whole" / "checkpoint" / "model.safetensors").is_file()
    child = subprocess.Popen(command(made, "killed"), stdout=subprocess.DEVNULL)
    log = made / "killed" / "text.log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") >= 5):
        assert child.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not torch.load(made / "killed" / "text.pt", weights_only=True)["done"]
    train(Run(recipe, made / "data", made / "killed"), Accelerator(cpu=True))
    whole, killed = weights(made / "whole"), weights(made / "killed")
    assert whole.keys() == killed.keys()
    different = [name for name in whole if not torch.equal(whole[name], killed[name])]
    assert not different
    files = [(made / run / "checkpoint" / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert files[0] == files[1]


def test_frozen_parts_are_not_touched(made: Path) -> None:
    recipe = load_recipe(str(made / "recipe.toml"), ["stages.text.steps=2"])
    torch.manual_seed(recipe.seed)
    before = PixelLLM(DENSE).state_dict()
    folder = train(Run(recipe, made / "data", made / "run"), Accelerator(cpu=True))
    assert folder is not None
    from deixis_train.checkpoint import load_checkpoint

    after = load_checkpoint(folder).model.state_dict()
    learned = ("prompt_adapter.", "visual_projection.", "text.", "point_predictor.")
    frozen = [name for name in before if not name.startswith(learned)]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert all(any(not torch.equal(before[n], after[n]) for n in before if n.startswith(part)) for part in learned)
    again = train(Run(recipe, made / "data", made / "run"), Accelerator(cpu=True))
    assert again == folder, "a finished run writes its checkpoint again"


@pytest.mark.slow
def test_the_semantic_encoder_learns_from_its_cached_input(made: Path) -> None:
    together = [
        'stages.extractor.train=["semantic_encoder", "prompt_adapter", "visual_projection"]',
        'stages.extractor.cache=["sam", "small"]',
    ]

    def losses(out: str, more: list[str]) -> list[float]:
        recipe = load_recipe(str(made / "recipe.toml"), ["stages.text.steps=1", *more])
        train(Run(recipe, made / "data", made / out), Accelerator(cpu=True))
        lines = (made / out / "extractor.log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    alone, both = losses("alone", []), losses("both", together)
    assert both[0] == pytest.approx(alone[0], rel=5e-3), "the same features, but for the rounding to bytes and to fp16"
    learned = weights(made / "both", "extractor")
    torch.manual_seed(load_recipe(str(made / "recipe.toml")).seed)
    before = PixelLLM(DENSE).state_dict()
    moved = [name for name in learned if name.startswith("semantic_encoder.blocks")]
    assert moved and all(not torch.equal(before[name], learned[name]) for name in moved if before[name].any())
    stores = list((made / "both" / "features").rglob("semantic-*"))
    assert len(stores) == 1, "the text stage sees what the encoder has become"
    assert stores[0].name not in {store.name for store in (made / "alone" / "features").rglob("semantic-*")}


def test_two_processes_learn_what_one_does(made: Path) -> None:
    settings = ("steps=3", "clip_norm=0.0", "dropout=false")
    short = [word for setting in settings for word in ("--set", f"stages.text.{setting}")]
    subprocess.run(command(made, "one", *short), check=True, stdout=subprocess.DEVNULL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        children.append(subprocess.Popen(command(made, "two", *short), env=os.environ | group))
    assert [child.wait() for child in children] == [0, 0]
    one, two = weights(made / "one"), weights(made / "two")
    # Rows are alike, so that the mean over processes is the mean over pictures but for rounding. Adam enlarges that
    # where gradients are next to nothing, so what was learned is compared as a whole.
    torch.manual_seed(0)
    start = PixelLLM(DENSE).state_dict()
    learned = [name for name in one if name in start]
    moved = torch.cat([(one[name] - start[name]).flatten() for name in learned])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in learned])
    assert moved.norm() > 1
    assert apart.norm() < 0.05 * moved.norm()


def test_features_on_disk_are_the_live_ones_and_new_pictures_are_added(made: Path) -> None:
    torch.manual_seed(0)
    model = PixelLLM(DENSE).eval()
    paths = {path.name: path for path in sorted((made / "data" / "images").iterdir())}
    names = list(paths)
    lines: list[str] = []

    def read(path: Path):
        return read_fitted(path, DENSE.image_size)

    first = {name: paths[name] for name in names[:2]}
    fill(model, ["sam", "small"], made / "features", first, read, batch=1, report=lines.append)
    stores = fill(model, ["sam", "small"], made / "features", paths, read, batch=3, report=lines.append)
    assert lines[-1].startswith("features sam+small: 2/2"), "what was there is not computed again"
    again = FeatureStore(stores["sam"].folder)
    assert len(again) == len(names) and "other.jpg" not in again
    pictures, valid = zip(*(read(paths[name]) for name in names), strict=True)
    live = encode(model, "sam", torch.from_numpy(np.stack(pictures)), torch.tensor(valid), bf16=False)
    np.testing.assert_allclose(again.get(names), live, atol=2e-3)
    assert np.array_equal(again.get(names[::-1])[-1], again.get(names[:1])[0])
    with torch.no_grad():
        next(model.sam_encoder.parameters()).add_(1)
    other = fill(model, ["sam"], made / "features", first, read, report=lines.append)
    assert other["sam"].folder != stores["sam"].folder, "features of other weights are kept apart"
