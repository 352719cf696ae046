"""The lines of a parity run: one per array, then a count."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MODULE_TOLERANCE = 1e-4  # of single modules, relative to the array's largest magnitude
CHAIN_TOLERANCE = 2e-3  # of continuous values at the end of the whole chain
EXACT = 0.0  # ids and masks

Array = NDArray[Any]


class Absent(Exception):
    """Something that the directory does not hold: an array, a file or a part of the model. The message names it."""


class TorchOnly(Exception):
    """A value that the backend does not emit."""


class GoldenFile:
    """The arrays of one npz file, or the leaves of a JSON file: "a/b/0" is the first entry of what stands below "b" in
    "a"; lists of equal shape are one array. Reading what is not there raises Absent; what was read is remembered.

    Raises ValueError or OSError for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._arrays: dict[str, Array] = {}
        self._used: set[str] = set()
        self._exists = path.is_file()
        self._tree: Any = None
        if self._exists and path.suffix == ".json":
            self._tree = json.loads(path.read_text(encoding="utf-8"))
            self._arrays = dict(_leaves(self._tree))
        elif self._exists:
            with np.load(path, allow_pickle=False) as arrays:
                self._arrays = {name: arrays[name] for name in arrays.files}

    def __getitem__(self, name: str) -> Array:
        self._used.add(name)
        if name not in self._arrays:
            raise Absent(f"{self.name} has no {name}" if self._exists else f"no file {self.name}")
        return self._arrays[name]

    def tree(self, name: str) -> Any:
        """Everything below a top-level entry of a JSON file, as it stands there."""
        self._used.update(leaf for leaf in self._arrays if leaf == name or leaf.startswith(f"{name}/"))
        if not isinstance(self._tree, dict) or name not in self._tree:
            raise Absent(f"{self.name} has no {name}" if self._exists else f"no file {self.name}")
        return self._tree[name]

    def skip(self, *names: str) -> None:
        """Arrays that say something of the golden vectors themselves, so there is nothing to compare."""
        self._used.update(names)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def unused(self) -> list[str]:
        """Names of the arrays that nothing has read."""
        return [name for name in self._arrays if name not in self._used]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    below = value.items() if isinstance(value, dict) else None
    if isinstance(value, list):
        array = _rectangle(value)
        if array is not None:
            yield name, array
            return
        below = ((str(number), entry) for number, entry in enumerate(value))
    if below is None:
        yield name, np.asarray(value)
        return
    for key, entry in below:
        yield from _leaves(entry, f"{name}/{key}" if name else key)


def _rectangle(values: list[Any]) -> Array | None:
    """Numbers or texts in lists of equal length, or None."""
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    return array if array.dtype.kind in "biufU" else None


@dataclass(frozen=True)
class Line:
    """One array's outcome.

    Attributes:
        status: ok or FAIL where something was compared; else why not (absent, torch-only, not covered yet, ...).
        error: largest |actual - expected| divided by the largest |expected|; for exact arrays the share of entries that
            differ. NaN where the shapes differ or a value is not finite; None where nothing was compared.
        tolerance: largest error that passes; 0 = exact.
    """

    file: str
    name: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:.1e}"
        tolerance = "" if self.tolerance is None else f"{self.tolerance:.0e}" if self.tolerance else "exact"
        return f"{self.file:<32} {self.name:<32} {error:>8} {tolerance:>6} {self.status} {self.note}".rstrip()


class Report:
    """Collects lines and hands each to `emit` as it comes."""

    def __init__(self, emit: Callable[[str], None] = print) -> None:
        self.lines: list[Line] = []
        self._emit = emit

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self._emit(str(line))

    def check(
        self,
        file: GoldenFile,
        name: str,
        compute: Callable[[], ArrayLike],
        tolerance: float = MODULE_TOLERANCE,
        view: Callable[[Array], Array] | None = None,
        label: str = "",
    ) -> None:
        """Compare the array `name` of a file with what `compute` gives; Absent and TorchOnly become lines of their own.

        Args:
            tolerance: largest relative error that passes, or EXACT.
            view: applied to both sides first, to compare a part only.
            label: printed behind the name, to tell apart several comparisons of one array.
        """
        try:
            expected = file[name]
            actual = np.asarray(compute())
        except Absent as reason:
            self.add(Line(file.name, name + label, "absent", note=f"({reason})"))
            return
        except TorchOnly:
            self.add(Line(file.name, name + label, "torch-only"))
            return
        name += label
        if actual.shape != expected.shape:
            note = f"(shape {actual.shape}, expected {expected.shape})"
            self.add(Line(file.name, name, "FAIL", float("nan"), tolerance, note))
            return
        if view:
            actual, expected = view(actual), view(expected)
        error = share_differing(actual, expected) if tolerance == EXACT else relative_error(actual, expected)
        # Written so that NaN fails.
        self.add(Line(file.name, name, "ok" if error <= tolerance else "FAIL", error, tolerance))

    @property
    def compared(self) -> list[Line]:
        return [line for line in self.lines if line.status in ("ok", "FAIL")]

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.status == "FAIL"]

    def summary(self, through: str) -> str:
        """The count line: arrays compared, failures, the worst relative error and where, and what was left out."""
        text = f"parity {through}: {len(self.compared)} arrays, {len(self.failed)} failed"
        continuous = [line for line in self.compared if line.tolerance]
        if continuous:
            # A NaN is the worst of all.
            worst = max(continuous, key=lambda line: float("inf") if line.error != line.error else line.error or 0.0)
            text += f", worst {worst.error:.1e} ({worst.file}/{worst.name})"
        rest = Counter(line.status for line in self.lines if line.status not in ("ok", "FAIL"))
        return text + "".join(f"; {count} {status}" for status, count in sorted(rest.items()))


def relative_error(actual: Array, expected: Array) -> float:
    """Largest absolute difference divided by the largest magnitude of `expected` (by 1 if that is 0)."""
    if expected.size == 0:
        return 0.0
    wide = expected.astype(np.float64)
    scale = float(np.abs(wide).max()) or 1.0
    return float(np.abs(actual.astype(np.float64) - wide).max()) / scale


def share_differing(actual: Array, expected: Array) -> float:
    """Part of the entries that are not equal, 0 to 1."""
    return float(np.mean(actual != expected)) if expected.size else 0.0
