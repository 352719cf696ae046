"""What executes graphs. An engine is chosen once, at load, and never replaced by another in silence.

`auto` takes CUDA where onnxruntime has it and it works, the CPU otherwise; what it took stands in `model.info.device`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import Bundle
from deixis.errors import DeviceError

DEVICES = ("auto", "cpu", "cuda", "tensorrt")

Arrays = Mapping[str, NDArray[np.generic]]


class Engine(Protocol):
    """Runs the graphs of one bundle by role, with logical tensor names.

    Graphs are loaded when they are first needed.
    """

    device: str  # "cpu" or "cuda"

    @property
    def threads(self) -> int:
        """Of one graph run; 0 = as many as the engine likes."""
        ...

    def run(self, role: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        """Run a graph once. Returns all its outputs as new arrays. Raises EngineError."""
        ...

    def bind(self, role: str, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        """Tie arrays to a graph and return a function that runs it on what they then hold.

        Outputs are written in place; the same array may be an input and an output (caches). Outputs that are not named
        are not given. Arrays must be C-contiguous and stay as long as the function is used. Raises EngineError.
        """
        ...

    def load(self, role: str) -> None:
        """Load a graph now instead of when it is first run. Raises EngineError."""
        ...

    def loaded(self) -> tuple[str, ...]:
        """Roles whose graphs are in memory."""
        ...

    def close(self) -> None:
        """Free every graph."""
        ...


def make_engine(bundle: Bundle, device: str = "auto", threads: int | None = None) -> Engine:
    """The engine for `device`. Raises DeviceError when it is unknown, or not installed, or does not work here."""
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if device == "tensorrt":
        raise DeviceError("device 'tensorrt' is not served by this version of deixis; use 'cuda' or 'cpu'")
    from deixis.engines.ort import OrtEngine

    return OrtEngine(bundle, device, threads)
