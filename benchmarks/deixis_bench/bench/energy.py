"""Joules, where the machine reports them: an NVIDIA GPU (NVML), a Jetson's power rails, or a processor's counter.

All that a source sees is counted, whoever used it; on an idle machine that is the request and the idle power.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

JETSON = Path("/sys/bus/i2c/drivers/ina3221")
RAPL = Path("/sys/class/powercap")
EVERY = 0.01  # seconds between two looks at a rail


class Meter(Protocol):
    source: str

    def joules(self) -> float:
        """Since some time in the past; only differences mean something."""
        ...

    def close(self) -> None: ...


def find_meter(device: str) -> Meter | None:
    """The best source for a device; None where nothing reports power."""
    if device == "cuda":
        return _nvml() or _jetson()
    return _jetson() or _rapl()


class Counter:
    """A source that counts by itself. read: joules."""

    def __init__(self, source: str, read: Callable[[], float], close: Callable[[], Any] = lambda: None) -> None:
        self.source, self._read, self._close = source, read, close

    def joules(self) -> float:
        return self._read()

    def close(self) -> None:
        self._close()


class Rails:
    """Power in watts, summed up over time by a thread that looks every few milliseconds."""

    def __init__(self, source: str, watts: Callable[[], float], every: float = EVERY) -> None:
        self.source = source
        self._watts, self._every = watts, every
        self._joules, self._last, self._power = 0.0, time.perf_counter(), watts()
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        with self._lock:
            self._add()
            return self._joules

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(self._every):
            with self._lock:
                self._add()

    def _add(self) -> None:
        """The time since the last look at the mean of both looks' power."""
        now, power = time.perf_counter(), self._watts()
        self._joules += (now - self._last) * (self._power + power) / 2
        self._last, self._power = now, power


def _nvml() -> Meter | None:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no driver, or a GPU that does not count: then nothing is reported
        return None
    read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # noqa: E731 - of one line
    return Counter("NVML, first GPU", read, pynvml.nvmlShutdown)


def _jetson(root: Path = JETSON) -> Meter | None:
    """The supply of the whole board where it is a rail of its own, else the sum of all rails."""
    rails = find_rails(root)
    if not rails:
        return None
    whole = [rail for rail in rails if rail[0].upper().startswith(("VDD_IN", "POM_5V_IN"))]
    used = whole or rails
    return Rails(f"power rails {', '.join(name for name, _, _ in used)}", lambda: sum(_watts(*r[1:]) for r in used))


def find_rails(root: Path) -> list[tuple[str, Path, Path]]:
    """(name, file of millivolts, file of milliamperes) of every rail below an INA3221 driver's folder."""
    found = []
    for label in sorted(root.glob("*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if volts.is_file() and amperes.is_file():
            found.append((label.read_text(encoding="utf-8").strip(), volts, amperes))
    return found


def _watts(volts: Path, amperes: Path) -> float:
    return int(volts.read_text(encoding="ascii")) * int(amperes.read_text(encoding="ascii")) / 1e6


def _rapl(root: Path = RAPL) -> Meter | None:
    """The counters of all processor packages; on most systems only root may read them."""
    files = [zone / "energy_uj" for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        for file in files:
            file.read_text(encoding="ascii")
    except OSError:
        return None
    return Counter("RAPL, processor packages", lambda: _microjoules(files) / 1e6) if files else None


def _microjoules(files: Sequence[Path]) -> int:
    return sum(int(file.read_text(encoding="ascii")) for file in files)
