"""A report of `deixis bench` as one HTML page that needs nothing else: no network, no script.

The page reads on a phone and on paper, in light and in dark; every plot says in words what it shows, and its numbers
stand in the table beside it. All that comes from the report is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deixis_bench import page_plots
from deixis_bench.page_plots import Plot
from deixis_bench.page_style import STYLE
from deixis_bench.units import MISSING, digits, large, megabytes, percent, spread, times
from deixis_train.files import write_text

FORMAT, VERSION = "deixis-bench", 1
PARTS = ("metrics", "bundle", "data", "machine", "settings", "roofline", "stages", "requests", "memory", "rivals")
PROTOCOL = (
    "Each run of a graph, each piece of Python and each whole request is timed by the clock, inputs in memory.",
    "Cold is the first request of a freshly loaded model, loading included. Warm begins after warm-up rounds.",
    "What is compared runs in turn, so that a busy machine slows both; ratios are taken within a round.",
    "p50, p90 and p99 are percentiles over all warm runs; a spread is the least and the most over the rounds.",
    "The ceilings are measured beside it: reading a buffer far larger than the caches, multiplying large matrices.",
    "Rivals run in processes of their own with the same weights, inputs and threads, and their output is compared.",
)


class Text(str):
    """A cell of words: set to the left, and broken into lines."""


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report of `deixis bench` to `path`; a file there is replaced at once.

    Raises ValueError when the report is none of `deixis bench`, or has another version, and DeixisError when matplotlib
    is not installed.
    """
    write_text(path, page(report))


def page(report: dict[str, Any]) -> str:
    """The page as text; raises as `write_page`."""
    check(report)
    bundle, machine, settings = report["bundle"], report["machine"], report["settings"]
    title = f"deixis bench: {bundle['name']}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _paragraph(
            f"{machine['cpu']}, {settings['device']}, threads: {settings['threads']}, batch: {settings['batch']}; "
            f"{report['data']}",
            "muted",
        ),
        _figures(report),
        *_requests(report),
        *_stages(report),
        *_rivals(report["rivals"]),
        *_memory(report["memory"], bundle),
        *_energy(report.get("energy")),
        *_origins(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def check(report: Any) -> None:
    """Raise ValueError unless this is a report of `deixis bench` of this version."""
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError("not a report of 'deixis bench'; write one with its --json")
    if report.get("version") != VERSION:
        raise ValueError(f"a report of version {report.get('version')!r}; this deixis reads version {VERSION}")
    missing = [part for part in PARTS if part not in report]
    if missing:
        raise ValueError(f"the report lacks {', '.join(missing)}; write it again with 'deixis bench --json'")


def _figures(report: dict[str, Any]) -> str:
    """What most people look for, in large type."""
    found: list[tuple[str, str]] = []
    for request in report["requests"][:1]:
        found += [
            (f"{request['task']}, warm p50", digits(request["warm_ms"]["p50"], "ms")),
            (f"{request['task']}, cold", digits(request["cold_ms"], "ms")),
            ("first token, p50", digits(_p50(request.get("first_token_ms")), "ms")),
            ("tokens a second", digits(request.get("tokens_per_s"))),
        ]
    first = (report.get("cold_start") or {}).get("first_result_ms")
    found.append(("process start to first result", digits(first, "ms")))
    found.append(("peak memory", digits((report["memory"] or {}).get("peak_mb"), "MB")))
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in found if value != MISSING
    )
    return f'<dl class="figures">{rows}</dl>'


