"""The JSON that every measurement writes: metrics, data, bundle, machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deixis


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "deixis": deixis.__version__,
    }


def finish(metrics: dict[str, Any], data: dict[str, Any], model: deixis.Model, out: Path | None) -> None:
    """Print metrics and data, and write the whole report to `out` under a temporary name first."""
    for name, value in (metrics | data).items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    if out is not None:
        write_report(out, report_of(metrics, data, model))


def report_of(metrics: dict[str, Any], data: dict[str, Any], model: deixis.Model) -> dict[str, Any]:
    """The whole report of a measurement."""
    info = model.info
    bundle = {"name": info.name, "device": info.device, "path": info.bundle.name}
    return {"metrics": metrics, "data": data, "bundle": bundle, "machine": machine()}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the JSON under a temporary name beside `path`, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
