"""The plots of a report's page, as SVG that stands in the page's text.

matplotlib knows one set of colours, a page has two: light and dark. So plots are drawn in placeholder colours, which
are then replaced by variables of the page's style sheet. Text stays text, in the page's type.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from deixis.errors import DeixisError
from deixis_bench.units import digits, percent, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

# Placeholder of each variable of the style sheet in page_style.py: colours that no plot would use.
PAINTS = {
    name: f"#0{n}0{n}0{n}" for n, name in enumerate(("ink", "muted", "grid", "graph", "python", "paper"), start=1)
}
INK, MUTED, GRID, GRAPH, PYTHON, PAPER = PAINTS.values()
KINDS = {"graph": GRAPH, "python": PYTHON}
WIDTH = 5.2  # inches: narrow enough that a phone shows the type at a readable size
LONGEST = 36  # letters of a name beside a plot; the table has the whole of it
ROW = 0.27  # inches of a row of bars or ranges
SETTINGS: Any = {  # of matplotlib, whose type of their names is its own
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may have a dollar sign
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Plot:
    """svg: an element that the page's style sheet sizes. description: what it shows, in words."""

    svg: str
    description: str


def _in_placeholders(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with SETTINGS. Raises DeixisError when matplotlib is not installed."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            import matplotlib as mpl
        except ModuleNotFoundError:
            raise DeixisError(
                'a page has plots, and matplotlib is not installed: pip install "deixis[bench]"'
            ) from None
        with mpl.rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return drawn


@_in_placeholders
def time_of_a_request(stages: Sequence[dict[str, Any]]) -> Plot | None:
    """Bars of calls x median of each stage, in the report's order; None when nothing was timed."""
    rows = [
        (stage["name"], stage["kind"], stage["calls"], stage["calls"] * stage["warm_ms"]["p50"])
        for stage in stages
        if stage["warm_ms"] and stage["calls"]
    ]
    total = sum(row[3] for row in rows)
    if not total:
        return None
    figure, axes = _panel(len(rows))
    for row, (_, kind, calls, spent) in enumerate(rows):
        axes.barh(row, spent, color=KINDS[kind], height=0.62)
        often = "" if calls == 1 else f" ({digits(spent / calls)} × {calls:g})"
        axes.annotate(
            f"{digits(spent, 'ms')}{often} · {percent(spent / total)}",
            (spent, row), xytext=(4, 0), textcoords="offset points", va="center", color=INK,
        )  # fmt: skip
    _name_rows(axes, [row[0] for row in rows])
    axes.set_xlim(0, 1.75 * max(row[3] for row in rows))  # room for the figures beside the longest bar
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    largest = sorted(rows, key=lambda row: -row[3])[:3]
    said = ", ".join(f"{name} {percent(spent / total)}" for name, _, _, spent in largest)
    return _plot(figure, "time", f"Bars: {digits(total, 'ms')} of one request by stage. The largest: {said}.")


@_in_placeholders
def roofline(stages: Sequence[dict[str, Any]], ceilings: dict[str, Any]) -> Plot | None:
    """Arithmetic per byte read against the rate reached, under the measured ceilings; None where nothing is known."""
    points = []
    for stage in stages:
        if stage["warm_ms"] and stage.get("flop") and stage.get("bytes_read"):
            rate = stage["flop"] / (stage["warm_ms"]["p50"] * 1e6)  # GFLOP/s
            points.append((stage["flop"] / stage["bytes_read"], rate, stage["name"]))
    peaks = {name: rate for name, rate in ceilings["gflop_s"].items() if rate}
    bandwidth = ceilings["read_gb_s"]
    if not points or not peaks or not bandwidth:
        return None
    figure, axes = _figure(3.9)
    low = 0.5 * min(point[0] for point in points)
    high = 2 * max(*(point[0] for point in points), *(rate / bandwidth for rate in peaks.values()))
    for rate in peaks.values():
        axes.plot([rate / bandwidth, high], [rate, rate], color=MUTED, linewidth=1.2)
    knee = max(peaks.values()) / bandwidth
    axes.plot([low, knee], [low * bandwidth, knee * bandwidth], color=MUTED, linewidth=1.2)
    for each, rate, _ in points:
        axes.plot(each, rate, marker="o", color=GRAPH, markersize=7, markeredgecolor=PAPER, zorder=3)
    floor = min(low * bandwidth, 0.4 * min(point[1] for point in points))
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, 2 * max(peaks.values())))
    axes.set_xlabel("FLOP per byte read")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title(f"slope: reading at {digits(bandwidth, 'GB/s')}", loc="left", fontsize="medium", color=MUTED)
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.grid(which="major")
    levels = [(high, rate, f"{name}: {digits(rate)}") for name, rate in peaks.items()]
    _label_in_a_column(axes, [*((*point, INK) for point in points), *((*level, MUTED) for level in levels)])
    said = "; ".join(f"{name} {digits(rate, 'GFLOP/s')} at {digits(each)} FLOP per byte" for each, rate, name in points)
    return _plot(figure, "roofline", f"Roofline on logarithmic axes. {said}.")


