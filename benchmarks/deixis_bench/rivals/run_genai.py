"""onnxruntime-genai: its own model builder on the shared folder, its own generator.

The builder of 0.18 wants a newer transformers than optimum allows. Two things stand in the way of a LLaMA, and are put
right around it: the name of a class that it imports and does not need, and a `rope_scaling` that is absent.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai  # pyright: ignore[reportMissingImports]

from deixis_bench.rivals.contract import PROMPT_TOKENS, Answer, Loaded, RivalError, Spec, decode_after_first

og: Any = onnxruntime_genai  # its names come from a compiled module, which type checkers cannot see


_BUILDER = """
import runpy, transformers
if not hasattr(transformers, "Qwen3_5ForConditionalGeneration"):
    transformers.Qwen3_5ForConditionalGeneration = None
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""


def load(spec: Spec) -> Loaded:
    folder = spec.work / "model"
    if not (folder / "genai_config.json").is_file():
        _build(spec, folder)
    config = og.Config(str(folder))
    model = og.Model(config)
    length = PROMPT_TOKENS + spec.new_tokens + 1

    def run() -> Answer:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([spec.prompt], np.int32))

        def step(_previous: int = 0) -> int:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return decode_after_first(step, step(), spec.new_tokens)

    return Loaded(og.__version__, run, "its own builder and generator")


def _build(spec: Spec, folder: Path) -> None:
    """Run the builder on a copy of the folder, then set threads in the configuration that it writes."""
    source = spec.work / "source"
    shutil.copytree(spec.folder, source, dirs_exist_ok=True)
    described = json.loads((source / "config.json").read_text(encoding="utf-8"))
    described["rope_scaling"] = {"rope_type": "default", "rope_theta": described["rope_theta"]}
    (source / "config.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    command = [sys.executable, "-c", _BUILDER, "-i", str(source), "-o", str(folder)]
    command += ["-p", spec.precision, "-e", "cpu", "-c", str(spec.work / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(source)
    path = folder / "genai_config.json"
    if done.returncode or not path.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RivalError(f"its model builder failed: {lines[-1][:200]}")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = spec.threads
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
