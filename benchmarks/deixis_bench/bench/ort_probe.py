"""What onnxruntime itself can do here, and what it runs of a graph. The only module of the benchmark that imports it.

The engine stays the runtime's; this asks the library beside it: how fast it multiplies, and which operators of which
sizes a graph consists of once it was optimised.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deixis.errors import DeixisError, DeviceError

Arrays = Mapping[str, NDArray[np.generic]]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ProbeError(DeixisError):
    """A graph or a product cannot be run beside the engine."""


def profile(path: Path, inputs: Arrays) -> list[dict[str, Any]]:
    """Run a graph once on one CPU thread and return what was executed: for every operator its `op_name`,
    `input_type_shape`, `output_type_shape`, and in bytes `parameter_size` (weights) and `output_size`.

    Weights are not packed anew, so that they count as what is read. Raises ProbeError.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = ort.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])
            session.run(None, dict(inputs))
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ProbeError(f"{path}: cannot be profiled: {' '.join(str(error).split())[:300]}") from error
    return [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]


def product_rate(precision: str, device: str, threads: int, side: int, repeats: int) -> float:
    """Operations (multiplications and additions) per second of a product of two square matrices, the best of some.

    precision: "fp32", or "int8": unsigned times signed, weights constant, sums int32. Raises ProbeError where it
    cannot be run on the device.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(_product(precision, side), options, providers=[PROVIDERS[device]])
        if session.get_providers()[0] != PROVIDERS[device]:
            raise ProbeError(f"device {device!r}: onnxruntime does not run there")
        binding = session.io_binding()
        given = np.ones((side, side), np.float32 if precision == "fp32" else np.uint8)
        where = "cuda" if device == "cuda" else "cpu"
        binding.bind_ortvalue_input("a", ort.OrtValue.ortvalue_from_numpy(given, where, 0))
        binding.bind_output("c", where)
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            seconds.append(time.perf_counter() - start)
    except ProbeError:
        raise
    except Exception as error:
        raise ProbeError(f"{precision} product: {' '.join(str(error).split())[:300]}") from error
    return 2 * side**3 / min(seconds[1:])


def _product(precision: str, side: int) -> bytes:
    """The model `c = a @ weights` as bytes."""
    onnx = _onnx()
    from onnx import TensorProto, helper, numpy_helper

    floats = precision == "fp32"
    random = np.random.default_rng(0)
    weights = random.standard_normal((side, side)) if floats else random.integers(-127, 128, (side, side))
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT) if floats else (TensorProto.UINT8, TensorProto.INT32)
    graph = helper.make_graph(
        [helper.make_node("MatMul" if floats else "MatMulInteger", ["a", "w"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", kinds[0], (side, side))],
        [helper.make_tensor_value_info("c", kinds[1], (side, side))],
        [numpy_helper.from_array(weights.astype(np.float32 if floats else np.int8), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def stored_bytes(path: Path) -> int:
    """Bytes of a graph's weights as its file stores them, external data included; that of other graphs is not.

    Raises ProbeError for what is no ONNX file.
    """
    onnx = _onnx()
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ProbeError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error
    return sum(_tensor_bytes(onnx, tensor) for tensor in model.graph.initializer)


def _tensor_bytes(onnx: Any, tensor: Any) -> int:
    kind, count = tensor.data_type, int(np.prod(tensor.dims, dtype=np.int64))
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DeviceError(f'onnxruntime is not installed ({error}); run: pip install "deixis[cpu]"') from None
    return onnxruntime


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ProbeError(f'onnx is not installed ({error}); run: pip install "deixis[bench]"') from None
    return onnx
