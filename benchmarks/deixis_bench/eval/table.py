"""Reports as one table: metric, goal, what the PyTorch model and the bundle reached.

`python -m deixis_bench.eval.table RESULTS.json ...` or `deixis eval --table RESULTS.json ...` prints it as markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deixis.errors import DeixisError
from deixis_train.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Goal:
    """What the demo is meant to reach on held-out scenes. at_most: lower is better."""

    value: float
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value


GOALS = {
    "P@0.5": Goal(0.90),
    "cIoU": Goal(0.80),
    "LBM k=0": Goal(0.08, at_most=True),
    "caption CIDEr": Goal(1.5),
    "region right": Goal(0.90),
    "mAP": Goal(0.35),
}
# Metrics whose names end so are shares; what stands behind a colon or in brackets says of which part.
PERCENT = ("IoU", "P@0.5", "AP50", "recall", "precision", "right")


def read_report(path: Path) -> dict[str, Any]:
    """A report of `deixis eval` or another measurement. Raises EvaluationError for what is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot read the report: {error.strerror}") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), dict) or not report["metrics"]:
        raise EvaluationError(f"{path}: not a report of 'deixis eval', which has metrics")
    return report


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The markdown table of several reports; where they name the same metric, the later one counts."""
    columns: dict[str, dict[str, float]] = {"torch": {}, "bundle": {}}
    names: dict[str, None] = {}
    for report in reports:
        columns["torch"] |= report.get("torch", {})
        if report.get("bundle") is not None or "torch" not in report:
            columns["bundle"] |= report["metrics"]
        names |= dict.fromkeys([*report["metrics"], *report.get("torch", {})])
    lines = ["| metric | goal | torch | bundle |", "|---|---:|---:|---:|"]
    for name in names:
        goal = GOALS.get(name)
        wanted = "" if goal is None else ("≤ " if goal.at_most else "≥ ") + _number(name, goal.value)
        cells = [_cell(name, columns[column].get(name), goal if column == "bundle" else None) for column in columns]
        lines.append(f"| {name} | {wanted} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float | None, goal: Goal | None) -> str:
    if value is None:
        return ""
    text = _number(name, value)
    return f"**{text}**" if goal is not None and goal.reached(value) else text


def _number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name.split(":")[0].split(" (")[0].endswith(PERCENT) else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the reports named; returns the exit code."""
    paths = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if not paths:
        print("deixis eval: error: name at least one report, as --json wrote it", file=sys.stderr)
        return 2
    try:
        print(table([read_report(path) for path in paths]), end="")
    except DeixisError as error:
        print(f"deixis eval: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
