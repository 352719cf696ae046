"""optimum-onnx: ORTModelForSeq2SeqLM and ORTModelForCausalLM, its own export, `generate` as in transformers.

int8 is its own dynamic quantisation, int8 per channel, as its documentation applies it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import transformers
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTQuantizer
from optimum.onnxruntime.configuration import AutoQuantizationConfig

from deixis_bench.rivals.contract import Loaded, Spec
from deixis_bench.rivals.run_transformers import generate


def exported(spec: Spec) -> Path:
    """optimum's fp32 graphs of the shared weights, made when they are not there."""
    folder = spec.work.parent / "optimum-graphs"
    if not folder.exists():
        temporary = spec.work / "exporting"
        _kind(spec).from_pretrained(spec.folder, export=True, **_merged(spec, False)).save_pretrained(temporary)
        temporary.replace(folder)
    return folder


def _kind(spec: Spec) -> Any:
    return ORTModelForSeq2SeqLM if spec.part == "text" else ORTModelForCausalLM


def _merged(spec: Spec, merged: bool) -> dict[str, Any]:
    """An encoder-decoder has a graph for the first id and one for the others; a decoder alone has one."""
    return {"use_merged": merged} if spec.part == "text" else {}


def load(spec: Spec) -> Loaded:
    transformers.logging.set_verbosity_error()
    folder = exported(spec)
    if spec.precision == "int8":
        folder = _quantised(folder, spec)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.threads
    options.inter_op_num_threads = 1
    model = _kind(spec).from_pretrained(folder, session_options=options, **_merged(spec, False))
    note = f"onnxruntime {onnxruntime.__version__}, transformers {transformers.__version__}, generate"
    return Loaded(version("optimum-onnx"), lambda: generate(model, spec), note)


def _quantised(folder: Path, spec: Spec) -> Path:
    target = spec.work / "int8"
    if not target.exists():
        temporary = spec.work / "quantising"
        config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        for path in sorted(folder.glob("*.onnx")):
            quantizer = ORTQuantizer.from_pretrained(folder, file_name=path.name)
            quantizer.quantize(save_dir=temporary, quantization_config=config, file_suffix="")
        for path in folder.glob("*.json"):
            (temporary / path.name).write_bytes(path.read_bytes())
        temporary.replace(target)
    return target
