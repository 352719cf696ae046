"""A whole run: the stages of a recipe one after the other, and the checkpoint at the end."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from deixis_train.checkpoint import SAM_PARTS, save_checkpoint
from deixis_train.files import write_text
from deixis_train.localisation.vocabulary import add_location_tokens, localiser_of
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.auxiliary import Helpers
from deixis_train.training.cells import Names
from deixis_train.training.corpus import Corpus, feeds_of
from deixis_train.training.drop_path import add_drop_path
from deixis_train.training.initial import start
from deixis_train.training.loop import restore, run_stage
from deixis_train.training.micro import Feed
from deixis_train.training.objectives import Objective
from deixis_train.training.recipe import Recipe, RecipeError, StageSpec
from deixis_train.training.state import StageState
from deixis_train.training.vocabulary import CachedTokenizer

MEASURED = 256  # pictures whose features give mean and spread
AT_ONCE = 16


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
        begin = start(recipe, run.data, out, corpus.texts(recipe))
    names = corpus.names(recipe)
    model = begin.model
    add_location_tokens(recipe.localisation, model, recipe.seed)
    localiser = localiser_of(recipe.localisation, model, begin.tokenizer_json)
    add_drop_path(model)
    helpers = Helpers(model, names)
    model.to(accelerator.device)
    helpers.to(accelerator.device)
    tokenizer = CachedTokenizer(Tokenizer.from_str(begin.tokenizer_json))
    measured = False
    for number, spec in enumerate(recipe.stages):
        stage = scaled(spec, run.steps_scale)
        done = _restore_done(model, helpers, stage, out)
        wanted = run.stage in (None, stage.name)
        if not done and wanted:
            seed = recipe.seed * 1000 + number
            with accelerator.main_process_first():
                make = partial(feeds_of, corpus, model, stage, writer=main, localiser=localiser)
                feeds = make(stage.sources, tokenizer, names, seed)
                held = make(stage.held_out, tokenizer, names, seed + 500)
            say(f"stage {stage.name}: {stage.steps} steps, learning {', '.join(stage.train)}")
            if stage.auxiliary.standardize and not measured:
                _measure(model, helpers, stage, feeds[0], unfold=begin.from_checkpoint)
            run_stage(
                model,
                helpers,
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
        measured = measured or stage.auxiliary.standardize
    if main:
        return _write_checkpoint(begin.sam_file, model, helpers, names, run, measured, begin.tokenizer_json)
    return out / "checkpoint"


def _restore_done(model: PixelLLM, helpers: Helpers, stage: StageSpec, out: Path) -> bool:
    """Whether a stage is finished; if so, what it learned is put into the model."""
    state = StageState(out, stage.name).load()
    if state is None or not state["done"]:
        return False
    own = dict(model.named_parameters())
    restore(state, {name: own[name] for name in state["trained"] if name in own}, helpers, stage.name)
    return True


@torch.no_grad()
def _measure(model: PixelLLM, helpers: Helpers, stage: StageSpec, feed: Feed, *, unfold: bool) -> None:
    """Spread of the features of the first pictures; an extractor that has learned before is fitted to it."""
    plain = replace(stage, auxiliary=replace(stage.auxiliary, standardize=False))
    objective, device = Objective(model, helpers, plain), next(model.parameters()).device
    model.eval()
    count = min(MEASURED, len(feed.samples))
    parts = []
    for first in range(0, count, AT_ONCE):
        micro = feed.make(first, min(AT_ONCE, count - first))
        parts.append(objective.features(micro.to(device))[0])
    helpers.measure(torch.cat(parts))
    if unfold:
        helpers.unfold_scale(model.prompt_adapter.image_projection)


def _evaluation(stage: StageSpec, held: Sequence[Feed], device: torch.device):
    def evaluate(objective: Objective) -> Mapping[str, float]:
        sums: dict[str, list[float]] = {}
        for feed in held:
            share = feed.source.pictures or stage.micro_batch or stage.batch
            for number in range(stage.held_out_batches):
                if number * share >= len(feed.samples):
                    break
                count = min(share, len(feed.samples) - number * share)
                outcome = objective(feed.make(number * share, count).to(device))
                for name, value in (outcome.terms | outcome.figures).items():
                    sums.setdefault(f"{feed.source.name}/{name}", []).append(value.item())
        return {name: sum(values) / len(values) for name, values in sums.items()}

    return evaluate


def _write_checkpoint(
    sam_file: Path | None,
    model: PixelLLM,
    helpers: Helpers,
    names: Names,
    run: Run,
    measured: bool,
    tokenizer_json: str,
) -> Path:
    if measured:
        helpers.fold_scale(model.prompt_adapter.image_projection)
    learned = {part for stage in run.recipe.stages for part in stage.train}
    parts = [part for part in SAM_PARTS if getattr(model, part, None) is not None]
    omit = parts if sam_file is not None and not learned & set(parts) else []
    folder = run.out / "checkpoint"
    save_checkpoint(
        folder,
        model,
        tokenizer_json,
        run.recipe.tasks,
        dtype=run.recipe.dtype,
        omit=omit,
        frozen_from=sam_file if omit else None,
    )
    return folder
