"""A campaign: every competitor in a process of its own, asked in turn, their outputs compared.

Taking turns lets a busy machine slow everybody alike; what counts is the ratio of two times of the same round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deixis_bench.rivals.contract import MOST_NEW_TOKENS, NOTES, PARTS, REFERENCE, RivalError, Spec
from deixis_bench.rivals.registry import COUNTERPARTS, OWN, RIVALS, Chosen, Entry, choose
from deixis_bench.rivals.worker import MODULE_VARIABLE

Say = Callable[[str], None]

PAUSE_S = 0.3  # between runs: thread pools spin for a while behind a run, and would take cores from the next
READY_LIMIT_S = 1800.0  # conversions of weights and compilers are slow
RUN_LIMIT_S = 300.0
OUTPUT_TOLERANCE = 1e-4  # of an encoder in fp32, relative to the largest magnitude


class Worker:
    """A competitor's process. Use as a context manager; it ends with the block.

    Raises RivalError with one line when it cannot be loaded or run.
    """

    def __init__(self, chosen: Chosen, spec: Spec) -> None:
        spec.work.mkdir(parents=True, exist_ok=True)
        self.chosen = chosen
        self._log_path = spec.work / "worker.log"
        self._log = self._log_path.open("w", encoding="utf-8")
        path = spec.work / "spec.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(spec.threads))
        offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deixis_bench.rivals.worker", chosen.name, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **threads, **offline, MODULE_VARIABLE: chosen.module},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        finally:
            self._log.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it is loaded: version, load_s and note."""
        return self._answer(READY_LIMIT_S)

    def run(self, number: int) -> dict[str, Any]:
        """One run: seconds, cpu_seconds, and tokens or outputs."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"run": number}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RivalError(f"its process ended; see {self._log_path}") from None
        return self._answer(RUN_LIMIT_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(limit_s, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise RivalError(f"its process ended without an answer within {limit_s:.0f} s; see {self._log_path}")
        values = json.loads(line)
        if "error" in values:
            raise RivalError(values["error"])
        return values


def run_rivals(
    names: Sequence[str],
    part: str,
    rounds: int,
    threads: int,
    new_tokens: int,
    work: Path,
    *,
    size: str = "full",
    rivals: Mapping[str, Entry] = RIVALS,
    say: Say = lambda line: None,
    pause_s: float = PAUSE_S,
) -> list[dict[str, Any]]:
    """Measure competitors on a part with the same weights and inputs.

    Args:
        names: as in `registry.choose`; ours is added where something is compared with it.
        part: "text", "llama" or "encoder" (`contract`).
        rounds: measured runs of each, after one that is not measured.
        threads: of every run.
        new_tokens: ids that are timed in text parts.
        work: folder for weights and what rivals make of them; it is kept, and makes the next campaign start sooner.
        size: "full", or "tiny" for tests.
        rivals: who can be named.
        say: gets a line of progress now and then.

    Returns:
        One entry a competitor: name, part (with the precision), version, ms_per_token or ms (p50, p90, mean, least,
        count), cpu_ms (median of processor time, per token where there are any), against and ratio_to_deixis (its time
        over ours, per round: median, least, most; None where ours was not measured), same_output (None for a lower
        precision that gives other ids), note. One that cannot be measured has `error`, one line, and None elsewhere.

    Raises:
        ValueError: unknown names or numbers that make no sense. RivalError: the weights cannot be made.
    """
    if part not in PARTS:
        raise ValueError(f"no part {part!r}; choose of {', '.join(PARTS)}")
    if rounds < 1 or threads < 1 or not 1 <= new_tokens <= MOST_NEW_TOKENS:
        raise ValueError(f"rounds and threads are whole numbers from 1 on, new tokens from 1 to {MOST_NEW_TOKENS}")
    chosen = choose(names, part, rivals)
    root = Path(work).resolve() / f"{part}-{size}"
    weights = ensure_weights(part, size, root, say)
    workers: list[Worker] = []
    entries: dict[Chosen, dict[str, Any]] = {}
    runs: dict[Chosen, list[dict[str, Any]]] = {}
    try:
        for each in chosen:
            label = f"{each.name}-{each.precision}"
            spec = Spec(each.name, part, each.precision, weights, root / label, threads, new_tokens)
            worker = Worker(each, spec).__enter__()
            try:
                loaded = worker.ready()
                worker.run(0)
            except RivalError as error:
                worker.__exit__(None, None, None)
                entries[each] = _failed(each, part, error)
                say(f"{label}: {error}")
                continue
            workers.append(worker)
            entries[each] = {"version": loaded["version"], "note": loaded["note"]}
            runs[each] = []
            say(f"{label}: loaded in {loaded['load_s']:.1f} s")
        for number in range(1, rounds + 1):
            # Who goes first changes, so that nobody always runs behind the same neighbour's heat.
            first = number % len(workers) if workers else 0
            for worker in [*workers[first:], *workers[:first]]:
                if worker.chosen not in runs:
                    continue
                time.sleep(pause_s)
                try:
                    runs[worker.chosen].append(worker.run(number))
                except RivalError as error:
                    entries[worker.chosen] = _failed(worker.chosen, part, error)
                    del runs[worker.chosen]
                    say(f"{worker.chosen.name}-{worker.chosen.precision}: {error}")
            say(f"round {number} of {rounds}")
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    for each, own in runs.items():
        entries[each] = _entry(each, part, own, runs, new_tokens, weights, entries[each])
    return [entries[each] for each in chosen]


def ensure_weights(part: str, size: str, root: Path, say: Say = lambda line: None) -> Path:
    """The folder of shared weights below `root`, made in a process of its own when it is not there."""
    folder = root / "weights"
    if not (folder / NOTES).is_file():
        say(f"making the weights of part {part}")
        root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "deixis_bench.rivals.weights", part, size, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RivalError(f"cannot make the weights of part {part!r}: {lines[-1]}")
    return folder


def _failed(each: Chosen, part: str, error: RivalError) -> dict[str, Any]:
    keys = ("version", "cpu_ms", "against", "ratio_to_deixis", "same_output", "note")
    return {"name": each.name, "part": f"{part} {each.precision}", "error": str(error)} | dict.fromkeys(keys)


def _entry(
    each: Chosen,
    part: str,
    own: list[dict[str, Any]],
    runs: Mapping[Chosen, list[dict[str, Any]]],
    new_tokens: int,
    weights: Path,
    loaded: Mapping[str, Any],
) -> dict[str, Any]:
    per_token = part != "encoder"
    scale = 1e3 / new_tokens if per_token else 1e3
    same, difference = _compare(own, weights, new_tokens, each.precision)
    against = next(
        (c for p in COUNTERPARTS.get(each.precision, ()) for c in runs if (c.name, c.precision) == (OWN, p)), None
    )
    ratios = None
    if against is not None:
        each_round = [mine["seconds"] / ours["seconds"] for mine, ours in zip(own, runs[against], strict=True)]
        ratios = {
            "median": float(np.median(each_round)),
            "least": float(min(each_round)),
            "most": float(max(each_round)),
        }
    return {
        "name": each.name,
        "part": f"{part} {each.precision}",
        "version": loaded["version"],
        "ms_per_token" if per_token else "ms": _spread([run["seconds"] * scale for run in own]),
        "cpu_ms": float(np.median([run["cpu_seconds"] for run in own])) * scale,
        "against": None if against is None else f"{OWN} {against.precision}",
        "ratio_to_deixis": ratios,
        "same_output": same,
        "note": "; ".join(text for text in (loaded["note"], difference) if text),
    }


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    return {
        "p50": float(np.percentile(values, 50)),
        "p90": float(np.percentile(values, 90)),
        "mean": float(np.mean(values)),
        "least": float(min(values)),
        "count": len(values),
    }


def _compare(own: list[dict[str, Any]], weights: Path, new_tokens: int, precision: str) -> tuple[bool | None, str]:
    """Whether every run gave what PyTorch gives in fp32, and what to say where it did not.

    A lower precision may give something else: that is None, not False.
    """
    exact = precision == "fp32"
    if "tokens" in own[0]:
        wanted = json.loads((weights / NOTES).read_text(encoding="utf-8"))["ids"][: new_tokens + 1]
        if all(run["tokens"] == wanted for run in own):
            return True, ""
        common = min(_common(run["tokens"], wanted) for run in own)
        return (False if exact else None), f"the first {common} of {len(wanted)} ids are those of fp32"
    with np.load(weights / REFERENCE) as arrays:
        wanted = arrays["sam"]
    error = max(_error(Path(run["outputs"]), wanted) for run in own)
    if error <= OUTPUT_TOLERANCE:
        return True, f"error {error:.1e}"
    return (False if exact else None), f"differs from fp32 by {error:.1e} of the largest value"


def _common(found: Sequence[int], wanted: Sequence[int]) -> int:
    pairs = zip(found, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))


def _error(path: Path, wanted: np.ndarray) -> float:
    with np.load(path) as arrays:
        found = arrays["sam"]
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