def _requests(report: dict[str, Any]) -> list[str]:
    requests = report["requests"]
    if not requests:
        return ["<h2>Requests</h2>", _paragraph("No whole request was run.")]
    ranges = [(request["task"], request["warm_ms"], request["cold_ms"]) for request in requests]
    for request in requests:
        for name, part in (("first token", "first_token_ms"), ("per token", "per_token_ms")):
            if request.get(part):
                ranges.append((f"{request['task']}, {name}", request[part], None))
    columns = [
        "cold",
        "p50",
        "p90",
        "p99",
        "processor",
        "first token",
        "per token",
        "tokens/s",
        "images/s",
        "Python µs per step",
    ]
    rows = [
        (
            request["task"],
            [
                digits(request["cold_ms"]),
                *_percentiles(request["warm_ms"]),
                digits(_p50(request.get("processor_ms"))),
                digits(_p50(request.get("first_token_ms"))),
                digits(_p50(request.get("per_token_ms"))),
                digits(request.get("tokens_per_s")),
                digits(request.get("images_per_s")),
                digits(request.get("python_us_per_step")),
            ],
        )
        for request in requests
    ]
    plot = page_plots.latencies(ranges)
    return [
        "<h2>Requests</h2>",
        _figure(plot, "Dot: p50; tick: p90; ring: p99; diamond: the first of a freshly loaded model."),
        _table("Whole requests in ms by the clock; processor time and tokens are medians", ["request", *columns], rows),
    ]


def _stages(report: dict[str, Any]) -> list[str]:
    stages, ceilings = report["stages"], report["roofline"]
    if report["requests"]:
        first = report["requests"][0]["task"]
        shown = [stage for stage in stages if stage.get("request", first) == first]
        told = f"Request {first}: calls times the median of each stage, and its share."
    else:
        shown, told = stages, "The median of each graph, which ran alone, and its share of their sum."
    rows = [
        (
            stage["name"],
            [
                Text(stage.get("request", MISSING)),
                f"{stage['calls']:g}",
                digits(stage["cold_ms"]),
                *_percentiles(stage["warm_ms"]),
                megabytes(stage.get("weight_bytes")),
                large(stage.get("flop"), "FLOP"),
                percent(stage.get("bandwidth_share")),
                percent(stage.get("arithmetic_share")),
            ],
        )
        for stage in stages
    ]
    columns = [
        "stage",
        Text("of request"),
        "calls",
        "cold",
        "p50",
        "p90",
        "p99",
        "weights",
        "arithmetic",
        "of bandwidth",
        "of arithmetic",
    ]
    peaks = ", ".join(f"{digits(rate, 'GFLOP/s')} in {name}" for name, rate in ceilings["gflop_s"].items() if rate)
    reached = f"Measured in the same run: reading {digits(ceilings['read_gb_s'], 'GB/s')}" + (
        f", multiplying {peaks}." if peaks else "."
    )
    return [
        "<h2>Where the time goes</h2>",
        _figure(page_plots.time_of_a_request(shown), f"{told} Blue: a graph; orange: Python."),
        _table("Stages in ms per call; shares are of what was measured on this machine", columns, rows),
        "<h2>Against the machine's ceilings</h2>",
        _paragraph(f"{reached} What lies near the slope waits for memory, what lies near a level for arithmetic."),
        _figure(page_plots.roofline(stages, ceilings), "Each graph under the ceilings; both axes are logarithmic."),
    ]


def _rivals(rivals: Sequence[dict[str, Any]]) -> list[str]:
    if not rivals:
        return ["<h2>Rivals</h2>", _paragraph("None was run; choose with --rivals.")]
    rows = []
    for rival in rivals:
        ratio = rival.get("ratio_to_deixis") or {}
        time = _p50(rival.get("ms_per_token") or rival.get("ms"))
        unit = "ms/token" if rival.get("ms_per_token") else "ms"
        same = {True: "the same", False: "DIFFERENT", None: "not compared"}[rival.get("same_output")]
        rows.append(
            (
                f"{rival['name']} {rival.get('version') or ''}".strip(),
                [
                    Text(rival["part"]),
                    digits(time, unit),
                    times(ratio.get("median")),
                    spread(ratio.get("least"), ratio.get("most")),
                    same,
                    Text(rival.get("error") or rival.get("note") or ""),
                ],
            )
        )
    columns = ["rival", Text("part"), "time", "time / deixis", "least to most", "output", Text("note")]
    return [
        "<h2>Rivals</h2>",
        _figure(
            page_plots.rivals(rivals), "Right of 1, deixis is faster. Dot: median; line: least to most over the rounds."
        ),
        _table("Same weights, same inputs, each in its own process", columns, rows),
    ]


