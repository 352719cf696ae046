"""Two reports side by side: ratios of what both have, and what else changed between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deixis.errors import DeixisError
from deixis_bench.bench.report import FORMAT, VERSION
from deixis_bench.bench.show import table

SAME = 0.02  # ratios this close to 1 are no difference
_HIGHER_IS_BETTER = ("tokens_per_s", "images_per_s", "share", "gflop_s", "read_gb_s")
_NEITHER = ("flop", "weight_bytes", "bytes_read", "weight_mb", "first_weight_mb", "count")


def read_report(path: Path) -> dict[str, Any]:
    """A report from its JSON. Raises DeixisError when it is none, or of a newer version."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeixisError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DeixisError(f"{path}: not JSON: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or not isinstance(report.get("metrics"), dict):
        raise DeixisError(f"{path}: not a report of 'deixis bench'")
    if report.get("version") != VERSION:
        raise DeixisError(f"{path}: report version {report.get('version')!r}; this deixis compares version {VERSION}")
    return report


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from the first report to the second.

    Returns:
        ratios: second to first, of every metric that both have and that is not 0 in the first. changed: settings,
        machine and bundle that differ, as (first, second). only_first, only_second: metrics that one lacks.
    """
    a, b = first["metrics"], second["metrics"]
    changed = {
        name: (left, right)
        for part in ("settings", "machine", "bundle", "data")
        for name, left, right in _differences(part, first.get(part), second.get(part))
    }
    return {
        "ratios": {name: b[name] / a[name] for name in a if name in b and a[name]},
        "changed": changed,
        "only_first": sorted(set(a) - set(b)),
        "only_second": sorted(set(b) - set(a)),
    }


def _differences(name: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            yield from _differences(f"{name}.{key}", first.get(key), second.get(key))
    elif first != second:
        yield name, first, second


def verdict(metric: str, ratio: float) -> str:
    """Whether the second is better, by the sense of the metric."""
    last = metric.split("/")[-1]
    if abs(ratio - 1) <= SAME or last in _NEITHER or metric.startswith("roofline/"):
        return ""
    higher = any(word in metric for word in _HIGHER_IS_BETTER)
    return "better" if (ratio > 1) == higher else "worse"


def text(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The comparison as a table of medians and single numbers; p90 and p99 stand in the JSON."""
    found = compare(first, second)
    rows = [
        [name, _short(first["metrics"][name]), _short(second["metrics"][name]), f"{ratio:.3f}", verdict(name, ratio)]
        for name, ratio in found["ratios"].items()
        if not name.endswith(("/p90", "/p99"))
    ]
    lines = table(["metric", "first", "second", "second / first", ""], rows)
    lines += [f"changed: {name}: {left!r} -> {right!r}" for name, (left, right) in found["changed"].items()]
    for which in ("first", "second"):
        if names := found[f"only_{which}"]:
            lines.append(f"only in the {which}: {', '.join(dict.fromkeys(name.split('/')[0] for name in names))}")
    if not found["ratios"]:
        lines.append("the reports have no metric in common")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
