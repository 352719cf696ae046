"""`python -m deixis_bench.rivals --part text --names all --rounds 5 --threads 2 --json FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deixis_bench.report import machine, write_report
from deixis_bench.rivals.campaign import run_rivals
from deixis_bench.rivals.contract import MOST_NEW_TOKENS, PARTS, SIZES, RivalError


def default_work() -> Path:
    """`$DEIXIS_CACHE/rivals`, else `~/.cache/deixis/rivals`."""
    return Path(os.environ.get("DEIXIS_CACHE") or Path.home() / ".cache" / "deixis") / "rivals"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.rivals",
        description="Measure deixis and other runtimes in turn, on the same weights.",
    )
    parser.add_argument("--part", choices=PARTS, default="text", help="what is measured (default: %(default)s)")
    parser.add_argument(
        "--names", nargs="+", default=["all"], metavar="NAME[:PRECISION]", help="who takes part (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every run (default: %(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=60, help=f"ids timed, at most {MOST_NEW_TOKENS} (default: %(default)s)"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny is for tests (default: %(default)s)")
    parser.add_argument("--work", type=Path, help=f"folder for weights and conversions (default: {default_work()})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    return parser


def line_of(entry: dict[str, Any]) -> str:
    """A competitor's line of the table."""
    head = f"{entry['name']:<18} {entry['part']:<14}"
    if "error" in entry:
        return f"{head} not measured: {entry['error']}"
    times, ratio = entry.get("ms_per_token") or entry["ms"], entry["ratio_to_deixis"]
    against = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['least']:.2f}-{ratio['most']:.2f})"
    same = {True: "same", False: "DIFFERENT", None: "other"}[entry["same_output"]]
    return f"{head} {times['p50']:>9.2f} {entry['cpu_ms']:>9.2f} {against:>18} {same:<9} {entry['note']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a wrong output or nothing to compare, 2 used wrongly."""
    options = _parser().parse_args(argv)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        found = run_rivals(
            options.names,
            options.part,
            options.rounds,
            options.threads,
            options.new_tokens,
            options.work or default_work(),
            size=options.size,
            say=say,
        )
    except ValueError as error:
        print(f"rivals: error: {error}", file=sys.stderr)
        return 2
    except RivalError as error:
        print(f"rivals: error: {error}", file=sys.stderr)
        return 1
    unit = "ms" if options.part == "encoder" else "ms/token"
    print(f"{'rival':<18} {'part':<14} {unit:>9} {'cpu ms':>9} {'time over ours':>18} output")
    for entry in found:
        print(line_of(entry))
    if options.json:
        settings = {name: getattr(options, name) for name in ("part", "rounds", "threads", "new_tokens", "size")}
        report = {"format": "deixis-rivals", "version": 1, "settings": settings, "machine": machine(), "rivals": found}
        write_report(options.json, report)
    wrong = [entry for entry in found if entry["same_output"] is False]
    measured = [entry for entry in found if "error" not in entry]
    return 1 if wrong or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
