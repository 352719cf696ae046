"""The JSON of `deixis eval`: the four parts of every measurement, and beside them the PyTorch model's numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from deixis_bench.report import machine

Metrics = Mapping[str, float]


def make_report(
    metrics: Mapping[str, Metrics],
    data: Mapping[str, Any],
    bundle: Mapping[str, Any] | None,
    checkpoint: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A report of metrics by predictor ("bundle", "torch" or "files").

    `metrics` are the bundle's where there is one; the PyTorch model's stand under `torch`.
    """
    report: dict[str, Any] = {
        "metrics": dict(next(metrics[name] for name in ("bundle", "torch", "files") if name in metrics)),
        "data": dict(data),
        "bundle": None if bundle is None else dict(bundle),
        "machine": machine(),
    }
    if checkpoint is not None and "torch" in metrics:
        report |= {"torch": dict(metrics["torch"]), "checkpoint": dict(checkpoint)}
    return report


def print_metrics(metrics: Mapping[str, Metrics], data: Mapping[str, Any]) -> None:
    """Metrics on the standard output, a column for each predictor; what was measured on the standard error."""
    columns = list(metrics)
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    width = max(28, *(len(name) + 2 for name in names))
    print("".ljust(width) + "".join(f"{column:>10}" for column in columns))
    for name in names:
        cells = (f"{metrics[c][name]:.4f}" if name in metrics[c] else "" for c in columns)
        print(name.ljust(width) + "".join(f"{cell:>10}" for cell in cells))
    for name, value in data.items():
        print(f"{name.ljust(width)}{value}", file=sys.stderr)
