"""What the tests of the parity command share: editing copies of golden files, and counting what was said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deixis_export.parity.report import Report

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def silent(line: str) -> None:
    """Where `compare` may leave its lines."""


def edit(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Write an npz file again with its arrays changed in place."""
    with np.load(path) as arrays:
        content = dict(arrays)
    change(content)
    np.savez(path, **content)  # type: ignore[arg-type]


def statuses(report: Report, file: str) -> Counter[str]:
    """How many lines of a file have each status."""
    return Counter(line.status for line in report.lines if line.file == file)