def _memory(memory: dict[str, Any] | None, bundle: dict[str, Any]) -> list[str]:
    precision = bundle["precision"]
    graphs = [
        (role, [Text(precision.get(role, MISSING)), megabytes(size)]) for role, size in bundle["weight_bytes"].items()
    ]
    return [
        "<h2>Memory</h2>",
        _figure(page_plots.memory(memory), "Resident memory of the process, and the weights it loaded.")
        if memory
        else _paragraph("Not measured."),
        _table("Weights of the bundle's graphs", ["graph", Text("precision"), "weights"], graphs),
    ]


def _energy(energy: dict[str, Any] | None) -> list[str]:
    said = (
        "This machine reports no power, so no energy was measured."
        if energy is None
        else f"{digits(energy['joules_per_request'], 'J')} per request, from {energy['source']}."
    )
    return ["<h2>Energy</h2>", _paragraph(said)]


def _origins(report: dict[str, Any]) -> list[str]:
    bundle, machine = report["bundle"], report["machine"]
    told = {name: value for name, value in bundle.items() if name not in ("precision", "weight_bytes")}
    metrics = [(name, [f"{value:.6g}"]) for name, value in report["metrics"].items()]
    notes = [*report.get("notes", []), *report["roofline"].get("notes", [])]
    protocol = "".join(f"<li>{escape(line)}</li>" for line in PROTOCOL)
    return [
        "<h2>What was run, on what</h2>",
        f'<div class="pairs">{_pairs("Machine", machine)}{_pairs("Bundle", told)}'
        f"{_pairs('Settings', report['settings'])}</div>",
        *(_paragraph(note, "muted") for note in notes),
        "<h2>How it was measured</h2>",
        f"<ul>{protocol}</ul>",
        "<details><summary>Every figure of the report</summary>",
        _table("As --compare reads them", ["figure", "value"], metrics),
        "</details>",
    ]


def _percentiles(found: Mapping[str, float] | None) -> list[str]:
    return [digits(found.get(name) if found else None) for name in ("p50", "p90", "p99")]


def _p50(found: Mapping[str, float] | None) -> float | None:
    return found["p50"] if found else None


def _paragraph(text: str, style: str = "") -> str:
    mark = f' class="{style}"' if style else ""
    return f"<p{mark}>{escape(text)}</p>"


def _figure(plot: Plot | None, caption: str) -> str:
    if plot is None:
        return _paragraph("Nothing to plot: this was not measured.", "muted")
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.description)}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _pairs(caption: str, values: Mapping[str, Any]) -> str:
    """A table of names and values; a mapping inside is named `outer: inner`."""
    flat = {
        name: value
        for outer, inner in values.items()
        for name, value in (
            [(f"{outer}: {key}", each) for key, each in inner.items()]
            if isinstance(inner, Mapping)
            else [(outer, inner)]
        )
    }
    return _table(caption, ["", Text("")], [(name, [Text(value)]) for name, value in flat.items()])


def _table(caption: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls sideways where it is too wide. columns: the first names the rows."""
    head = "".join(f'<th scope="col"{_style(name, first=n == 0)}>{escape(name)}</th>' for n, name in enumerate(columns))
    body = "\n".join(
        f'<tr><th scope="row" class="text">{escape(name)}</th>'
        + "".join(f"<td{_style(cell)}>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    label = escape(caption)
    header = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption><span>{label}</span></caption>\n{header}\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _style(cell: str, first: bool = False) -> str:
    return ' class="text"' if first or isinstance(cell, Text) else ""
