"""`python -m deixis_export.parity DIR [--through torch|onnx]`: compare a directory of golden vectors with our models.

Prints one line per compared array (file, array, largest relative error, tolerance, ok or FAIL), then a count. Exit code
0 if nothing failed, 1 if an array failed or the parameters do not fill the model, 2 for bad use.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from deixis_export.parity.backend import Backend
from deixis_export.parity.backend_torch import TorchBackend
from deixis_export.parity.context import PARAMS, BadDirectory, Context, load_model, read_config
from deixis_export.parity.registry import CASES, NOT_COVERED, Case, matching
from deixis_export.parity.report import Line, Report
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.pixelllm import PixelLLM


def _open_backend(through: str, model: PixelLLM) -> contextlib.AbstractContextManager[Backend]:
    if through == "torch":
        return contextlib.nullcontext(TorchBackend(model))
    from deixis_export.parity import backend_onnx

    return backend_onnx.open_backend(model)


def compare(directory: Path, through: str = "torch", emit: Callable[[str], None] = print) -> Report:
    """Compare everything in a golden directory; each line goes to `emit` as well.

    Raises BadDirectory if it cannot be used, CheckpointError if its parameters do not fill the model of its sizes.
    """
    config, values = read_config(directory)
    model = load_model(directory, config)
    report = Report(emit)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(_open_backend(through, model)) if model is not None else None
        _compare_files(Context(directory, values, backend, partial(_open_backend, through)), report)
    return report


def _compare_files(context: Context, report: Report) -> None:
    present = sorted(path.name for path in context.directory.iterdir() if path.suffix == ".npz")
    for pattern, case in CASES.items():
        names = fnmatch.filter(present, pattern)
        for name in names:
            _compare_file(context, name, case, report)
        if not names:
            report.add(Line(pattern, "*", "absent"))
    if PARAMS not in present:
        report.add(Line(PARAMS, "*", "absent"))
    for name in present:
        if matching(name, NOT_COVERED):
            report.add(Line(name, "*", "not covered yet"))
        elif name != PARAMS and not matching(name, CASES):
            report.add(Line(name, "*", "unknown file"))


def _compare_file(context: Context, name: str, case: Case, report: Report) -> None:
    try:
        file = context.open(name)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        report.add(Line(name, "*", "FAIL", float("nan"), note=f"(unreadable: {error})"))
        return
    case(context, file, report)
    for array in file.unused():
        report.add(Line(name, array, "not compared"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_export.parity", description="Compare golden vectors with our models."
    )
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="golden vectors: config.json, params.npz and npz files"
    )
    parser.add_argument("--through", choices=("torch", "onnx"), default="torch", help="what to check (default: torch)")
    options = parser.parse_args(argv)
    try:
        report = compare(options.directory, options.through)
    except BadDirectory as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    print(report.summary(options.through))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
