"""`python -m deixis_export.parity DIR [--through torch|onnx]`: compare a directory of golden vectors with our models.

Prints one line per compared array (file, array, largest relative error, tolerance, ok or FAIL), then a count. Exit code
0 if nothing failed, 1 if an array failed, the parameters do not fill the model or it cannot be exported, 2 for bad use.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deixis.errors import ExportError
from deixis_export.parity.base_context import BadDirectory, BaseContext
from deixis_export.parity.families import Case, Family, family_of
from deixis_export.parity.registry import matching
from deixis_export.parity.report import Absent, Line, Report
from deixis_train.loaders.report import CheckpointError


def compare(directory: Path, through: str = "torch", emit: Callable[[str], None] = print) -> Report:
    """Compare everything in a golden directory; each line goes to `emit` as well.

    Raises BadDirectory if it cannot be used, CheckpointError if its parameters do not fill the model of its sizes.
    """
    family = family_of(directory)
    report = Report(emit)
    with family.open(directory, through) as context:
        _compare_files(family, context, report)
    return report


def _compare_files(family: Family, context: BaseContext[Any, Any], report: Report) -> None:
    present = family.files(context.directory)
    for pattern, case in family.cases.items():
        names = fnmatch.filter(present, pattern)
        for name in names:
            _compare_file(context, name, case, report)
        if not names:
            report.add(Line(pattern, "*", "absent"))
    if family.params not in present:
        report.add(Line(family.params, "*", "absent"))
    for name in present:
        if matching(name, family.not_covered):
            report.add(Line(name, "*", "not covered yet"))
        elif name != family.params and not matching(name, family.cases):
            report.add(Line(name, "*", "unknown file"))


def _compare_file(context: BaseContext[Any, Any], name: str, case: Case, report: Report) -> None:
    try:
        file = context.open(name)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        report.add(Line(name, "*", "FAIL", float("nan"), note=f"(unreadable: {error})"))
        return
    try:
        case(context, file, report)
    except Absent as reason:  # of something that several arrays are compared with
        report.add(Line(name, "*", "absent", note=f"({reason})"))
    for array in file.unused():
        report.add(Line(name, array, "not compared"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_export.parity", description="Compare golden vectors with our models."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="golden vectors of either family")
    parser.add_argument("--through", choices=("torch", "onnx"), default="torch", help="what to check (default: torch)")
    options = parser.parse_args(argv)
    try:
        report = compare(options.directory, options.through)
    except BadDirectory as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, ExportError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    print(report.summary(options.through))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
