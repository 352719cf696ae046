"""Whole runs of GLaMM at tiny sizes: every stage learns, stops and goes on; every recipe trains a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from made_up_data import make_data  # pyright: ignore[reportMissingImports]

from deixis_train.checkpoint import load_checkpoint
from deixis_train.data.formats.errors import DataError
from deixis_train.glamm.family import GlammRun
from deixis_train.glamm.mixture import ItemFeed
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.training import loop
from deixis_train.training.corpus import Corpus
from deixis_train.training.optim import choose_trained, learning_rate
from deixis_train.training.recipe import Recipe, RecipeError, load_recipe, recipe_of, shipped
from deixis_train.training.run import Run, train


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str, **stage_values) -> Recipe:
    """A shipped recipe at the size of tests, nothing to start from."""
    recipe = load_recipe(name)

    def small(sources):
        return tuple(replace(s, pictures=min(s.pictures, 1), rows=min(s.rows, 2)) for s in sources)

    stages = tuple(
        replace(
            stage,
            **({"steps": 1, "batch": 2, "warmup_steps": 0, "precision": "fp32", "report_every": 1} | stage_values),
            micro_batch=1 if stage.mixing in ("types", "walk") else 0,
            sources=small(stage.sources),
            held_out=(),
        )
        for stage in recipe.stages
    )
    none = dict.fromkeys(("pixelllm", "glamm", "clip", "llama", "projector", "sam", "mobile_sam", "tokenizer"))
    return replace(recipe, preset="glamm-tiny", dtype="fp32", stages=stages, init=replace(recipe.init, **none))


def begun(recipe: Recipe, folder: Path) -> GlammRun:
    make_data(folder / "data", recipe)
    (folder / "run").mkdir()
    return GlammRun(recipe, Corpus(folder / "data", folder / "features", lambda line: None), folder / "run")


@pytest.mark.parametrize("name", [n for n in shipped() if load_recipe(n).preset == "glamm-7b"])
def test_every_published_recipe_trains_a_step(tmp_path: Path, name: str) -> None:
    recipe = tiny(name)
    make_data(tmp_path / "data", recipe)
    folder = train(Run(recipe, tmp_path / "data", tmp_path / "run"), Accelerator(cpu=True))
    assert folder is not None
    model = load_checkpoint(folder).glamm
    assert model.config.llama.lora_rank == 0  # merged
    log = (tmp_path / "run" / f"{recipe.stages[0].name}.log.jsonl").read_text(encoding="utf-8")
    assert '"loss": null' not in log and '"loss": 0.0' not in log


def test_published_recipes_have_the_numbers_of_section_9() -> None:
    parts = {"lora", "embed_tokens", "lm_head", "region_encoder", "mask_projection", "mask_decoder"}
    steps = {"glamm-gcg": 5000, "glamm-refer": 1750, "glamm-regions": 2500, "glamm-full": 5000}
    for name, count in steps.items():
        [stage] = load_recipe(name).stages
        assert (stage.steps, stage.rate, stage.warmup_steps, stage.schedule) == (count, 3e-4, 100, "linear")
        assert (stage.betas, stage.weight_decay, stage.clip_norm) == ((0.9, 0.95), 0.0, 1.0)
        assert set(stage.train) == parts and stage.batch == 160 and stage.micro_batch == 2
        assert (stage.losses.text, stage.losses.bce, stage.losses.dice) == (1.0, 2.0, 0.5)
    assert load_recipe("glamm-full").stages[0].types == {"caption": 0.15, "region": 0.40, "mask": 0.45}
    rates = [learning_rate(step, 1000, 1.0, 100, "linear") for step in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_the_published_freezing(tmp_path: Path) -> None:
    run = begun(tiny("glamm-gcg"), tmp_path)
    learning = set(choose_trained(run.model, run.recipe.stages[0].train))
    assert {name.split(".")[0] for name in learning} == {"llama", "region_encoder", "mask_projection", "mask_decoder"}
    inside = {name for name in learning if name.startswith("llama.layers")}
    assert inside == {f"llama.layers.{i}.self_attn.{p}_proj.lora_{f}" for i in range(2) for p in "qv" for f in "ab"}
    assert {"llama.embed_tokens.weight", "llama.lm_head.weight"} <= learning
    with pytest.raises(ValueError, match="trains text, which the model 'glamm-tiny' does not have"):
        choose_trained(run.model, ["text"])


def test_a_stopped_run_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("tabletop-glamm", steps=2, save_every=1, rate=1e-2)
    make_data(tmp_path / "data", recipe)

    def run(out: str) -> Path:
        features = tmp_path / "features"
        folder = train(Run(recipe, tmp_path / "data", tmp_path / out, features), Accelerator(cpu=True))
        assert folder is not None
        return folder

    whole = run("whole")
    given, calls = loop.set_rate, []

    def stop_in_the_middle(*arguments) -> None:
        calls.append(arguments)
        if len(calls) in (2, 5, 8):  # in every stage once
            raise KeyboardInterrupt
        given(*arguments)

    monkeypatch.setattr(loop, "set_rate", stop_in_the_middle)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert (whole / "model.safetensors").read_bytes() == (run("stopped") / "model.safetensors").read_bytes()
    loaded = load_checkpoint(whole)
    assert loaded.tasks["refer"]["instruction"] == "please segment {text} in this image."
    # A later run may begin with it, with LoRA factors of its own.
    init = replace(recipe.init, checkpoint=str(whole))
    [masks] = [stage for stage in recipe.stages if stage.name == "masks"]
    again = replace(recipe, stages=(replace(masks, cache=()),), init=init)
    (tmp_path / "again").mkdir()
    started = GlammRun(again, Corpus(tmp_path / "data", tmp_path / "features", print), tmp_path / "again").model
    assert started.config.llama.lora_rank == 8
    assert torch.equal(started.projector.get_parameter("0.weight"), loaded.glamm.projector.get_parameter("0.weight"))
    started.llama.merge_lora()
    ours, theirs = started.llama.state_dict(), loaded.glamm.llama.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_stage_of_the_demo_learns(tmp_path: Path, number: int) -> None:
    recipe = tiny("tabletop-glamm")
    recipe = replace(recipe, stages=(replace(recipe.stages[number], batch=4, dropout=False),))
    run, [stage] = begun(recipe, tmp_path), recipe.stages
    feeds = run.feeds(stage, stage.sources, 0, writer=True)
    feeds = feeds[1:3] or feeds  # regions and another one
    objective = run.objective(stage)
    trained = choose_trained(run.model, stage.train)
    optimizer = torch.optim.AdamW([*trained.values(), *run.helpers.parameters()], lr=1e-2)
    micros = [feed.make(0, 2) for feed in feeds]
    terms = []
    for _ in range(8):
        losses = [term for micro in micros for term in objective(micro).terms.values()]
        total = torch.stack(losses).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        terms.append(total.item())
    assert terms[-1] < 0.75 * terms[0]
    silent = [name for name, p in trained.items() if p.grad is None]
    # Of SAM's decoder the heads for other masks and for quality are not used.
    unused = ("mask_decoder.output_hypernetworks_mlps.", "mask_decoder.iou_prediction_head.", "mask_decoder.iou_")
    assert all(name.startswith(unused) for name in silent)


def test_recomputing_changes_no_gradient(tmp_path: Path) -> None:
    recipe = tiny("glamm-regions", dropout=False)
    run, [stage] = begun(recipe, tmp_path), recipe.stages
    [feed] = run.feeds(stage, stage.sources, 0, writer=True)
    trained = choose_trained(run.model, stage.train)
    run.model.eval()
    gradients = []
    for recompute in (False, True):
        run.model.zero_grad()
        outcome = run.objective(replace(stage, recompute=recompute))(feed.make(0, 2))
        torch.stack(list(outcome.terms.values())).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)
    assert "forward" not in vars(run.model.llama.layers[0])


def test_cached_features_give_the_losses_of_pictures(tmp_path: Path) -> None:
    recipe = tiny("tabletop-glamm")
    masks = replace(recipe.stages[2], sources=recipe.stages[2].sources[:1], mixing="walk", types={})
    recipe = replace(recipe, stages=(masks,))
    run = begun(recipe, tmp_path)
    run.model.eval()
    losses = []
    for stage in (replace(masks, cache=("clip", "sam")), replace(masks, cache=())):
        [feed] = run.feeds(stage, stage.sources, 0, writer=True)
        with torch.no_grad():
            losses.append(run.objective(stage)(feed.make(0, 3)).terms)
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=2e-3, atol=2e-3)  # kept as float16


def test_types_and_sources_are_drawn_by_their_rates(tmp_path: Path) -> None:
    recipe = tiny("glamm-full")
    run, [stage] = begun(recipe, tmp_path), recipe.stages
    feeds = run.feeds(stage, stage.sources, 0, writer=True)
    assert [(feed.name, feed.weight) for feed in feeds] == [("caption", 0.15), ("region", 0.40), ("mask", 0.45)]
    mask = feeds[2]
    assert isinstance(mask, ItemFeed)
    drawn = [source.spec.name for source, _ in mask.choose(0, 1400)]
    share = {name: drawn.count(name) / len(drawn) for name in set(drawn)}
    assert sum(share[n] for n in ("ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary")) == pytest.approx(
        4 / 14, abs=0.04
    )
    assert share["grandf_gcg"] == pytest.approx(1 / 14, abs=0.03)
    # What stands at a place does not depend on how places are asked for.
    apart = [mask.choose(place, 1)[0][1].turns for place in range(5)]
    assert apart == [item.turns for _, item in mask.choose(0, 5)]
    plan = loop.Plan(replace(stage, steps=2000), 0, 1, feeds)
    steps = np.array([take[0][0] for take in plan.takes])
    assert [(steps == k).mean() for k in range(3)] == pytest.approx([0.15, 0.40, 0.45], abs=0.04)


def test_a_walk_sees_every_sample_once_an_epoch(tmp_path: Path) -> None:
    recipe = tiny("glamm-refer", mixing="walk", types={})
    run, [stage] = begun(recipe, tmp_path), recipe.stages
    [feed] = run.feeds(stage, stage.sources, 0, writer=True)
    assert isinstance(feed, ItemFeed) and len(feed) == 12
    seen = [(source.spec.name, item.sample.key) for source, item in feed.choose(0, 12)]
    assert len(set(seen)) == 12


def test_what_cannot_be_is_said_in_one_line(tmp_path: Path) -> None:
    table = {
        "preset": "glamm-tiny",
        "family": "glamm",
        "stages": [{"name": "s", "steps": 1, "rate": 1e-3, "batch": 2, "train": ["lora"], "sources": []}],
    }
    source = {"name": "a", "kind": "coco_captions", "files": ["c.json"], "images": "images"}

    def message(**changed) -> str:
        stage = table["stages"][0] | {"sources": [source | changed.pop("source", {})]} | changed
        with pytest.raises(RecipeError) as caught:
            recipe_of(table | {"stages": [stage]}, "r.toml")
        return str(caught.value)

    assert "sources (a).task: say what is asked" in message()
    assert "the task 'caption' has no masks" in message(source={"task": "caption", "losses": ["mask"]})
    assert "types: give a weight above 0 for each" in message(source={"task": "caption"}, mixing="types")
    assert "GLaMM learns 'text' and 'mask'" in message(source={"task": "caption", "losses": ["point"]})
    assert "fused_attention are PixelLLM's" in message(source={"task": "caption"}, fused_attention=True)
    # A set that has nothing of what is asked.
    good = table | {"stages": [table["stages"][0] | {"sources": [source | {"task": "ask"}]}]}
    recipe = replace(recipe_of(good, "r.toml"), model=replace(Recipe("x", ()).model, lora_rank=4))
    run = begun(recipe, tmp_path)
    [feed] = run.feeds(recipe.stages[0], recipe.stages[0].sources, 0, writer=True)
    with pytest.raises(DataError, match="100 samples in a row have nothing for the task 'ask'"):
        feed.make(0, 1)
    assert isinstance(run.model, Glamm)
