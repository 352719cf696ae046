"""The one loop that every stage goes through."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deixis_train.training.family import Begun, Feed, MicroBatch, StageObjective
from deixis_train.training.optim import choose_trained, learning_rate, make_optimizer, set_rate, training_modes
from deixis_train.training.recipe import StageSpec
from deixis_train.training.state import Progress, StageState

RELATIVE_BIAS = "text.encoder.relpos_bias"


@dataclass(frozen=True)
class Order:
    """Pictures start.. of a source, to be computed at once by one process."""

    source: int
    start: int
    count: int


class Plan:
    """Which pictures each step takes: a function of seed and step alone.

    With mixing "all" every step takes some pictures of every feed, otherwise `batch` pictures of one, drawn by weight.
    A step's pictures are dealt out among the processes, and cut into micro-batches. feeds: None takes the stage's
    sources.

    Raises:
        ValueError: a number of pictures that the processes cannot share equally.
    """

    def __init__(self, stage: StageSpec, seed: int, processes: int, feeds: Sequence[Feed] | None = None) -> None:
        self.stage, self.processes = stage, processes
        sources = stage.sources if feeds is None else feeds
        weights = np.array([source.weight for source in sources])
        if stage.mixing != "all":
            chosen = np.random.default_rng((seed, 4)).choice(len(weights), stage.steps, p=weights / weights.sum())
            self.takes = [[(int(source), stage.batch)] for source in chosen]
        else:
            self.takes = [[(i, source.pictures) for i, source in enumerate(sources)]] * stage.steps
        for count in {count for take in self.takes[:1] for _, count in take}:
            if count % processes:
                raise ValueError(f"stage {stage.name!r}: {count} pictures cannot be shared by {processes} processes")
        self.before = np.zeros((stage.steps, len(weights)), np.int64)  # pictures of each source taken before a step
        for step, take in enumerate(self.takes[:-1]):
            self.before[step + 1] = self.before[step]
            for source, count in take:
                self.before[step + 1, source] += count

    def orders(self, step: int, process: int) -> list[Order]:
        orders = []
        for source, count in self.takes[step]:
            share = count // self.processes
            first = int(self.before[step, source]) + process * share
            size = min(self.stage.micro_batch or share, share)
            orders += [Order(source, first + at, min(size, share - at)) for at in range(0, share, size)]
        return orders


def run_stage(
    begun: Begun,
    stage: StageSpec,
    feeds: Sequence[Feed],
    out: Path,
    accelerator: Accelerator,
    *,
    seed: int,
    workers: int = 1,
    evaluate: Callable[[StageObjective], Mapping[str, float]] | None = None,
) -> None:
    """Train a stage to its end, from where its state in `out` stopped.

    Every process computes its share of a step; gradients are averaged once
    per step, whatever the number of micro-batches.

    Args:
        begun: the run, whose model lies on the accelerator's device.
        feeds: of `begun`, for this stage.
        workers: threads that make micro-batches ahead of time.
        evaluate: called every `evaluate_every` steps and at the end, in the first process only.

    Raises:
        FloatingPointError: a loss is not finite. The last saved state is from before.
    """
    model, helpers = begun.model, begun.helpers
    fixed = (RELATIVE_BIAS,) if stage.fused_attention else ()
    trained = choose_trained(model, stage.train, fixed=fixed)
    training_modes(model, stage.train, dropout=stage.dropout, frozen_too=stage.dropout_in_frozen)
    optimizer = make_optimizer(
        model,
        trained,
        helpers,
        weight_decay=stage.weight_decay,
        layer_decay=stage.layer_decay,
        paces=stage.paces,
        betas=stage.betas,
    )
    state, first = StageState(out, stage.name), 0
    saved = state.load()
    if saved is not None:
        restore(saved, trained, helpers, stage.name)
        first = saved["step"]
        if saved["done"] or first >= stage.steps:
            return
        optimizer.load_state_dict(saved["optimizer"])
    device, process = accelerator.device, accelerator.process_index
    objective = begun.objective(stage)
    learning = [*trained.values(), *(p for p in helpers.parameters() if p.requires_grad)]
    progress = Progress(out, stage.name, first, stage.steps, quiet=not accelerator.is_main_process)
    plan = Plan(stage, seed, accelerator.num_processes, feeds)
    batches = _ahead(plan, feeds, range(first, stage.steps), process, workers)
    for step, micros in batches:
        set_rate(optimizer, learning_rate(step, stage.steps, stage.rate, stage.warmup_steps, stage.schedule))
        torch.manual_seed(int(np.random.default_rng((seed, 5, step, process)).integers(2**62)))  # for dropout
        done = step + 1
        report, save = done % stage.report_every == 0, _due(done, stage.save_every, stage.steps)
        # Micro-batches of one source share its weight; those of different sources add up.
        shares = Counter(micro.source for micro in micros)
        figures: dict[str, list[Tensor]] = {}
        losses = []
        for micro in micros:
            outcome = objective(micro.to(device))
            total = torch.stack(list(outcome.terms.values())).sum() / shares[micro.source]
            if total.requires_grad:
                total.backward()
            losses.append(total.detach())
            if report:
                for name, value in (outcome.terms | outcome.figures).items():
                    figures.setdefault(f"{micro.source}/{name}", []).append(value.detach())
        average_gradients(learning, accelerator)
        if stage.clip_norm:
            nn.utils.clip_grad_norm_(learning, stage.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if report or save:
            loss = torch.stack(losses).sum().item()
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"stage {stage.name!r}: the loss at step {done} is {loss}; the state saved before is kept. "
                    "Lower the stage's rate, or set clip_norm"
                )
            if report:
                values = {name: torch.stack(each).float().mean().item() for name, each in figures.items()}
                progress.report(done, {"loss": loss, **values})
        if evaluate is not None and accelerator.is_main_process and _due(done, stage.evaluate_every, stage.steps):
            progress.report(done, _evaluated(objective, evaluate), "held_out")
        if accelerator.is_main_process and save:
            state.save(done, trained, helpers, optimizer, done=done == stage.steps)
    progress.close()
    accelerator.wait_for_everyone()


def restore(saved: Mapping[str, Any], trained: Mapping[str, nn.Parameter], helpers: nn.Module, stage: str) -> None:
    """Copy what a stage's state (`StageState.load`) has learned into the parameters of the same names.

    Raises:
        ValueError: the state is of other parts, of other sizes, or of data with other kinds of things.
    """
    tensors = saved["trained"]
    if set(tensors) != set(trained):
        raise ValueError(f"stage {stage!r}: its saved state trained other parts; start in a new --out folder")
    with torch.no_grad():
        for name, value in tensors.items():
            if value.shape != trained[name].shape:
                raise ValueError(f"stage {stage!r}: {name} was saved in another size; start in a new --out folder")
            trained[name].copy_(value)
    try:
        helpers.load_state_dict(saved["helpers"])
    except RuntimeError:
        raise ValueError(
            f"stage {stage!r}: its saved state is of data with other kinds and colours of things; "
            "start in a new --out folder"
        ) from None


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """The mean of the gradients over all processes. A parameter that was not used has a gradient of 0, with which the
    optimizer moves on, as the reference's does."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    reduced = accelerator.reduce(flat, "mean")
    assert isinstance(reduced, Tensor)
    for parameter, part in zip(parameters, reduced.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _evaluated(
    objective: StageObjective, evaluate: Callable[[StageObjective], Mapping[str, float]]
) -> Mapping[str, float]:
    modes = {module: module.training for module in objective.model.modules()}
    objective.model.eval()
    with torch.no_grad():
        values = evaluate(objective)
    for module, mode in modes.items():
        module.training = mode
    return values


def _ahead(
    plan: Plan, feeds: Sequence[Feed], steps: range, process: int, workers: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Micro-batches of every step, made in threads up to `workers` + 1 steps ahead."""

    def make(step: int) -> list[MicroBatch]:
        return [feeds[order.source].make(order.start, order.count) for order in plan.orders(step, process)]

    waiting: list[tuple[int, Future[list[MicroBatch]]]] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for step in steps:
                waiting.append((step, pool.submit(make, step)))
                if len(waiting) > workers:
                    ready, future = waiting.pop(0)
                    yield ready, future.result()
            for ready, future in waiting:
                yield ready, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
