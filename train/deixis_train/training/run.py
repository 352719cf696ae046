"""A whole run: the stages of a recipe one after the other, and the checkpoint at the end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from deixis_train.files import write_text
from deixis_train.glamm.family import GlammRun
from deixis_train.training.corpus import Corpus
from deixis_train.training.family import Begun, Feed, StageObjective
from deixis_train.training.loop import restore, run_stage
from deixis_train.training.pixelllm_family import PixelLLMRun
from deixis_train.training.recipe import Family, Recipe, RecipeError, StageSpec
from deixis_train.training.state import StageState

FAMILIES: Mapping[Family, Callable[[Recipe, Corpus, Path], Begun]] = {"pixelllm": PixelLLMRun, "glamm": GlammRun}


@dataclass(frozen=True)
class Run:
    """Where a recipe is trained. features: folder of cached features; None keeps them in `out`."""

    recipe: Recipe
    data: Path
    out: Path
    features: Path | None = None
    stage: str | None = None  # only this one
    steps_scale: float = 1.0
    workers: int = 1  # threads that make batches


def scaled(stage: StageSpec, factor: float) -> StageSpec:
    """The stage with its steps and warm-up made longer or shorter."""
    steps = max(1, round(stage.steps * factor))
    return replace(stage, steps=steps, warmup_steps=math.ceil(stage.warmup_steps * factor))


def train(run: Run, accelerator: Accelerator) -> Path | None:
    """Train what is not trained yet. Returns the checkpoint, or None when a stage other than the last was asked for.

    Raises:
        RecipeError, CheckpointError, DataError: one line.
    """
    recipe, out, main = run.recipe, run.out, accelerator.is_main_process
    names_of_stages = [stage.name for stage in recipe.stages]
    if run.stage is not None and run.stage not in names_of_stages:
        raise RecipeError(f"no stage {run.stage!r}; the recipe has {', '.join(names_of_stages)}")
    out.mkdir(parents=True, exist_ok=True)
    if main:
        text = json.dumps(dataclasses.asdict(recipe), indent=1, ensure_ascii=False)
        write_text(out / "recipe.json", text + "\n")

    def say(line: str) -> None:
        if main:
            print(line, flush=True)

    corpus = Corpus(run.data, run.features or out / "features", say)
    with accelerator.main_process_first():
        begun = FAMILIES[recipe.family](recipe, corpus, out)
    begun.model.to(accelerator.device)
    begun.helpers.to(accelerator.device)
    for number, spec in enumerate(recipe.stages):
        stage = scaled(spec, run.steps_scale)
        done = _restore_done(begun, stage, out)
        wanted = run.stage in (None, stage.name)
        if not done and wanted:
            seed = recipe.seed * 1000 + number
            with accelerator.main_process_first():
                feeds = begun.feeds(stage, stage.sources, seed, writer=main)
                held = begun.feeds(stage, stage.held_out, seed + 500, writer=main) if stage.held_out else []
            say(f"stage {stage.name}: {stage.steps} steps, learning {', '.join(stage.train)}")
            begun.prepare(stage, feeds)
            run_stage(
                begun,
                stage,
                feeds,
                out,
                accelerator,
                seed=seed,
                workers=run.workers,
                evaluate=_evaluation(stage, held, accelerator.device) if held else None,
            )
        elif not done:
            if names_of_stages.index(str(run.stage)) > number:
                raise RecipeError(f"stage {stage.name!r} comes before {run.stage!r} and is not done; leave out --stage")
            say(f"stage {run.stage} is done; the checkpoint is written when {stage.name} and what follows are done too")
            return None
        begun.finished(stage)
    if main:
        begun.write_checkpoint(out / "checkpoint")
    return out / "checkpoint"


def _restore_done(begun: Begun, stage: StageSpec, out: Path) -> bool:
    """Whether a stage is finished; if so, what it learned is put into the model."""
    state = StageState(out, stage.name).load()
    if state is None or not state["done"]:
        return False
    own = dict(begun.model.named_parameters())
    restore(state, {name: own[name] for name in state["trained"] if name in own}, begun.helpers, stage.name)
    return True


def _evaluation(stage: StageSpec, held: Sequence[Feed], device: torch.device):
    def evaluate(objective: StageObjective) -> Mapping[str, float]:
        sums: dict[str, list[float]] = {}
        for feed in held:
            share = feed.pictures or stage.micro_batch or stage.batch
            for number in range(stage.held_out_batches):
                if number * share >= len(feed):
                    break
                count = min(share, len(feed) - number * share)
                outcome = objective(feed.make(number * share, count).to(device))
                for name, value in (outcome.terms | outcome.figures).items():
                    sums.setdefault(f"{feed.name}/{name}", []).append(value.item())
        return {name: sum(values) / len(values) for name, values in sums.items()}

    return evaluate
