"""One benchmark from its settings to its report, for a bundle or for two in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deixis
from deixis.bundle import Bundle
from deixis_bench.bench import cold, energy, graph_cost, machine, roofline
from deixis_bench.bench.ort_probe import ProbeError
from deixis_bench.bench.report import (
    FORMAT,
    VERSION,
    describe_bundle,
    describe_settings,
    flat_metrics,
    make_energy,
    make_requests,
    make_stages,
)
from deixis_bench.bench.rounds import PROMPT, STEP, Subject, run_rounds
from deixis_bench.bench.settings import Settings

Say = Callable[[str], None]


def measure(bundles: Sequence[str | Path], settings: Settings, say: Say = lambda _: None) -> list[dict[str, Any]]:
    """Reports of bundles, whose warm rounds are interleaved. `say` is told what is going on.

    Raises DeixisError: a bundle that cannot be opened or run, settings that do not fit it.
    """
    about = machine.describe()
    subjects = [Subject(bundle, settings) for bundle in bundles]
    starts: list[list[dict[str, Any]]] = []
    for subject in subjects:
        say(f"{subject.opened.path.name}: cold")
        starts.append([cold.start(subject.opened.path, settings) for _ in range(settings.cold)])
        if settings.cold:
            subject.measure_cold()
    try:
        for subject in subjects:
            subject.open()
        device, threads = subjects[0].engine
        say(f"roofline: {threads} threads")
        limits = roofline.measure(device, threads)
        meter = energy.find_meter(device)
        try:
            run_rounds(subjects, settings, None if meter is None else meter.joules, say)
        finally:
            if meter is not None:
                meter.close()
        say(f"roofline: {threads} threads")
        limits = roofline.better(limits, roofline.measure(device, threads))
        inputs = [_inputs(subject) for subject in subjects]
    finally:
        for subject in subjects:
            subject.close()
    reports = []
    for subject, given, start in zip(subjects, inputs, starts, strict=True):
        say(f"{subject.opened.path.name}: counting bytes and operations")
        costs, notes = _costs(subject, given)
        reports.append(_report(subject, start, limits, costs, notes, about, meter.source if meter else ""))
    return reports


def _inputs(subject: Subject) -> dict[str, Any]:
    """Inputs of every graph, those of the request that its stage is taken from; of `prompt` too."""
    model = subject.model
    assert model is not None
    found: dict[str, Any] = {}
    for request in subject.requests:
        seen = graph_cost.watch(model, lambda: subject.run(request))  # noqa: B023 - called at once
        found = seen | found
    return found


def _costs(subject: Subject, inputs: dict[str, Any]) -> tuple[dict[str, graph_cost.GraphCost], list[str]]:
    """What every graph costs, and why some are not known."""
    found: dict[str, graph_cost.GraphCost] = {}
    notes: list[str] = []
    for stage, given in inputs.items():
        try:
            found[stage] = graph_cost.cost_of(subject.opened, STEP if stage == PROMPT else stage, given)
        except (ProbeError, deixis.DeviceError) as error:
            notes.append(f"{stage}: not counted: {error}")
    return found, notes


def _report(
    subject: Subject,
    starts: Sequence[dict[str, Any]],
    limits: dict[str, Any],
    costs: dict[str, graph_cost.GraphCost],
    notes: list[str],
    about: dict[str, Any],
    meter: str,
) -> dict[str, Any]:
    stored, more = stored_bytes(subject.opened)
    device, threads = subject.engine
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "bundle": describe_bundle(subject.opened, stored),
        "data": f"coloured blocks, {subject.settings.batch} pictures of 640x480 px",
        "machine": about | {"load_at_end": machine.describe()["load"]},
        "settings": describe_settings(subject.settings, device, threads),
        "roofline": limits,
        "stages": make_stages(subject.cold, subject.warm, costs, stored, limits),
        "requests": make_requests(subject),
        "memory": _memory(starts, stored),
        "cold_start": _cold_start(starts),
        "energy": make_energy(subject, meter),
        "rivals": [],
        "notes": [*notes, *more],
    }
    return report | {"metrics": flat_metrics(report)}


def stored_bytes(bundle: Bundle) -> tuple[dict[str, int], list[str]]:
    """Weight bytes of every graph; without the package that reads them, none and a note."""
    try:
        return graph_cost.weight_bytes(bundle), []
    except ProbeError as error:
        return {}, [f"weight bytes: {error}"]


def _memory(starts: Sequence[dict[str, Any]], stored: dict[str, int]) -> dict[str, Any] | None:
    """Of the first fresh process, in MB (2^20 bytes). weight_mb: stored weights of all graphs that were loaded at the
    end; first_weight_mb: of those loaded at the first result.
    """
    if not starts:
        return None
    start = starts[0]
    weights = {
        name: sum(stored.get(role, 0) for role in start[roles]) / (1 << 20)
        for name, roles in (("weight_mb", "loaded"), ("first_weight_mb", "loaded_first"))
    }
    return {**start["memory"], **weights}


def _cold_start(starts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Medians of the fresh processes, in milliseconds."""
    if not starts:
        return None
    names = ("first_result_ms", "import_ms", "load_ms")
    middle = {name: sorted(start[name] for start in starts)[len(starts) // 2] for name in names}
    return middle | {"count": len(starts)}
