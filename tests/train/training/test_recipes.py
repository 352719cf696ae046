"""Recipes: read strictly, built on one another, and every shipped one trains a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from made_up_data import make_data

from deixis_train.checkpoint import load_checkpoint
from deixis_train.cli import main
from deixis_train.data.formats.errors import DataError
from deixis_train.training.recipe import RecipeError, load_recipe, shipped
from deixis_train.training.run import Run, train

SMALL = """
preset = "tiny"
[[stages]]
name = "text"
train = ["text"]
steps = 3
batch = 2
rate = 0.1
[[stages.sources]]
name = "captions"
kind = "coco_captions"
files = ["captions.json"]
"""

ONE_MORE = '[[stages.sources]]\nname = "captions"\nkind = "coco_captions"\nfiles = ["captions.json"]\n'
SAME_STAGE = f'[[stages]]\nname = "text"\ntrain = ["text"]\nsteps = 3\nbatch = 2\nrate = 0.1\n{ONE_MORE}'


def written(folder: Path, text: str, name: str = "small.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("steps = 3", "stepps = 3"), ["stages (text).stepps"]),
        (('name = "captions"', 'name = "captions"\nweigth = 2'), ["stages (text).sources (captions).weigth"]),
        (("rate = 0.1", ""), ["stages (text).rate is missing"]),
        (("steps = 3", 'steps = "3"'), ["stages (text).steps", "int", "'3'"]),
        (("steps = 3", "steps = true"), ["stages (text).steps", "int"]),
        (('train = ["text"]', 'train = ["txt"]'), ["stages (text).train", "'txt'", "semantic_encoder"]),
        (('train = ["text"]', 'train = "text"'), ["stages (text).train", "list"]),
        (("batch = 2", ""), ["stages (text).batch"]),
        (("batch = 2", 'mixing = "all"'), ["sources (captions).pictures"]),
        (("rate = 0.1", "rate = 0.1\nauxiliary = { look = 1.0 }"), ["sources (captions).instances"]),
        (("rate = 0.1", 'rate = 0.1\ncache = ["semantic"]\nobjective = "prompt_grid"'), ["cache"]),
        (("steps = 3", "steps = ["), ["not TOML"]),
        (("steps = 3", "steps = 0"), ["stages (text).steps"]),
        (("steps = 3", "steps = 3\nreport_every = 0"), ["stages (text).report_every"]),
        (('train = ["text"]', "train = []"), ["stages (text).train"]),
        (('name = "captions"', 'name = "captions"\nlosses = []'), ["sources (captions).losses"]),
        (("[[stages.sources]]", ONE_MORE + "[[stages.sources]]"), ["two sources", "'captions'"]),
        (("[[stages]]", SAME_STAGE + "[[stages]]"), ["two stages", "'text'"]),
        (
            ("rate = 0.1\n[[stages.sources]]", 'rate = 0.1\ncache = ["sam"]\n[[stages.sources]]\nlosses = ["mask"]'),
            ["sources (captions).losses", "cache"],
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, change: tuple[str, str], words: list[str]) -> None:
    assert change[0] in SMALL
    path = written(tmp_path, SMALL.replace(*change))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    message = str(error.value)
    assert message.startswith(path) and "\n" not in message
    assert all(word in message for word in words), message


def test_a_recipe_says_what_differs_from_its_base(tmp_path: Path) -> None:
    written(tmp_path, SMALL)
    over = 'base = "small"\nseed = 7\n[[stages]]\nname = "text"\nsteps = 9\n[[stages]]\nname = "more"\n'
    over += 'train = ["text"]\nsteps = 1\nrate = 1\nbatch = 2\nsources = []\n'
    with pytest.raises(RecipeError, match=r"stages \(more\): no sources"):
        load_recipe(written(tmp_path, over, "over.toml"))
    over = over.split('[[stages]]\nname = "more"')[0]
    recipe = load_recipe(written(tmp_path, over, "over.toml"), ["stages.text.sources.captions.weight=2"])
    assert (recipe.seed, recipe.preset) == (7, "tiny")
    [stage] = recipe.stages
    assert (stage.steps, stage.rate, stage.sources[0].files) == (9, 0.1, ("captions.json",))
    assert stage.sources[0].weight == 2.0
    for wrong in ("stages.txt.steps=1", "stages.text=1", "seed"):
        with pytest.raises(RecipeError, match="--set"):
            load_recipe(str(tmp_path / "small.toml"), [wrong])


def test_shipped_recipes_have_the_numbers_of_section_13() -> None:
    found = {
        name: (s.batch, s.steps, s.warmup_steps, s.rate, s.weight_decay, s.layer_decay, s.clip_norm, s.precision)
        for name in ("trace", "refer", "refer-masks", "dense-captions", "joint", "joint-masks")
        for s in load_recipe(name).stages
    }
    assert found == {
        "trace": (256, 10_000, 250, 5e-5, 0.0, 0.0, 0.0, "fp32"),
        "refer": (64, 120_000, 1000, 5e-5, 0.0, 0.0, 0.0, "fp32"),
        "refer-masks": (64, 60_000, 500, 5e-5, 0.0, 0.0, 0.0, "fp32"),
        "dense-captions": (64, 40_000, 1000, 1e-4, 0.05, 0.8, 0.0, "fp32"),
        "joint": (128, 240_000, 2000, 1e-4, 0.05, 0.8, 0.0, "fp32"),
        "joint-masks": (128, 30_000, 250, 1e-4, 0.0, 0.0, 0.0, "fp32"),
    }
    weights = {s.name: s.weight for s in load_recipe("joint").stages[0].sources}
    assert list(weights.values()) == [3, 1, 1, 5, 1, 5, 5]
    for name in found:
        [stage] = load_recipe(name).stages
        assert not {"sam_encoder", "prompt_encoder", "mask_decoder", "text"} & set(stage.train), name
        assert stage.auxiliary == type(stage.auxiliary)() and not stage.dropout_in_frozen
    masks = load_recipe("refer-masks").stages[0]
    assert masks.train == ("mask_adapter", "point_predictor") and masks.paces == {"mask_adapter": 10.0}


def tiny(name: str):
    """A shipped recipe at the size of tests: a step per stage, nothing to start from."""
    recipe = load_recipe(name)
    lora = recipe.model.lora_rank
    none = dict.fromkeys(("checkpoint", "mobile_sam", "sam", "eva02", "t5", "tokenizer"))
    stages = tuple(
        replace(
            stage,
            steps=1,
            batch=min(stage.batch, 2),
            micro_batch=1 if stage.mixing == "draw" and stage.objective == "text" else 0,
            report_every=1,
            held_out_batches=1,
            sources=tuple(replace(s, pictures=min(s.pictures, 2)) for s in stage.sources),
        )
        for stage in recipe.stages
    )
    return replace(
        recipe,
        preset="tiny" if recipe.preset == "xl" else recipe.preset,
        stages=stages,
        model=replace(recipe.model, text=None, lora_rank=min(lora, 4) if lora is not None else None),
        init=replace(recipe.init, **none),
    )


PAPER = [name for name in shipped() if load_recipe(name).preset == "xl"]


@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_of_the_paper_trains_a_step(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    recipe = tiny(name)
    make_data(tmp_path / "data", recipe)
    folder = train(Run(recipe, tmp_path / "data", tmp_path / "run"), Accelerator(cpu=True))
    assert folder is not None
    model = load_checkpoint(folder).model
    assert (model.box_decoder is not None) == (recipe.model.box_decoder is True)
    log = (tmp_path / "run" / f"{recipe.stages[0].name}.log.jsonl").read_text(encoding="utf-8")
    assert '"loss": null' not in log and '"loss": 0.0' not in log


def test_one_encoder_may_learn_while_features_of_the_other_are_cached(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    change = 'train = ["semantic_encoder", "text"]\ncache = ["sam"]\nreport_every = 1'
    recipe = load_recipe(written(tmp_path, SMALL.replace('train = ["text"]', change)))
    make_data(tmp_path / "data", recipe)
    assert train(Run(recipe, tmp_path / "data", tmp_path / "run"), Accelerator(cpu=True)) is not None
    assert [folder.name[:4] for folder in (tmp_path / "run" / "features" / "images").iterdir()] == ["sam-"]


@pytest.mark.parametrize(
    ("kind", "loss", "what"),
    [
        ("coco_instances", "proposal", "boxes"),
        ("coco_captions", "point", "boxes or narrations"),
        ("goldg", "mask", "masks"),
    ],
)
def test_data_that_cannot_teach_a_loss_is_refused(tmp_path: Path, kind: str, loss: str, what: str) -> None:
    change = f'kind = "{kind}"\nlosses = ["{loss}"]'
    recipe = load_recipe(written(tmp_path, SMALL.replace('kind = "coco_captions"', change)))
    make_data(tmp_path / "data", recipe)
    with pytest.raises(DataError, match=f"'captions' is to teach '{loss}'.*no {what}"):
        train(Run(recipe, tmp_path / "data", tmp_path / "run"), Accelerator(cpu=True))


def test_the_command_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "stage 2a of the paper" in capsys.readouterr().out
    assert main(["nonsense", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("deixis train: no recipe 'nonsense'") and error.count("\n") == 1
    assert main(["refer", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "weights/sam_vit_h_4b8939.pth" in error and error.count("\n") == 1
