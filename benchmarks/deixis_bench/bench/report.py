"""From runs to the report: contract of the JSON, its flat metrics, and the tables that are printed."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deixis.bundle import Bundle
from deixis_bench.bench.graph_cost import GraphCost
from deixis_bench.bench.percentiles import summary
from deixis_bench.bench.rounds import POSTPROCESS, PREPROCESS, PROMPT, PYTHON, STEP, Run, Subject
from deixis_bench.bench.settings import Settings

FORMAT, VERSION = "deixis-bench", 1
NOT_GRAPHS = (PREPROCESS, POSTPROCESS, PYTHON)


def make_stages(
    cold: Mapping[str, Run],
    warm: Mapping[str, Sequence[Run]],
    costs: Mapping[str, GraphCost],
    stored: Mapping[str, int],
    roofline: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row per stage, in the order in which requests first have it; times come from that request alone.

    cold_ms of a graph: its load and its first run, on a freshly loaded model. Shares are of the roofline, at the
    median; the bandwidth's only counts weights.
    """
    stages: dict[str, dict[str, Any]] = {}
    for task, runs in warm.items():
        taken = [run.stages() for run in runs]
        for name in dict.fromkeys(name for run in taken for name in run):
            # What is done with results differs from task to task; `encode` gives none.
            title = f"{name} {task}" if name == POSTPROCESS and name in stages and task != "encode" else name
            if title in stages:
                continue
            times = summary([value for run in taken for value in run.get(name, [])])
            stages[title] = {
                "name": title,
                "kind": "python" if name in NOT_GRAPHS else "graph",
                "request": task,
                "calls": statistics.median(len(run.get(name, [])) for run in taken),
                "cold_ms": _cold_stage(cold.get(task), name),
                "warm_ms": times,
                **_cost(name, costs, stored, roofline, times["p50"]),
            }
    order = {PREPROCESS: 0, POSTPROCESS: 2, PYTHON: 3}
    return sorted(stages.values(), key=lambda stage: order.get(stage["name"].split()[0], 1))


def _cold_stage(run: Run | None, name: str) -> float | None:
    if run is None or name not in run.stages():
        return None
    role = STEP if name == PROMPT else name
    load = 0.0 if name == STEP and run.wide else run.loads().get(role, 0.0)  # the prompt was first
    return (load + run.stages()[name][0]) * 1000


def _cost(
    name: str,
    costs: Mapping[str, GraphCost],
    stored: Mapping[str, int],
    roofline: Mapping[str, Any],
    milliseconds: float,
) -> dict[str, Any]:
    role = STEP if name == PROMPT else name
    found: dict[str, Any] = {
        "weight_bytes": stored.get(role),
        "bytes_read": None,
        "flop": None,
        "bandwidth_share": None,
        "arithmetic_share": None,
    }
    cost = costs.get(name)
    if cost is None:
        return found
    found |= {"bytes_read": cost.bytes_read, "flop": cost.flop}
    read, rate = roofline["read_gb_s"], roofline["gflop_s"]["int8" if cost.int8 else "fp32"]
    seconds = milliseconds / 1000
    if read:
        found["bandwidth_share"] = cost.bytes_read / seconds / (read * 1e9)
    if rate:
        found["arithmetic_share"] = cost.flop / seconds / (rate * 1e9)
    return found


def make_requests(subject: Subject) -> list[dict[str, Any]]:
    """A row per request. tokens_per_s and images_per_s count all rows of a batch, at the median."""
    batch = subject.settings.batch
    rows = []
    for request in subject.requests:
        runs = subject.warm[request.task]
        times = summary([run.seconds for run in runs])
        steps = [seconds for run in runs for seconds in run.per_token()]
        python = [seconds for run in runs for seconds in run.python_per_step()]
        per_token = summary(steps) if steps else None
        cold = subject.cold.get(request.task)
        rows.append(
            {
                "task": request.task,
                "from_picture": request.from_picture,
                "given_tokens": request.given,
                "new_tokens": request.tokens or None,
                "cold_ms": None if cold is None else cold.seconds * 1000,
                "warm_ms": times,
                "processor_ms": summary([run.processor for run in runs]),
                "first_token_ms": summary([r.marks[0] - r.start for r in runs]) if runs[0].marks else None,
                "per_token_ms": per_token,
                "tokens_per_s": None if per_token is None else batch * 1000 / per_token["p50"],
                "images_per_s": batch * 1000 / times["p50"] if request.from_picture else None,
                "python_us_per_step": statistics.median(python) * 1e6 if python else None,
            }
        )
    return rows


def make_energy(subject: Subject, source: str) -> dict[str, Any] | None:
    """Joules of each request, the median of its rounds; None where nothing measured them."""
    used = {task: [run.joules for run in runs if run.joules is not None] for task, runs in subject.warm.items()}
    if not any(used.values()):
        return None
    by_task = {task: statistics.median(values) for task, values in used.items() if values}
    return {"joules_per_request": by_task[subject.requests[0].task], "source": source, "by_task": by_task}


def describe_bundle(bundle: Bundle, stored: Mapping[str, int]) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "name": manifest.model.name,
        "family": manifest.model.family,
        "format": manifest.format.version,
        "precision": {role: graph.precision.weights for role, graph in manifest.graphs.items()},
        "weight_bytes": dict(stored),
        "source": manifest.provenance.source,
    }


def describe_settings(settings: Settings, device: str, threads: int) -> dict[str, Any]:
    """device, threads: what the engine uses."""
    return dataclasses.asdict(settings) | {"device": device, "threads": threads}


def flat_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Every number that two reports can be compared by, under a name that says where it stands."""
    found: dict[str, float | None] = {}
    for stage in report["stages"]:
        name = stage["name"]
        found[f"{name}/cold_ms"] = stage["cold_ms"]
        for key in ("p50", "p90", "p99"):
            found[f"{name}/warm_ms/{key}"] = stage["warm_ms"][key]
        for key in ("weight_bytes", "bytes_read", "flop", "bandwidth_share", "arithmetic_share"):
            found[f"{name}/{key}"] = stage[key]
    for row in report["requests"]:
        name = row["task"]
        found[f"{name}/cold_ms"] = row["cold_ms"]
        for times in ("warm_ms", "processor_ms", "first_token_ms", "per_token_ms"):
            for key in ("p50", "p90", "p99"):
                found[f"{name}/{times}/{key}"] = None if row[times] is None else row[times][key]
        for key in ("tokens_per_s", "images_per_s", "python_us_per_step"):
            found[f"{name}/{key}"] = row[key]
    for part in ("memory", "cold_start"):
        found |= {f"{part}/{key}": value for key, value in (report.get(part) or {}).items()}
    energy, roofline = report.get("energy"), report["roofline"]
    found["energy/joules_per_request"] = energy and energy["joules_per_request"]
    found["roofline/read_gb_s"] = roofline["read_gb_s"]
    found |= {f"roofline/gflop_s/{precision}": value for precision, value in roofline["gflop_s"].items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}
