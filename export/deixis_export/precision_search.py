"""`--precision auto`: for every graph the fastest precision that stays as good as fp32, measured and not hoped for.

Every candidate of every graph is exported and run: candidates that drift, or are not faster, are out. With data, the
fastest that are left are asked the questions of `deixis eval`, graph by graph and then together; what loses more than
half a point is taken back. Without data, drift on the example requests alone decides, by a narrower limit.
"""

from __future__ import annotations

import logging
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from deixis.bundle import PrecisionSearch, PrecisionTrial
from deixis.errors import ExportError
from deixis_export.bundle_parts import TEXT_GRAPHS, ExportOptions
from deixis_export.export import DRIFT_TOLERANCE
from deixis_export.quality import Judge, lost, points
from deixis_export.variants import Variants
from deixis_export.weights import PrecisionName

log = logging.getLogger(__name__)

# Without data a graph may be this far from fp32, relative to the largest value.
DRIFT_LIMIT = 0.05
# A precision that takes more than this part of the time of fp32 or fp16 is not worth its rounding; fp16 is taken.
WORTHWHILE = 0.95
CHOSEN = "chosen"


@dataclass(frozen=True)
class SearchSettings:
    """judge: asks candidates about data; None: drift decides. four_bits: try w4 too. rounds, threads: of timed runs."""

    judge: Judge | None = None
    four_bits: bool = False
    rounds: int = 7
    threads: int = 0


@dataclass
class _Tried:
    """A candidate of a graph while the search runs."""

    precision: PrecisionName
    drift: float
    time: float | None = None
    points: dict[str, float] = field(default_factory=dict)
    verdict: str = ""

    def trial(self) -> PrecisionTrial:
        drift = self.drift if math.isfinite(self.drift) else None
        return PrecisionTrial(self.precision, drift, self.time, self.points, self.verdict)


def search_precisions(
    model: nn.Module,
    folder: Path,
    *,
    tokenizer_json: str,
    options: ExportOptions,
    tasks: Mapping[str, Mapping[str, Any]],
    settings: SearchSettings,
) -> tuple[dict[str, PrecisionName], PrecisionSearch]:
    """Choose a precision for every graph.

    Args:
        model: in float32; it is changed as by `export_bundle`.
        folder: empty, for the candidates; on one file system.
        tokenizer_json, tasks: as `export_bundle`.
        options: `seed`; the precision of graphs in `precision_of` is taken as it is.
        settings: see there.

    Returns:
        Precisions by role, and the evidence.

    Raises:
        ExportError: a graph cannot be exported, or candidates cannot be measured.
    """
    with Variants(model, folder, options.seed) as variants:
        search = _Search(variants, settings, options.precision_of, tokenizer_json, tasks)
        return search.run()


