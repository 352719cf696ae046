"""One competitor in a process of its own: `python -m deixis_bench.rivals.worker NAME SPEC.json`.

Prints one JSON line {"ready": true, "version", "load_s", "note"} or {"error": one line}. For every line {"run": n} on
stdin it runs once and answers {"seconds", "cpu_seconds", "tokens"} or {"seconds", "cpu_seconds", "outputs": PATH.npz}.
It ends at the end of stdin. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from deixis_bench.rivals.contract import Loaded, Spec, one_line
from deixis_bench.rivals.registry import RIVALS

MODULE_VARIABLE = "DEIXIS_RIVAL_MODULE"  # the module of a rival that is not in the registry


def protocol_stream() -> TextIO:
    """The real stdout; from here on everything else that is printed, by C libraries too, goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def serve(load: Callable[[], Loaded], spec: Spec, requests: TextIO, answers: TextIO) -> int:
    """Load and answer until `requests` end. Returns the exit code: 1 when the rival cannot be loaded or run."""

    def say(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        loaded = load()
    except Exception as error:  # whatever a library raises is the answer
        say({"error": one_line(error)})
        return 1
    load_s = time.perf_counter() - start
    say({"ready": True, "version": loaded.version, "load_s": load_s, "note": loaded.note})
    for line in requests:
        number = json.loads(line)["run"]
        try:
            answer = loaded.run()
        except Exception as error:
            say({"error": one_line(error)})
            return 1
        values: dict[str, Any] = {"seconds": answer.watch.seconds, "cpu_seconds": answer.watch.cpu_seconds}
        if answer.tokens is not None:
            values["tokens"] = [int(token) for token in answer.tokens]
        if answer.outputs is not None:
            path = spec.work / f"outputs-{number}.npz"
            np.savez(path, **answer.outputs)  # type: ignore[arg-type]
            values["outputs"] = str(path)
        say(values)
    return 0


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m deixis_bench.rivals.worker NAME SPEC.json", file=sys.stderr)
        return 2
    answers = protocol_stream()
    name, spec = argv[0], Spec.from_json(Path(argv[1]).read_text(encoding="utf-8"))
    spec.work.mkdir(parents=True, exist_ok=True)
    module = os.environ.get(MODULE_VARIABLE) or RIVALS[name].module
    return serve(lambda: importlib.import_module(module).load(spec), spec, sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
