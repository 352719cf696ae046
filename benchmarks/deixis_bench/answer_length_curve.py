"""Curves of what `answer_length` measured: `python -m deixis_bench.answer_length_curve REPORT.json ... --out FILE.png`.

One panel per report: processor seconds of an answer against its new tokens, with a cache and without, both axes
logarithmic, so that a straight line is a power of the length. The ratios stand at the lengths that were asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deixis_train.files import replacing

WAYS = {"uncached_s": "without cache", "cached_s": "with cache"}


def read_report(path: Path) -> dict[str, Any]:
    """A report of `answer_length`. Raises ValueError when it is another file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if {"curve", "lengths"} <= report["metrics"].keys() and "name" in report["bundle"]:
            return report
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # said below
    raise ValueError(f"{path}: not a report of answer_length; write one with its --json")


def draw(reports: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw the reports side by side into the picture `out`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(reports), figsize=(5 * len(reports), 3.8), squeeze=False)
    for panel, report in zip(panels[0], reports, strict=True):
        metrics = report["metrics"]
        curve = metrics["curve"]
        for name, label in WAYS.items():
            panel.plot(curve["new_tokens"], curve[name], label=label)
        for row in metrics["lengths"]:
            found = row["processor"]
            ends = [found[name] for name in WAYS]
            panel.plot([row["new_tokens"]] * 2, ends, color="grey", linewidth=0.8, linestyle=":")
            middle = (ends[0] * ends[1]) ** 0.5
            panel.text(0.93 * row["new_tokens"], middle, f"{found['ratio']:.0f} x", ha="right")
        panel.set(xscale="log", yscale="log", title=report["bundle"]["name"], xlabel="new tokens")
        panel.set_ylabel("processor seconds of an answer")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, loc="upper left")
    figure.tight_layout()
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:], dpi=80)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.answer_length_curve", description="Curves of reports of answer_length."
    )
    parser.add_argument("reports", metavar="REPORT", type=Path, nargs="+", help="what answer_length --json wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture: .png, .jpg, .svg or .pdf")
    options = parser.parse_args(argv)
    if options.out.suffix not in (".png", ".jpg", ".svg", ".pdf"):
        parser.error(f"--out {options.out.name}: choose a name that ends with .png, .jpg, .svg or .pdf")
    try:
        draw([read_report(path) for path in options.reports], options.out)
    except (ValueError, OSError) as error:
        print(f"answer_length_curve: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
