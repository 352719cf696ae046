"""The tables that documents show, each made of reports: `TABLES` by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deixis_bench.goals import COMMANDS, GOALS, Goal, Reached
from deixis_bench.units import MISSING, digits, megabytes, percent, spread, times

Get = Callable[[str], dict[str, Any] | None]
Maker = Callable[[Get, Sequence[str]], str]
Row = Sequence[str]


def goals(get: Get, used: Sequence[str]) -> str:
    """Every goal, what was reached, and whether that is enough; then where it was measured, and by which command."""
    if used:
        raise ValueError("the goals name their reports themselves")
    rows, about = [], ""
    for goal in GOALS:
        report = get(goal.report)
        found = None if report is None else goal.read(report)
        name = goal.name if goal.about == about else f"**{goal.about}**<br>{goal.name}"
        about = goal.about
        sign = "≤" if goal.at_most else "≥"
        rows.append((name, f"{sign} {_wanted(goal)}", *_reached(goal, found), f"`{goal.report}`"))
    table = _table(("goal", "wanted", "reached", "least to most", "met", "report"), rows, left=(0, 5))
    written = [(name, report) for name in COMMANDS if (report := get(name)) is not None]
    lines = [f"- `{name}`: `{COMMANDS[name]}`; {_machine(report)}" for name, report in written]
    missing = [f"- `{name}`: not written yet; `{COMMANDS[name]}` does" for name in COMMANDS if get(name) is None]
    lines += missing
    return "\n".join([table, "", *lines])


def _reached(goal: Goal, found: Reached | None) -> tuple[str, str, str]:
    if found is None:
        return "not measured", "", ""
    ends = MISSING if found.least is None else spread(found.least, found.most)
    return _number(found.value, goal.unit), ends, "yes" if goal.met(found) else "**no**"


def _wanted(goal: Goal) -> str:
    unit = {"x": "×", "": ""}.get(goal.unit, f"\N{NO-BREAK SPACE}{goal.unit}")
    return f"{goal.limit:g}{unit}"


def _number(value: float, unit: str) -> str:
    if unit == "x":
        return times(value)
    return f"{value:g}" if not unit else digits(value, unit)


def stages(report: dict[str, Any]) -> str:
    """Each stage's calls in its request, its time, and what share of the machine's ceilings that is."""
    rows = [
        (
            f"`{stage['name']}`",
            f"`{stage['request']}`" if stage.get("request") else MISSING,
            f"{stage['calls']:g}",
            digits(stage["cold_ms"]),
            *_percentiles(stage["warm_ms"]),
            megabytes(stage["weight_bytes"]),
            percent(stage["bandwidth_share"]),
            percent(stage["arithmetic_share"]),
        )
        for stage in report["stages"]
    ]
    columns = (
        "stage",
        "of request",
        "calls",
        "cold ms",
        "p50",
        "p90",
        "p99",
        "weights",
        "of bandwidth",
        "of arithmetic",
    )
    return _table(columns, rows, left=(0, 1)) + _origin(report)


def roofline(report: dict[str, Any]) -> str:
    """What stands between each graph and the machine's ceiling: the time it would take there, and what is above it."""
    rows = []
    for stage in report["stages"]:
        shares = {"memory": stage["bandwidth_share"], "arithmetic": stage["arithmetic_share"]}
        known = {name: share for name, share in shares.items() if share is not None}
        if not known or not stage["warm_ms"]:
            continue
        limit = max(known, key=lambda name: known[name])
        taken = stage["warm_ms"]["p50"]
        least = taken * known[limit]
        above = stage["calls"] * max(0.0, taken - least)  # what lies in a cache beats the ceiling of memory
        rows.append((f"`{stage['name']}`", digits(taken), limit, digits(least), percent(known[limit]), digits(above)))
    if not rows:
        return "No graph's share of the machine's ceilings was measured." + _origin(report)
    columns = ("graph", "ms per call", "nearest ceiling", "ms there", "reached", "above it, ms per request")
    return _table(columns, rows, left=(0, 2)) + _origin(report)


def requests(report: dict[str, Any]) -> str:
    """Whole requests: cold, warm, tokens, and the Python around a step."""
    rows = [
        (
            f"`{request['task']}`",
            digits(request["cold_ms"]),
            *_percentiles(request["warm_ms"]),
            digits(_p50(request.get("processor_ms"))),
            digits(_p50(request["first_token_ms"])),
            digits(_p50(request["per_token_ms"])),
            digits(request["tokens_per_s"]),
            digits(request["images_per_s"]),
            digits(request["python_us_per_step"]),
        )
        for request in report["requests"]
    ]
    columns = (
        "request", "cold ms", "p50", "p90", "p99", "processor", "first token", "per token", "tokens/s",
        "images/s", "Python µs/step",
    )  # fmt: skip
    return _table(columns, rows) + _origin(report)


def memory(report: dict[str, Any]) -> str:
    """Resident memory of a fresh process, and the weights it loaded."""
    names = {
        "before_mb": "before the bundle is opened",
        "after_first_mb": "after the first result",
        "peak_mb": "at most",
        "weight_mb": "weights loaded",
    }
    found = report["memory"] or {}
    return _table(("memory", "MB"), [(name, digits(found.get(key))) for key, name in names.items()]) + _origin(report)


