"""A report as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TIMES = ("cold ms", "p50", "p90", "p99")
STAGES = ("stage", "runs", *TIMES, "weights MB", "read MB", "GFLOP", "bandwidth", "arithmetic")
REQUESTS = ("request", *TIMES, "processor", "first token", "per token", "tokens/s", "pictures/s", "Python us/step")


def text(report: Mapping[str, Any]) -> str:
    """Everything of a report that a person compares, as tables."""
    bundle, settings, machine = report["bundle"], report["settings"], report["machine"]
    lines = [
        f"{bundle['name']} ({bundle['family']}, {', '.join(sorted(set(bundle['precision'].values())))}): "
        f"{settings['device']}, {settings['threads']} threads, batch {settings['batch']}, "
        f"{settings['new_tokens']} new tokens, {settings['rounds']} rounds",
        f"{machine['cpu']}, {machine['cores']} cores; load {machine['load']}",
        _roofline(report["roofline"]),
        "",
    ]
    lines += table(STAGES, [_stage(stage) for stage in report["stages"]])
    if report["requests"]:
        lines += ["", *table(REQUESTS, [_request(row) for row in report["requests"]])]
    lines += ["", *_rest(report)]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    ]


def number(value: float | None, scale: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value / scale:.{digits}f}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _roofline(limits: Mapping[str, Any]) -> str:
    rates = limits["gflop_s"]
    return (
        f"roofline, {limits['threads']} threads: reads {number(limits['read_gb_s'], digits=1)} GB/s; multiplies "
        f"{number(rates['fp32'], digits=0)} Gflop/s fp32, {number(rates['int8'], digits=0)} int8"
    )


def _stage(stage: Mapping[str, Any]) -> list[str]:
    warm = stage["warm_ms"]
    return [
        stage["name"],
        f"{stage['calls']:g}",
        number(stage["cold_ms"]),
        *(number(warm[p]) for p in ("p50", "p90", "p99")),
        number(stage["weight_bytes"], 1e6),
        number(stage["bytes_read"], 1e6),
        number(stage["flop"], 1e9, 3),
        share(stage["bandwidth_share"]),
        share(stage["arithmetic_share"]),
    ]


def _request(row: Mapping[str, Any]) -> list[str]:
    first, each = row["first_token_ms"], row["per_token_ms"]
    return [
        row["task"],
        number(row["cold_ms"]),
        *(number(row["warm_ms"][p]) for p in ("p50", "p90", "p99")),
        number(row["processor_ms"]["p50"]),
        number(first and first["p50"]),
        number(each and each["p50"], digits=3),
        number(row["tokens_per_s"], digits=1),
        number(row["images_per_s"]),
        number(row["python_us_per_step"], digits=0),
    ]


def _rest(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if start := report["cold_start"]:
        lines.append(
            f"fresh process: first result after {start['first_result_ms']:.0f} ms (import {start['import_ms']:.0f}, "
            f"load {start['load_ms']:.0f}); median of {start['count']}"
        )
    if memory := report["memory"]:
        lines.append(
            f"memory: {number(memory['before_mb'], digits=0)} MB before, {number(memory['after_first_mb'], digits=0)} "
            f"after the first result (weights {memory['first_weight_mb']:.0f}), "
            f"at most {number(memory['peak_mb'], digits=0)} (all weights {memory['weight_mb']:.0f})"
        )
    if energy := report["energy"]:
        lines.append(f"energy: {energy['joules_per_request']:.3f} J a request ({energy['source']})")
    for rival in report["rivals"]:
        if rival.get("error"):
            lines.append(f"rival {rival['name']} ({rival['part']}): not measured: {rival['error']}")
            continue
        times = rival.get("ms_per_token") or rival.get("ms") or {}
        ratio = rival.get("ratio_to_deixis") or {}
        lines.append(
            f"rival {rival['name']} ({rival['part']}): {number(times.get('p50'))} ms, "
            f"{number(ratio.get('median'))} times deixis; same output: {rival.get('same_output')}"
            + (f"; {rival['note']}" if rival.get("note") else "")
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return lines
