"""The performance tables of README.md and docs, from the reports in benchmarks/results.

python -m deixis_bench.tables            # put them right
python -m deixis_bench.tables --check    # fail when a document says something else

A table stands between two lines, of which the first names it and the reports that it is made of, without .json (or
another file of the checkout, with it):

    <!-- bench:stages bench-tabletop -->
    <!-- /bench -->
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deixis_bench.documented import TABLES
from deixis_train.files import write_text

RESULTS = Path("benchmarks") / "results"
DOCUMENTS = ("README.md", "docs/*.md")
BEGIN = re.compile(r"^<!-- bench:(\S+)((?: [\w./-]+)*) -->$")
END = "<!-- /bench -->"


class TablesError(ValueError):
    """A document or a report that no table can be made of, in one line."""


class Reports:
    """The reports of a checkout, by their names without .json, or by their paths in it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[str, dict[str, Any] | None] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """A report; None when it has not been written yet. Raises TablesError when it is not JSON."""
        if name not in self._read:
            path = self._root / (name if name.endswith(".json") else RESULTS / f"{name}.json")
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                report = None
            except (OSError, ValueError) as error:
                raise TablesError(f"{path}: not a report: {error}") from None
            if report is not None and not isinstance(report, dict):
                raise TablesError(f"{path}: not a report: it has no parts")
            self._read[name] = report
        return self._read[name]


def renewed(text: str, name: str, reports: Reports) -> str:
    """A document's text with its tables as the reports are; `name` is for messages.

    Raises TablesError at marks that do not fit, an unknown table, or a report that lacks what its table needs.
    """
    lines: list[str] = []
    opened: tuple[int, str] | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        mark = BEGIN.match(line)
        if mark and opened:
            raise TablesError(f"{name}:{number}: a table within the one of line {opened[0]}; close that with {END}")
        if mark:
            table, used = mark[1], mark[2].split()
            if table not in TABLES:
                raise TablesError(f"{name}:{number}: no table {table!r}; choose of {', '.join(sorted(TABLES))}")
            opened = number, table
            lines += [line, *_made(table, used, reports, f"{name}:{number}").split("\n")]
        elif line == END and not opened:
            raise TablesError(f"{name}:{number}: {END} without a table above it")
        elif line == END:
            opened = None
        if not opened and not mark:
            lines.append(line)
    if opened:
        raise TablesError(f"{name}:{opened[0]}: table {opened[1]!r} is not closed; write {END} behind it")
    return "\n".join(lines)


def _made(table: str, used: Sequence[str], reports: Reports, where: str) -> str:
    try:
        return TABLES[table](reports.get, used)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, TablesError):
            raise
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TablesError(
            f"{where}: table {table!r} cannot be made of {', '.join(used) or 'the results'}: {said}"
        ) from error


def documents(root: Path) -> list[Path]:
    """Documents that may have tables. Raises TablesError where there are none."""
    found = sorted(path for pattern in DOCUMENTS for path in root.glob(pattern))
    if not found:
        raise TablesError(f"{root}: no README.md or docs here; run this in the checkout, or give --root")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when --check finds a difference, or nothing can be made."""
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.tables", description="Write the performance tables of README and docs."
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail when a document differs")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: here)")
    options = parser.parse_args(argv)
    try:
        reports = Reports(options.root)
        before = {path: path.read_text(encoding="utf-8") for path in documents(options.root)}
        after = {path: renewed(text, str(path), reports) for path, text in before.items()}  # all of them, or none
        changed = [path for path in before if before[path] != after[path]]
        for path in changed:
            if options.check:
                print(f"tables: {path}: not what {RESULTS} says; run python -m deixis_bench.tables", file=sys.stderr)
            else:
                write_text(path, after[path])
                print(path)
    except (TablesError, OSError) as error:
        print(f"tables: error: {error}", file=sys.stderr)
        return 1
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