@_in_placeholders
def latencies(rows: Sequence[tuple[str, dict[str, Any], float | None]]) -> Plot | None:
    """Ranges from p50 to p99 of (name, percentiles in ms, cold ms or None), on a logarithmic axis."""
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    figure, axes = _panel(len(rows), extra=0.55)
    for row, (_, found, cold) in enumerate(rows):
        axes.plot([found["p50"], found["p99"]], [row, row], color=GRAPH, linewidth=2.2, solid_capstyle="butt")
        axes.plot(found["p50"], row, marker="o", color=GRAPH, markersize=7)
        axes.plot(found["p90"], row, marker="|", color=GRAPH, markersize=9, markeredgewidth=2)
        axes.plot(found["p99"], row, marker="o", color=GRAPH, markersize=6, markerfacecolor=PAPER)
        if cold is not None:
            axes.plot(cold, row, marker="D", color=MUTED, markersize=5, markerfacecolor=PAPER)
    _name_rows(axes, [row[0] for row in rows])
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_xlabel("ms")
    axes.grid(axis="x")
    said = "; ".join(
        f"{name} {digits(found['p50'])}, {digits(found['p90'])}, {digits(found['p99'])}" for name, found, _ in rows
    )
    return _plot(figure, "latency", f"Ranges of latency in ms, p50, p90 and p99: {said}.")


@_in_placeholders
def rivals(found: Sequence[dict[str, Any]]) -> Plot | None:
    """Time relative to deixis of each rival: median, and a line from least to most over the rounds."""
    rows = [rival for rival in found if rival.get("ratio_to_deixis") and rival["name"] != "deixis"]
    if not rows:
        return None
    figure, axes = _panel(len(rows), extra=0.55)
    axes.axvline(1, color=MUTED, linewidth=1.2)
    for row, rival in enumerate(rows):
        ratio = rival["ratio_to_deixis"]
        axes.plot([ratio["least"], ratio["most"]], [row, row], color=GRAPH, linewidth=2.2, solid_capstyle="butt")
        axes.plot(ratio["median"], row, marker="o", color=GRAPH, markersize=7)
        axes.annotate(
            times(ratio["median"]), (max(ratio["most"], ratio["median"]), row), xytext=(6, 0),
            textcoords="offset points", va="center", color=INK,
        )  # fmt: skip
    _name_rows(axes, [f"{rival['name']}, {rival['part']}" for rival in rows])
    most = max(rival["ratio_to_deixis"]["most"] for rival in rows)
    axes.set_xlim(0, 1.2 * max(most, 1))
    axes.set_xlabel("time over that of deixis")
    axes.grid(axis="x")
    said = "; ".join(f"{rival['name']}, {rival['part']} {times(rival['ratio_to_deixis']['median'])}" for rival in rows)
    return _plot(figure, "rivals", f"Time relative to deixis, medians: {said}.")


@_in_placeholders
def memory(found: dict[str, Any]) -> Plot | None:
    """Resident memory before loading, after the first result and at its peak, and the weights."""
    names = {
        "weight_mb": "weights loaded",
        "before_mb": "before",
        "after_first_mb": "after the first",
        "peak_mb": "peak",
    }
    rows = [(label, found[name]) for name, label in names.items() if found.get(name) is not None]
    if not rows:
        return None
    figure, axes = _panel(len(rows))
    for row, (label, size) in enumerate(rows):
        axes.barh(row, size, color=MUTED if label.startswith("weights") else GRAPH, height=0.62)
        axes.annotate(
            digits(size, "MB"), (size, row), xytext=(4, 0), textcoords="offset points", va="center", color=INK
        )
    _name_rows(axes, [label for label, _ in rows])
    axes.set_xlim(0, 1.3 * max(size for _, size in rows))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    said = ", ".join(f"{label} {digits(size, 'MB')}" for label, size in rows)
    return _plot(figure, "memory", f"Bars of memory: {said}.")


def _panel(rows: int, extra: float = 0.15) -> tuple[Figure, Axes]:
    """A figure of so many rows, and `extra` inches for an axis."""
    return _figure(ROW * rows + extra)


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _plain_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as 1, 10, 100 instead of powers; over few decades 1, 2, 5, 10 ..."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_in_a_column(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points (x, y, name, colour) right of the axes, with a line to each; names that would overlap move apart."""
    step = 0.058  # of the axes' height: a line of type
    low, high = axes.get_ylim()
    points = sorted(points, key=lambda point: point[1])
    heights: list[float] = []
    for _, rate, _, _ in points:
        wanted = math.log(rate / low) / math.log(high / low)
        heights.append(wanted if not heights else max(wanted, heights[-1] + step))
    over = max(0.0, heights[-1] - 1)
    for (each, rate, name, colour), height in zip(points, heights, strict=True):
        axes.annotate(
            _short(name), (each, rate), xytext=(1.03, height - over), textcoords="axes fraction", va="center",
            color=colour, arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4},
        )  # fmt: skip


def _plot(figure: Figure, name: str, description: str) -> Plot:
    """The figure as an element of the page; `name` keeps its ids apart from those of other plots."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # the same report gives the same page
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)  # a style here would be the whole page's
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for variable, placeholder in PAINTS.items():
        svg = svg.replace(placeholder, f"var(--{variable})")
    return Plot(svg.strip(), description)
