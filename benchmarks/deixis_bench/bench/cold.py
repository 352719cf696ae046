"""The first result of a fresh process, and what memory it takes: run as `python -m deixis_bench.bench.cold`.

The parent starts it and takes the time to its first line, so Python's own start counts. Everything else of a process
is in it as a user would have it: import, load with all hashes checked, encode, and one text by the public API.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deixis_bench.bench.settings import Settings

_STATUS = Path("/proc/self/status")


def start(bundle: Path, settings: Settings) -> dict[str, Any]:
    """Start a process and wait for its end.

    Returns:
        first_result_ms: from the start of the process to its first result. import_ms, load_ms: of it. memory: in MB
        (2^20 bytes), None where the system does not say; see `_measure`. loaded_first, loaded: roles in memory at the
        first result and at the end.

    Raises DeixisError with what the process said last, when it failed.
    """
    from deixis.errors import DeixisError

    said = json.dumps(
        {
            "bundle": str(bundle),
            "device": settings.device,
            "threads": settings.threads,
            "new_tokens": settings.new_tokens,
            "seed": settings.seed,
        }
    )
    command = [sys.executable, "-m", "deixis_bench.bench.cold", said]
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seconds = time.perf_counter() - begin
            rest, _ = process.communicate()
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or [f"it ended with code {process.returncode}"]
            raise DeixisError(f"the fresh process failed: {last[0]}")
    return {"first_result_ms": seconds * 1000, **json.loads(rest)}


def _measure(bundle: str, device: str, threads: int | None, new_tokens: int, seed: int) -> dict[str, Any]:
    """Memory before the bundle is opened, after the first result, and at most by then; then after the other tasks that
    a warm-up runs."""
    begin = time.perf_counter()
    import deixis
    from deixis_bench.bench.settings import make_pictures, region

    [picture] = make_pictures(1, seed)
    imported = time.perf_counter()
    before = resident_mb()
    with deixis.load(bundle, device=device, threads=threads) as model:
        loaded = time.perf_counter()
        scene = model.encode(picture)
        if "caption" in model.info.tasks:
            scene.caption(options=deixis.DecodeOptions(max_new_tokens=new_tokens, beams=1))
        else:
            scene.segment(box=region(scene.size))
        print("first", flush=True)
        found: dict[str, Any] = {
            "import_ms": (imported - begin) * 1000,
            "load_ms": (loaded - imported) * 1000,
            "loaded_first": model.info.loaded_graphs,
            "memory": {"before_mb": before, "after_first_mb": resident_mb(), "peak_first_mb": peak_mb()},
        }
        model.warmup()
        found["loaded"] = model.info.loaded_graphs
        found["memory"] |= {"after_all_mb": resident_mb(), "peak_mb": peak_mb()}
    return found


def resident_mb() -> float | None:
    """Memory of this process, in MB (2^20 bytes)."""
    return _status("VmRSS")


def peak_mb() -> float | None:
    """The most it ever was."""
    return _status("VmHWM")


def _status(name: str) -> float | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) / 1024
    return None


if __name__ == "__main__":
    try:
        result = _measure(**json.loads(sys.argv[1]))
    except Exception as error:  # whatever it was: the parent shows one line
        print(" ".join(f"{error}".split()) or type(error).__name__, file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result))
