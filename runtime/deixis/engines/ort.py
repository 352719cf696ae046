"""onnxruntime, on the CPU or with CUDA. The only module that imports it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import Bundle
from deixis.engines import Arrays
from deixis.errors import ClosedError, DeviceError, EngineError

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtEngine:
    """Graphs of one bundle as onnxruntime sessions, loaded on first use. Safe to use from several threads.

    threads: of one graph run; None leaves the number to onnxruntime (one per physical core). Idle threads sleep instead
    of spinning: decoding is many short runs, and a spinning pool takes cores from everybody else. Measured on two busy
    cores (36 small products, 2 threads): 10.8 ms asleep, 16.7 ms spinning, and 5.5 against 8.5 ms of processor time.
    """

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int | None = None) -> None:
        self._ort = _import_onnxruntime()
        self._bundle = bundle
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.threads = threads or 0
        available = self._ort.get_available_providers()
        self.device = device
        if device == "auto":
            self.device = "cuda" if _PROVIDERS["cuda"] in available and self._works("cuda") else "cpu"
            log.info("device auto: %s", self.device)
        elif _PROVIDERS[device] not in available:
            raise DeviceError(
                f"device {device!r}: the installed onnxruntime {self._ort.__version__} has no {_PROVIDERS[device]}; "
                'run: pip uninstall onnxruntime && pip install "deixis[gpu]"'
            )
        elif device == "cuda" and not self._works("cuda"):
            raise DeviceError(
                "device 'cuda': onnxruntime cannot start CUDA here; check driver, CUDA and cuDNN libraries"
            )

    def run(self, role: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        graph = self._bundle.manifest.graphs[role]
        session = self._session(role)
        feed = {graph.inputs[name].tensor: array for name, array in inputs.items()}
        try:
            values = session.run([info.tensor for info in graph.outputs.values()], feed)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EngineError(f"graph {role} failed: {_one_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(graph.outputs, values, strict=True)}

    def bind(self, role: str, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        graph = self._bundle.manifest.graphs[role]
        session = self._session(role)
        binding = session.io_binding()

        def tie(bind_one: Callable[..., None], tensor: str, array: NDArray[np.generic]) -> None:
            if not array.flags.c_contiguous:
                raise EngineError(f"graph {role}: array bound to {tensor} is not contiguous")
            bind_one(tensor, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        try:
            for name, array in inputs.items():
                tie(binding.bind_input, graph.inputs[name].tensor, array)
            for name, array in outputs.items():
                tie(binding.bind_output, graph.outputs[name].tensor, array)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"graph {role}: cannot bind its tensors: {_one_line(error)}") from error

        keep = (dict(inputs), dict(outputs))

        def run(_keep: object = keep) -> None:  # the binding holds plain addresses: keep what lies there
            try:
                session.run_with_iobinding(binding)
            except Exception as error:
                raise EngineError(f"graph {role} failed: {_one_line(error)}") from error

        return run

    def load(self, role: str) -> None:
        self._session(role)

    def loaded(self) -> tuple[str, ...]:
        return tuple(sorted(self._sessions))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._sessions.clear()

    def _session(self, role: str) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._closed:
                raise ClosedError("the model was closed while it was in use")
            if role not in self._sessions:
                self._sessions[role] = self._open(role, self.device)
                log.debug("loaded graph %s", role)
            return self._sessions[role]

    def _open(self, role: str, device: str) -> onnxruntime.InferenceSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = self._bundle.file(self._bundle.manifest.graphs[role].file)
        try:
            return self._ort.InferenceSession(str(path), options, providers=[_PROVIDERS[device]])
        except Exception as error:
            raise EngineError(f"{path}: onnxruntime cannot load graph {role}: {_one_line(error)}") from error

    def _works(self, device: str) -> bool:
        """Open the smallest graph on a device: onnxruntime lists CUDA when it was built with it, not when it runs."""
        graphs, files = self._bundle.manifest.graphs, self._bundle.manifest.files
        smallest = min(graphs, key=lambda role: files[graphs[role].file].bytes)
        try:
            session = self._open(smallest, device)
        except EngineError as error:
            log.info("device %s does not work here: %s", device, error)
            return False
        return session.get_providers()[0] == _PROVIDERS[device]


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(f'onnxruntime is not installed ({error}); run: pip install "deixis[cpu]"') from None
    return onnxruntime


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
