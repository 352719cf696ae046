"""onnxruntime-genai: its own model builder on the shared folder, its own generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from deixis_bench.rivals.contract import PROMPT_TOKENS, Answer, Loaded, RivalError, Spec, decode_after_first

og: Any = onnxruntime_genai  # its names come from a compiled module, which type checkers cannot see


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
    """Run the builder, then set threads in its configuration and take out the end ids, so that nothing ends early."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(spec.folder), "-o", str(folder)]
    command += ["-p", spec.precision, "-e", "cpu", "-c", str(spec.work / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / "genai_config.json"
    if done.returncode or not path.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RivalError(f"its model builder failed: {lines[-1][:200]}")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["decoder"]["session_options"]["intra_op_num_threads"] = spec.threads
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
