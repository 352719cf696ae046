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
from deixis.memory import return_freed_memory
from deixis.scheduling import Scheduling, make_scheduling

if TYPE_CHECKING:
    import onnxruntime

log = logging.getLogger(__name__)

_CLOSED = "the model was closed while it was in use"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


# Graphs that keep the memory they work in. For each picture or batch the system would have to give and clear all its
# pages anew: a tenth of an image encoder's time, a third of a batch of eight captions. The others work in memory of the
# C library, which any of them may use next: were each to keep the most it ever needed, prompts of different lengths
# would make a process grow for long.
_KEEPS_MEMORY = frozenset({"sam_encoder", "global_encoder", "grounding_encoder", "text_encoder"})
# Graphs whose memory is planned once for every shape of their inputs: a seventh of a small model's step. Plans are
# never forgotten, so only where shapes recur.
_PLANS_MEMORY = frozenset({"decoder_step"})


class OrtEngine:
    """Graphs of one bundle as onnxruntime sessions, loaded on first use. Safe to use from several threads.

    threads: of one graph run; None = one per core that this process may use. docs/threads.md tells what was measured.
    """

    def __init__(self, bundle: Bundle, device: str = "auto", threads: int | None = None) -> None:
        self._ort = _import_onnxruntime()
        self._bundle = bundle
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._closed = False
        self.scheduling = make_scheduling(threads)
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

    @property
    def threads(self) -> int:
        return self.scheduling.threads

    def schedule(self, scheduling: Scheduling) -> None:
        """How the threads of graphs that are loaded from now on behave."""
        self.scheduling = scheduling

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
            if self._closed:
                raise ClosedError(_CLOSED)
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
        """Of several threads that need a graph, one loads it and the others wait; graphs in memory are not held up."""
        with self._lock:
            loading = self._loading.setdefault(role, threading.Lock())
            session = self._known(role)
        if session is not None:
            return session
        with loading:
            with self._lock:
                session = self._known(role)
            if session is None:
                session = self._open(role, self.device)
                log.debug("loaded graph %s", role)
                with self._lock:
                    if self._closed:
                        raise ClosedError(_CLOSED)
                    self._sessions[role] = session
        return session

    def _known(self, role: str) -> onnxruntime.InferenceSession | None:
        if self._closed:
            raise ClosedError(_CLOSED)
        return self._sessions.get(role)

    def _open(self, role: str, device: str) -> onnxruntime.InferenceSession:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.scheduling.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = role in _KEEPS_MEMORY
        options.enable_mem_pattern = role in _PLANS_MEMORY
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.scheduling.spin else "0")
        if len(self.scheduling.cores) > 1:  # of all threads but the calling one; onnxruntime counts processors from 1
            pinned = ";".join(str(core + 1) for core in self.scheduling.cores[1:])
            options.add_session_config_entry("session.intra_op_thread_affinities", pinned)
        path = self._bundle.file(self._bundle.manifest.graphs[role].file)
        try:
            session = self._ort.InferenceSession(str(path), options, providers=[_PROVIDERS[device]])
        except Exception as error:
            raise EngineError(f"{path}: onnxruntime cannot load graph {role}: {_one_line(error)}") from error
        return_freed_memory()  # what it was read and optimised in, as much as its weights
        return session

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
