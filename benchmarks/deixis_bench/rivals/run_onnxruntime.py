"""onnxruntime alone, as most people run it: default options but for the threads, on our exported encoder.

int8 is onnxruntime's dynamic quantisation of that graph with its default settings but int8 weights.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from deixis_bench.rivals.contract import Answer, Loaded, Spec, Stopwatch
from deixis_bench.rivals.make_bundle import bundle_of


def encoder_graph(spec: Spec) -> Path:
    """The exported fp32 graph, or its int8 form."""
    bundle = bundle_of(spec, "fp32")
    path = bundle / "graphs" / "sam_encoder.onnx"
    if spec.precision != "int8":
        return path
    target = bundle.with_name(f"{bundle.name}-int8.onnx")
    if not target.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        temporary = spec.work / "quantising.onnx"
        quantize_dynamic(path, temporary, weight_type=QuantType.QInt8)
        temporary.replace(target)
    return target


def load(spec: Spec) -> Loaded:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(encoder_graph(spec)), options, providers=["CPUExecutionProvider"])
    image, valid = spec.picture()
    inputs = {"image": image, "valid_hw": valid}

    def run() -> Answer:
        with Stopwatch() as watch:
            [sam] = session.run(["sam"], inputs)
        return Answer(watch, outputs={"sam": sam})  # type: ignore[dict-item]

    return Loaded(onnxruntime.__version__, run, "our graph, default session options")