class _Search:
    def __init__(
        self,
        variants: Variants,
        settings: SearchSettings,
        fixed: Mapping[str, PrecisionName],
        tokenizer_json: str,
        tasks: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._variants, self._settings, self._fixed = variants, settings, dict(fixed)
        for role in [role for role, precision in fixed.items() if precision == "fp32"]:
            for companion in variants.companions(role):
                self._fixed.setdefault(companion, "fp32")
        self._tokenizer_json, self._tasks = tokenizer_json, tasks
        self._tried: dict[str, list[_Tried]] = {}
        self._fp32: dict[str, float] = {}

    def run(self) -> tuple[dict[str, PrecisionName], PrecisionSearch]:
        roles = list(self._variants.specs)
        for role in roles:
            self._tried[role] = [] if role in self._fixed else self._try(role)
        metrics: dict[str, float] = {}
        if self._settings.judge is not None:
            self._fp32 = self._measure({})
            for role in roles:
                self._ask_alone(role)
            metrics = self._together()
        for role in roles:
            for tried in self._tried[role]:
                if not tried.verdict:
                    tried.verdict = CHOSEN if tried.precision == self._chosen(role) else "slower than the chosen one"
        evidence = PrecisionSearch(
            judged_by="drift" if self._settings.judge is None else str(self._settings.judge),
            machine=_machine(self._settings.threads),
            trials={role: tuple(tried.trial() for tried in self._tried[role]) for role in roles if self._tried[role]},
            fp32=self._fp32,
            chosen=metrics,
        )
        return {role: self._chosen(role) for role in roles}, evidence

    def _try(self, role: str) -> list[_Tried]:
        """Export a graph's candidates, and time those that do not drift; fastest first, fp16 behind them."""
        names: list[PrecisionName] = ["int8", "fp16"]
        if role in TEXT_GRAPHS:
            names.append("w8")
            if self._settings.four_bits:
                names.append("w4")
        tried = [_Tried(name, self._variants.get(role, name).drift) for name in names]
        usual = next(one.drift for one in tried if one.precision == "fp16")
        for one in tried:
            if one.precision != "fp16" and one.drift == usual:
                one.verdict = "has no matrices to lower"  # the same graph as fp16
                continue
            limit = DRIFT_TOLERANCE[one.precision]
            if self._settings.judge is None:
                limit = min(limit, DRIFT_LIMIT)
            if not one.drift <= limit:
                one.verdict = f"drifts by more than {limit:g}"
        left = [one for one in tried if not one.verdict]
        times = self._variants.times(
            role, [one.precision for one in left], self._settings.rounds, self._settings.threads
        )
        for one in left:
            one.time = round(times[one.precision], 3)
            if one.precision != "fp16" and one.time > WORTHWHILE * min(1.0, times.get("fp16", 1.0)):
                one.verdict = "not faster than fp32 or fp16"
            log.info("%s %s: drift %.1e, %.2f of fp32's time", role, one.precision, one.drift, one.time)
        return sorted(tried, key=lambda one: (one.precision == "fp16", one.time or math.inf))

    def _candidates(self, role: str) -> list[_Tried]:
        """What is not out yet, best first."""
        return [one for one in self._tried[role] if not one.verdict]

    def _chosen(self, role: str) -> PrecisionName:
        if role in self._fixed:
            return self._fixed[role]
        left = [one for one in self._tried[role] if one.verdict in ("", CHOSEN)]
        return left[0].precision if left else "fp32"

    def _measure(self, lowered: Mapping[str, PrecisionName]) -> dict[str, float]:
        """Metrics of the bundle with some graphs lowered and the others in fp32."""
        judge = self._settings.judge
        assert judge is not None
        chosen: dict[str, PrecisionName] = {role: lowered.get(role, "fp32") for role in self._variants.specs}
        with self._variants.bundle(chosen, self._tokenizer_json, self._tasks) as bundle:
            metrics = judge.measure(bundle.path, bundle.manifest)
        log.info("%s: %s", lowered or "fp32", ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        return metrics

    def _ask_alone(self, role: str) -> None:
        """Take out what loses too much with this graph alone lowered, until one does not."""
        for one in self._candidates(role):
            if one.precision == "fp16":
                return  # as good as fp32 but for its rounding, which the whole bundle shows
            alone: dict[str, PrecisionName] = {role: one.precision}
            metrics = self._measure(alone)
            one.points = points(metrics, self._fp32)
            worse = lost(metrics, self._fp32)
            if not worse:
                return
            one.verdict = "alone it loses " + _listed(worse)

    def _together(self) -> dict[str, float]:
        """Measure what is chosen; while that loses too much, take back the graph that lost most alone."""
        while True:
            chosen: dict[str, PrecisionName] = {role: self._chosen(role) for role in self._variants.specs}
            metrics = self._measure(chosen)
            worse = lost(metrics, self._fp32)
            if not worse:
                return metrics
            lowest = [role for role in chosen if role not in self._fixed and chosen[role] != "fp32"]
            if not lowest:
                raise ExportError(
                    f"with {_listed_precisions(self._fixed)} the model loses {_listed(worse)} against fp32; "
                    "choose other precisions for these graphs"
                )
            rounded = [role for role in lowest if chosen[role] != "fp16"]
            role = min(rounded or lowest, key=lambda r: self._harm(r, worse))
            # Weights that two graphs hold are rounded in both, or in none.
            for companion in self._variants.companions(role) if chosen[role] == "fp16" else {role}:
                for one in self._candidates(companion)[:1]:
                    one.verdict = "together with the others it loses " + _listed(worse)

    def _harm(self, role: str, worse: Mapping[str, float]) -> float:
        """Change of the metrics in question with this graph alone lowered, in points."""
        return sum(self._candidates(role)[0].points.get(name, 0.0) for name in worse)


def _listed(worse: Mapping[str, float]) -> str:
    return ", ".join(f"{-change:.1f} points of {name}" for name, change in worse.items())


def _listed_precisions(precisions: Mapping[str, str]) -> str:
    return ", ".join(f"{role} in {name}" for role, name in precisions.items()) or "every graph in fp32"


def _machine(threads: int) -> str:
    count = f"{threads} threads" if threads else "onnxruntime's own number of threads"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {count}"


def table(evidence: PrecisionSearch) -> list[str]:
    """Lines that tell a user what was tried."""
    lines = []
    for role, trials in evidence.trials.items():
        for trial in trials:
            drift = "not finite" if trial.drift is None else f"{trial.drift:.1e}"
            taken = "" if trial.time is None else f"{trial.time:.2f} of fp32's time"
            change = ", ".join(f"{name} {value:+.1f}" for name, value in trial.points.items())
            lines.append(
                f"{role:<18} {trial.precision:<5} drift {drift:<10} {taken:<22} {trial.verdict}  {change}".rstrip()
            )
    for name, value in evidence.chosen.items():
        lines.append(f"{name:<24} fp32 {evidence.fp32.get(name, value):.4f}, chosen {value:.4f}")
    return lines
