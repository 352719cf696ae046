"""Runs one exported graph on onnxruntime's CPU provider, the reference engine of parity measurements."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime

from deixis.errors import ExportError

Arrays = dict[str, np.ndarray]


class GraphSession:
    """A graph file whose tensors have their logical names.

    A context manager, so that memory is freed graph by graph.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._path = path
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"onnxruntime cannot load {path.name}: {' '.join(str(error).split())[:300]}") from error
        self._session: onnxruntime.InferenceSession | None = session
        self.outputs = [item.name for item in self._session.get_outputs()]

    def __enter__(self) -> GraphSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def run(self, inputs: Arrays) -> Arrays:
        assert self._session is not None, "the session is closed"
        try:
            values = self._session.run(self.outputs, inputs)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ExportError(f"{self._path.name} does not run: {' '.join(str(error).split())[:300]}") from error
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}


def relative_error(actual: Arrays, expected: Arrays) -> float:
    """Largest difference over all arrays, each relative to its own largest magnitude (to 1 where that is 0).

    Infinite when names or shapes differ or a value is not finite. Arrays of integers need only be there: they are the
    ids of likeliest words, beside their log-probabilities, and rounding may exchange two that are almost equal.
    """
    worst = 0.0
    if set(actual) != set(expected):
        return float("inf")
    for name, wanted in expected.items():
        found = actual[name]
        if found.shape != wanted.shape or not np.isfinite(found).all():
            return float("inf")
        if not wanted.size or np.issubdtype(wanted.dtype, np.integer):
            continue
        scale = float(np.abs(wanted).max()) or 1.0
        worst = max(worst, float(np.abs(found.astype(np.float64) - wanted).max()) / scale)
    return worst
