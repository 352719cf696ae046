"""The run: every picture once, every task on it, every predictor asked the same."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deixis_bench.eval.data import Picture, pixels_of
from deixis_bench.eval.items import ItemFile
from deixis_train.data.preparation.alignment import Alignment
from deixis_train.evaluation.dense_task import DenseCaptions
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.gcg import Similarity
from deixis_train.evaluation.grounded_task import GroundedCaptions, Questions
from deixis_train.evaluation.predictor import Predictor
from deixis_train.evaluation.tasks import Boxes, Captions, Item, Metrics, Refer, Regions, Task, Trace

FREE = "free-order "  # before the names of metrics of texts that follow no order


# What a model must be able to do for a task, by the runtime's name of it.
NEEDS = {
    "refer": "refer",
    "caption": "caption",
    "trace": "trace",
    "free-trace": "trace",
    "regions": "region_caption",
    "boxes": "segment",
    DenseCaptions.name: "dense_captions",
    GroundedCaptions.name: "grounded_caption",
    Questions.name: "ask",
}


def make_tasks(
    sources: Collection[str], names: Sequence[str], alignment: Alignment, similarity: tuple[str, Similarity]
) -> list[Task]:
    """The tasks of these names; "refer" and "masks" are one, so that nothing is asked twice. similarity: of phrases of
    grounded captions, and its name."""
    tasks: list[Task] = []
    if "refer" in sources:
        tasks.append(Refer("refer" in names, "masks" in names))
    if "caption" in names:
        tasks.append(Captions())
    if "trace" in names:
        tasks.append(Trace("trace", "", alignment))
    if "free-trace" in names:
        tasks.append(Trace("free-trace", FREE, alignment))
    if "regions" in names:
        tasks.append(Regions())
    if DenseCaptions.name in names:
        tasks.append(DenseCaptions())
    if GroundedCaptions.name in names:
        tasks.append(GroundedCaptions(similarity[1], similarity[0]))
    if Questions.name in names:
        tasks.append(Questions())
    if "boxes" in names:
        tasks.append(Boxes())
    return tasks


def answerable(tasks: Sequence[Task], predictors: Sequence[Predictor], insisted: Collection[str]) -> list[Task]:
    """The tasks that all predictors can answer: without a detector there are no dense captions, and so on.

    What is left out is said on the standard error. `insisted`: tasks that were asked for by name; where one of them
    cannot be answered, EvaluationError is raised instead, and also when nothing is left.
    """
    left = []
    for task in tasks:
        unable = next((p for p in predictors if NEEDS[task.name] not in p.abilities), None)
        if unable is None:
            left.append(task)
            continue
        reason = f"the {'checkpoint' if unable.name == 'torch' else 'bundle'} {_LACK.get(task.name, 'cannot do it')}"
        if task.name in insisted or (task.name == "refer" and "masks" in insisted):
            raise EvaluationError(f"{task.name}: {reason}; {_ADVICE.get(task.name, 'measure a model that can')}")
        print(f"deixis eval: {reason}; {task.name} is left out", file=sys.stderr)
    if not left:
        raise EvaluationError("the model can do none of the tasks that the data is for")
    return left


_LACK = {DenseCaptions.name: "has no detector"}
_ADVICE = {DenseCaptions.name: "a model with a box decoder is needed, or --detections"}


def measure(
    pictures: Sequence[Picture],
    tasks: Sequence[Task],
    predictors: Sequence[Predictor],
    items_file: Path | None,
    expressions: int | None,
) -> tuple[dict[str, Metrics], dict[str, int]]:
    """Ask all predictors everything.

    Args:
        items_file: every answer goes there as a JSON line; None for nowhere.
        expressions: most referring expressions of a picture; None for all.

    Returns:
        Metrics by predictor, and counts: answers by task, and texts that a model refused or that were cut.

    Raises EvaluationError when a task found nothing to ask, besides what readers, predictors and metrics raise.
    """
    answers: dict[str, dict[str, list[Item]]] = {p.name: {task.name: [] for task in tasks} for p in predictors}
    with ItemFile(items_file) as file:
        for picture in tqdm(pictures, desc="deixis eval", unit="picture", file=sys.stderr, disable=None):
            pixels = pixels_of(picture)
            for task in tasks:
                asked = picture.asked(task.name, pixels, expressions)
                for predictor in predictors:
                    found = task.ask(asked, predictor)
                    answers[predictor.name][task.name] += found
                    file.add(found)
        metrics = {name: _metrics(tasks, by_task) for name, by_task in answers.items()}
        file.finish(item for by_task in answers.values() for items in by_task.values() for item in items)
    return metrics, _counts(answers[predictors[0].name])


def _metrics(tasks: Sequence[Task], answers: dict[str, list[Item]]) -> Metrics:
    values: Metrics = {}
    for task in tasks:
        if not answers[task.name]:
            raise EvaluationError(f"{task.name}: nothing in the data to measure it by (for masks: no masks)")
        values |= task.metrics(answers[task.name])
    return values


def _counts(answers: dict[str, list[Item]]) -> dict[str, int]:
    counts: dict[str, Any] = {name: len(items) for name, items in answers.items()}
    every = [item for items in answers.values() for item in items]
    for name, key in (("refused texts", "error"), ("cut texts", "cut")):
        if number := sum(key in item for item in every):
            counts[name] = number
    return counts
