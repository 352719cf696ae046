"""`python -m deixis_train.training.ablation`: how a location is said (the paper's Table 4), measured.

The variants are recipes that differ in nothing else. They are trained one after the other, from the same start, for the
same number of steps with equally many pictures each, and asked for the boxes of the same held-out expressions. Run the
same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deixis.bundle import sha256_of
from deixis.errors import DeixisError
from deixis_train.checkpoint import CONFIG, TOKENIZER, WEIGHTS
from deixis_train.files import write_text
from deixis_train.training.recipe import Recipe, RecipeError, load_recipe, recipe_of
from deixis_train.training.referring import measure
from deixis_train.training.run import Run, train
from deixis_train.training.state import StageState

VARIANTS = {
    "ablation-raw-string": ("digits as text", "with narrations"),
    "ablation-extra-tokens": ("extra tokens", "with narrations"),
    "ablation-regression": ("regression", "with narrations"),
    "ablation-extra-tokens-no-narrations": ("extra tokens", "without"),
    "ablation-regression-no-narrations": ("regression", "without"),
}
TABLE, VALUES, SETTINGS, RESULT = "ablation.md", "ablation.json", "settings.json", "referring.json"


@dataclass(frozen=True)
class Ablation:
    """What is compared. start: a checkpoint, or the folder of a run whose stages before its text stage are done.

    overrides: KEY=VALUE for every variant's recipe.
    """

    data: Path
    out: Path
    start: Path
    steps: int
    variants: tuple[str, ...] = tuple(VARIANTS)
    features: Path | None = None
    overrides: tuple[str, ...] = ()
    workers: int = 1


def compare(ablation: Ablation, accelerator: Accelerator) -> dict[str, Any]:
    """Train and measure what is not done yet; write the table after every variant. Returns its values.

    Raises:
        RecipeError, CheckpointError, DataError, LocalisationError: one line.
    """
    if ablation.steps < 1:
        raise RecipeError(f"--steps {ablation.steps}: must be at least 1")
    ablation.out.mkdir(parents=True, exist_ok=True)
    features = ablation.features or ablation.out / "features"
    checkpoint = _starting_checkpoint(ablation, features, accelerator)
    settings = {
        "steps": ablation.steps,
        "start": sha256_of(checkpoint / WEIGHTS),
        "overrides": list(ablation.overrides),
    }
    _agree(ablation.out / SETTINGS, settings)
    values: dict[str, Any] = {"settings": settings, "variants": {}}
    for name in ablation.variants:
        recipe = load_recipe(name, [f"stages.text.steps={ablation.steps}", *ablation.overrides])
        recipe = replace(recipe, init=replace(recipe.init, checkpoint=str(checkpoint)))
        folder = ablation.out / name
        if not (folder / RESULT).is_file():
            trained = train(Run(recipe, ablation.data, folder, features, workers=ablation.workers), accelerator)
            assert trained is not None  # no stage is singled out
            found = measure(trained, recipe, ablation.data, features, accelerator.device)
            write_text(folder / RESULT, json.dumps(found, indent=1) + "\n")
        values["variants"][name] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        write_text(ablation.out / VALUES, json.dumps(values, indent=1) + "\n")
        write_text(ablation.out / TABLE, table(values))
        print(f"{name}: P@0.5 {values['variants'][name]['P@0.5']:.3f}", flush=True)
    return values


def table(values: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [
        f"{values['settings']['steps']} steps each, from the same start.",
        "",
        "| location as | dense narrations | P@0.5 | mean IoU | no box | expressions |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in values["variants"].items():
        said, narrations = VARIANTS.get(name, (name, ""))
        lines.append(
            f"| {said} | {narrations} | {100 * found['P@0.5']:.1f} % | {found['mean IoU']:.3f} | {found['no box']} | "
            f"{found['expressions']} |"
        )
    return "\n".join(lines) + "\n"


def _starting_checkpoint(ablation: Ablation, features: Path, accelerator: Accelerator) -> Path:
    """The checkpoint to start from; a run that was not finished gives one of what it learned before its text stage."""
    start = ablation.start
    if (start / CONFIG).is_file():
        return start
    if not (start / "recipe.json").is_file():
        raise RecipeError(f"--start {start}: neither a checkpoint ({CONFIG}) nor the folder of a run (recipe.json)")
    folder = ablation.out / "start"
    if (folder / "checkpoint" / CONFIG).is_file():
        return folder / "checkpoint"
    recipe = _before_text(start)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER, *(StageState(start, stage.name).path.name for stage in recipe.stages)):
        shutil.copyfile(start / name, folder / name)
    made = train(Run(recipe, ablation.data, folder, features), accelerator)
    assert made is not None  # every stage is done
    return made


def _before_text(run: Path) -> Recipe:
    """The recipe of a run with the stages before those of objective "text", all of which must be done."""
    path = run / "recipe.json"
    try:
        recipe = recipe_of(_without_nulls(json.loads(path.read_text(encoding="utf-8"))), str(path))
    except ValueError as error:
        raise RecipeError(f"{path}: not the recipe of a run: {error}") from None
    stages = tuple(stage for stage in recipe.stages if stage.objective != "text")
    if not stages:
        raise RecipeError(f"--start {run}: the run has no stages before its text stage; give a checkpoint instead")
    for stage in stages:
        state = StageState(run, stage.name).load()
        if state is None or not state["done"]:
            raise RecipeError(f"--start {run}: its stage {stage.name!r} is not done; finish it first")
    if not (run / TOKENIZER).is_file():
        raise RecipeError(f"--start {run}: no {TOKENIZER} in it")
    return replace(recipe, stages=stages)


def _without_nulls(value: Any) -> Any:
    """JSON writes keys that were not set as null; a recipe leaves them out."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise RecipeError when the folder holds an ablation of other settings; else note them."""
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        if former != settings:
            different = ", ".join(key for key in settings if former.get(key) != settings[key])
            raise RecipeError(f"{path.parent} holds a comparison with another {different}; choose another --out")
        return
    write_text(path, json.dumps(settings, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deixis_train.training.ablation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data folder of the recipes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and the table")
    parser.add_argument(
        "--start",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint, or run with its first stages done (fairer: no way to say locations has been learned yet)",
    )
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="steps of every variant")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--features", type=Path, metavar="DIR", help="folder of cached features (default: in --out)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--workers", type=int, metavar="N", default=1, help="threads that make batches ahead of time")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu leaves GPUs alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change every recipe")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    ablation = Ablation(
        options.data,
        options.out,
        options.start,
        options.steps,
        tuple(options.variants),
        options.features,
        tuple(options.set),
        options.workers,
    )
    try:
        compare(ablation, Accelerator(cpu=options.device == "cpu"))
    except (DeixisError, RecipeError, ValueError, FloatingPointError, OSError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ablation: stopped; the same command goes on from the last saved step", file=sys.stderr)
        return 130
    print(f"table in {options.out / TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
