"""Memory over mixed requests, by the command that measures long runs; that it notices a leak is tested too.

A process of its own, for what other tests leave behind would count.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deixis_bench", reason="the benchmarks are not installed")
from deixis_bench.soak import summarise, windows

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
KINDS = {
    "tiny_bundle": {"caption", "region_caption", "stream", "batch", "refer", "trace", "segment"},
    "tiny_glamm": {
        "caption", "region_caption", "stream", "batch", "refer", "ask", "chat", "grounded_caption", "ground_phrases",
    },
}  # fmt: skip


def soak(folder: Path, bundle: str, *more: str) -> tuple[int, str, dict[str, Any]]:
    """Code, errors and report of a short run on one thread."""
    out = folder / "report.json"
    short = ("--requests", "120", "--max-new-tokens", "5", "--texts", "a b c", "d e", "--threads", "1", "--held")
    paths = [str(ROOT / part) for part in ("runtime", "train", "benchmarks")]
    done = subprocess.run(
        [sys.executable, "-m", "deixis_bench.soak", str(GOLDEN / bundle), *short, "--json", str(out), *more],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr, json.loads(out.read_text())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back when asked")
@pytest.mark.parametrize("bundle", sorted(KINDS))
def test_memory_stays_flat(bundle: str, tmp_path: Path) -> None:
    code, errors, report = soak(tmp_path, bundle)
    assert code == 0, errors
    assert report["metrics"]["growth"] <= 0.01
    assert KINDS[bundle] <= set(report["data"]["kinds"])  # dense captions come with a detector, which this has not
    assert sum(report["data"]["kinds"].values()) == 120


def test_a_leak_is_noticed(tmp_path: Path) -> None:
    """100 KB a request of a process that holds some 110 MB: 8 % over the requests that are compared."""
    code, errors, report = soak(tmp_path, "tiny_bundle", "--leak-kb", "100")
    assert code == 1
    assert "memory grew by" in errors and errors.count("\n") == 1
    assert report["metrics"]["growth"] > 0.03


def test_growth_is_that_of_medians_behind_the_warm_up() -> None:
    first, last = windows(1000)
    assert (first, last) == (range(200, 300), range(900, 1000))
    resident = [50.0] * 200 + [100.0] * 700 + [101.0] * 100
    resident[250] = resident[950] = 500.0  # a single large request is no growth
    assert summarise(resident) == pytest.approx(
        {"growth": 0.01, "after_warm_up_mb": 100.0, "at_end_mb": 101.0, "peak_mb": 500.0}
    )