def rivals(report: dict[str, Any]) -> str:
    """Each rival's time, and that over ours with its spread over the rounds."""
    rows = []
    for rival in report["rivals"]:
        ratio = rival["ratio_to_deixis"] or {}
        found = rival.get("ms_per_token") or rival.get("ms")
        if found is None:
            rows.append((_rival(rival), rival["part"], "not measured", "", "", "", rival.get("error") or rival["note"]))
            continue
        same = {True: "the same", False: "**different**", None: "not exact"}[rival["same_output"]]
        ends = spread(ratio.get("least"), ratio.get("most"))
        rows.append(
            (
                _rival(rival), rival["part"], digits(found["p50"]), times(ratio.get("median")), ends, same,
                rival["note"] or "",
            )
        )  # fmt: skip
    per = "ms per token" if any(rival.get("ms_per_token") for rival in report["rivals"]) else "ms"
    columns = ("who", "part", per, "time over ours", "least to most", "output", "note")
    return _table(columns, rows, left=(0, 1, 5, 6)) + _origin(report)


def _rival(rival: Mapping[str, Any]) -> str:
    return f"{rival['name']} {rival['version'] or ''}".strip()


def precision(manifest: dict[str, Any]) -> str:
    """What a search for precisions tried on each graph, and the metrics of what it chose."""
    evidence = manifest.get("precision_search")
    if not evidence:
        return "The bundle's precisions were not chosen by a search."
    rows = [
        (
            f"`{role}`",
            f"{trial['precision']}",
            "not finite" if trial["drift"] is None else f"{trial['drift']:.1e}",
            MISSING if trial["time"] is None else f"{trial['time']:.2f}",
            trial["verdict"],
        )
        for role, trials in evidence["trials"].items()
        for trial in trials
    ]
    table = _table(("graph", "precision", "drift", "time over fp32", "verdict"), rows, left=(0, 1, 4))
    if evidence["chosen"]:
        metrics = [
            (name, f"{evidence['fp32'][name]:.4f}", f"{value:.4f}") for name, value in evidence["chosen"].items()
        ]
        table += "\n\n" + _table(("metric", "fp32", "chosen"), metrics)
    return f"{table}\n\nMeasured on {_machine(manifest)}."


def answer_length(report: dict[str, Any]) -> list[Row]:
    """Rows of one report of `answer_length`; processor time."""
    rows = []
    for row in report["metrics"]["lengths"]:
        found = row["processor"]
        ratio = f"**{found['ratio']:.1f}** ({found['ratio_least']:.1f} to {found['ratio_most']:.1f})"
        seconds = f"{found['cached_s']:.2f} s", f"{found['uncached_s']:.1f} s"
        name = f"`{report['bundle']['name']}`"
        rows.append((name, str(row["new_tokens"]), *seconds, ratio, f"{found['ratio_with_masks']:.1f}"))
    return rows


def answer_lengths(get: Get, used: Sequence[str]) -> str:
    """Answers of given lengths, cached and uncached; any number of reports."""
    rows = [row for name in used for row in answer_length(_needed(get, name))]
    return _table(("sizes", "new tokens", "cached", "uncached", "ratio", "with masks"), rows)


def _of_one(make: Callable[[dict[str, Any]], str]) -> Maker:
    """A table of one report, or the line that it was not measured yet."""

    def made(get: Get, used: Sequence[str]) -> str:
        if len(used) != 1:
            raise ValueError("name one report")
        report = get(used[0])
        if report is None:
            return f"Not measured yet: `make bench` writes the report `{used[0]}`."
        return make(report)

    return made


def _needed(get: Get, name: str) -> dict[str, Any]:
    report = get(name)
    if report is None:
        raise ValueError(f"there is no benchmarks/results/{name}.json")
    return report


TABLES: dict[str, Maker] = {
    "goals": goals,
    "stages": _of_one(stages),
    "roofline": _of_one(roofline),
    "requests": _of_one(requests),
    "memory": _of_one(memory),
    "rivals": _of_one(rivals),
    "precision": _of_one(precision),
    "answer_length": answer_lengths,
}


def _percentiles(found: Mapping[str, float] | None) -> list[str]:
    return [digits(found.get(name) if found else None) for name in ("p50", "p90", "p99")]


def _p50(found: Mapping[str, float] | None) -> float | None:
    return None if found is None else found["p50"]


def _origin(report: Mapping[str, Any]) -> str:
    """A line below a table: what was measured, on what."""
    settings = report.get("settings", {})
    threads = f", threads: {settings['threads']}" if settings.get("threads") else ""
    rounds = f", rounds: {settings['rounds']}" if settings.get("rounds") else ""
    return f"\n\nMeasured on {_machine(report)}{threads}{rounds}."


def _machine(report: Mapping[str, Any]) -> str:
    if "machine" not in report:  # a bundle's manifest
        evidence = report.get("precision_search")
        return "no search was made" if evidence is None else f"{evidence['machine']}, judged by {evidence['judged_by']}"
    machine = report["machine"]
    name = machine.get("cpu") or machine.get("processor") or "an unnamed processor"
    return f"{name}, {machine['cores']} cores"


def _table(columns: Row, rows: Iterable[Row], left: Sequence[int] = (0,)) -> str:
    """A markdown table; columns in `left` are words, the others figures."""
    rule = ("---" if n in left else "---:" for n in range(len(columns)))
    lines = [columns, tuple(rule), *(tuple(_cell(cell) for cell in row) for row in rows)]
    return "\n".join(
        "|" + "|".join(line) + "|" if n == 1 else "| " + " | ".join(line) + " |" for n, line in enumerate(lines)
    )


def _cell(text: str) -> str:
    """A cell in one line, in which nothing ends the cell."""
    return " ".join(text.replace("|", "\\|").splitlines())
