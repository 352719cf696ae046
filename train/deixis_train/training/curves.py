"""`python -m deixis_train.training.curves RUN --out curves.png`: what a run logged, as a picture.

One panel for every stage and group of figures (losses, shares of what is right), training and held-out in one colour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deixis_train.files import replacing
from deixis_train.training.recipe import RecipeError

SHARES = ("right", "P@0.5", "IoU")  # figures between 0 and 1, which have a panel of their own
SMOOTH = 0.8  # of an exponential mean over the logged lines: the pale line is what was logged

Points = list[tuple[int, float]]


def read_log(path: Path) -> dict[tuple[str, str], Points]:
    """Points (step, value) by group ("train" or "held_out") and name, of one stage's log.

    A resumed stage logs some steps again: the later line counts.

    Raises:
        RecipeError: a line that is no record of a log.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            step, group = int(record.pop("step")), str(record.pop("group"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RecipeError(f"{path}:{number}: not a line of a training log; remove it and run again") from None
        record.pop("steps_per_s", None)
        for name, value in record.items():
            if value is not None:
                found.setdefault((group, name), {})[step] = float(value)
    return {key: sorted(points.items()) for key, points in found.items()}


def smoothed(points: Points) -> Points:
    """Exponential mean along the points."""
    mean, out = points[0][1], []
    for step, value in points:
        mean = SMOOTH * mean + (1 - SMOOTH) * value
        out.append((step, mean))
    return out


def draw(run: Path, out: Path) -> None:
    """Draw every stage of `run` into the picture `out`.

    Raises:
        RecipeError: the folder holds no log of a training.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    logs = sorted(run.glob("*.log.jsonl"), key=lambda path: path.stat().st_mtime)
    curves = [(path.name.removesuffix(".log.jsonl"), read_log(path)) for path in logs]
    curves = [(stage, found) for stage, found in curves if found]
    if not curves:
        raise RecipeError(f"{run}: no *.log.jsonl of a training; give the --out folder of `deixis train`")
    figure, panels = pyplot.subplots(len(curves), 2, figsize=(12, 3.4 * len(curves)), squeeze=False)
    for (left, right), (stage, found) in zip(panels, curves, strict=True):
        left.set_title(f"{stage}: losses")
        right.set_title(f"{stage}: shares")
        left.set_yscale("log")
        right.set_ylim(0, 1)
        colours: dict[str, Any] = {}
        for group, name in sorted(found, key=lambda key: (key[0] != "train", key[1])):
            panel = right if name.endswith(SHARES) else left
            points = found[group, name]
            key = name.removeprefix("held_")
            style = {"linestyle": "--", "marker": "o", "markersize": 3} if group != "train" else {}
            label = name if group == "train" else f"{name} (held out)"
            line = panel.plot(
                *zip(*smoothed(points) if group == "train" else points, strict=True), label=label, **style
            )
            if key in colours:
                line[0].set_color(colours[key])
            colours.setdefault(key, line[0].get_color())
            if group == "train":
                panel.plot(*zip(*points, strict=True), color=colours[key], alpha=0.2)
        for panel in (left, right):
            panel.set_xlabel("step")
            panel.grid(alpha=0.3)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=6, ncols=2)
            else:
                panel.set_visible(False)
    figure.tight_layout()
    with replacing(out) as temporary:
        figure.savefig(temporary, dpi=75, format=out.suffix.lstrip(".") or "png")
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deixis_train.training.curves", description="Draw a run's curves.")
    parser.add_argument("run", type=Path, help="the --out folder of `deixis train`")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    options = parser.parse_args(argv)
    try:
        draw(options.run, options.out)
    except (RecipeError, OSError) as error:
        parser.exit(1, f"curves: {error}\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
