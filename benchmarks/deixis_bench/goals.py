"""What deixis is meant to reach, and where in the campaign's reports it stands whether it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Reports of the campaign, by name: the command that writes benchmarks/results/NAME.json, as `make bench` runs it. One
# is the manifest of the shipped bundle, which holds the evidence for its precisions.
TABLETOP = "bench-tabletop"
TEXT, LLAMA, ENCODER = "rivals-text", "rivals-llama", "rivals-encoder"
STEP, SERVING, SOAK, PRECISION = "decoder-step", "serving", "soak", "models/tabletop/manifest.json"
COMMANDS = {
    TABLETOP: "deixis bench models/tabletop --threads 2 --rounds 20",
    TEXT: "python -m deixis_bench.rivals --part text",
    LLAMA: "python -m deixis_bench.rivals --part llama",
    ENCODER: "python -m deixis_bench.rivals --part encoder",
    STEP: "python -m deixis_bench.decoder_step",
    SERVING: "python -m deixis_bench.serving models/tabletop",
    SOAK: "python -m deixis_bench.soak models/tabletop",
    PRECISION: "deixis export models/tabletop-checkpoint --precision auto",
}


@dataclass(frozen=True)
class Reached:
    """value: the median over the rounds. least, most: over the rounds; None where there is only one value."""

    value: float
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Goal:
    """limit: `value` has to be at least (at_most: at most) this. unit: "x" of a ratio, "%" of a share, else as written.
    read: takes it from the report's JSON; None when that has not measured it.
    """

    about: str
    name: str
    limit: float
    unit: str
    report: str
    read: Callable[[Mapping[str, Any]], Reached | None]
    at_most: bool = False

    def met(self, found: Reached) -> bool:
        return found.value <= self.limit if self.at_most else found.value >= self.limit


def figure(name: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], Reached | None]:
    """A flat metric: `name` or `name/median`, with `name/least` and `name/most` where there are rounds."""

    def read(report: Mapping[str, Any]) -> Reached | None:
        metrics = report["metrics"]
        value = metrics.get(name, metrics.get(f"{name}/median"))
        if value is None:
            return None
        ends = [metrics.get(f"{name}/{end}") for end in ("least", "most")]
        return Reached(scale * value, *(None if end is None else scale * end for end in ends))

    return read


def against(rival: str, part: str) -> Callable[[Mapping[str, Any]], Reached | None]:
    """Time of a rival over ours, from a campaign of rivals. part: with the rival's precision, as "text int8"."""

    def read(report: Mapping[str, Any]) -> Reached | None:
        for row in report["rivals"]:
            if (row["name"], row["part"]) == (rival, part) and row["ratio_to_deixis"]:
                ratio = row["ratio_to_deixis"]
                return Reached(ratio["median"], ratio["least"], ratio["most"])
        return None

    return read


def best_of(rivals: tuple[str, ...], part: str) -> Callable[[Mapping[str, Any]], Reached | None]:
    """Time of the fastest of some rivals over ours; None unless all of them were measured."""

    def read(report: Mapping[str, Any]) -> Reached | None:
        found = [against(rival, part)(report) for rival in rivals]
        ratios = [each for each in found if each is not None]
        return min(ratios, key=lambda each: each.value) if len(ratios) == len(rivals) else None

    return read


def memory_over_bound(report: Mapping[str, Any]) -> Reached | None:
    """Resident memory over 1.6 x the weights loaded by then + 200 MB: after the first result, or after all tasks, of
    which the larger counts.
    """
    memory = report["memory"] or {}
    moments = (("after_first_mb", "first_weight_mb"), ("after_all_mb", "weight_mb"))
    ratios = [
        memory[resident] / (1.6 * memory[weights] + 200)
        for resident, weights in moments
        if memory.get(resident) is not None and memory.get(weights)
    ]
    return Reached(max(ratios)) if ratios else None


def most_lost(manifest: Mapping[str, Any]) -> Reached | None:
    """Points that the metric lost which lost most, of a bundle whose precisions a search chose; of a metric above 1
    (CIDEr), hundredths of its value.
    """
    evidence = manifest.get("precision_search")
    if not evidence or not evidence["chosen"]:
        return None
    fp32, chosen = evidence["fp32"], evidence["chosen"]
    return Reached(max(100 * (fp32[name] - value) / max(1, fp32[name]) for name, value in chosen.items()))


_STEP = "Decoder step, T5-small shape, batch 1"
_ENCODER = "Image encoder"
_PROMPTS = "Prompts on a scene"
_START = "Start and memory"
_QUALITY = "Precision and long runs"

GOALS = (
    Goal(_STEP, "fp32 against CTranslate2 fp32", 1.3, "x", TEXT, against("ctranslate2", "text fp32")),
    Goal(_STEP, "fp32, share of the measured bandwidth", 90, "%", STEP, figure("fp32/bandwidth_share", 100)),
    Goal(_STEP, "8-bit against CTranslate2 int8", 2.5, "x", TEXT, against("ctranslate2", "text int8")),
    Goal(_STEP, "8-bit, share of the measured bandwidth", 75, "%", STEP, figure("w8/bandwidth_share", 100)),
    Goal(_STEP, "4-bit against 8-bit", 1.0, "x", STEP, figure("w4/faster_than_w8")),
    Goal(_STEP, "fp32, time at length 900 over length 10", 1.3, "x", STEP, figure("fp32/long_over_short"), True),
    Goal(_STEP, "8-bit, time at length 900 over length 10", 1.7, "x", STEP, figure("w8/long_over_short"), True),
    Goal(_STEP, "Python around a greedy step (the demo's)", 100, "µs", TABLETOP,
         figure("caption_again/python_us_per_step"), True),
    Goal(_ENCODER, "int8 against PyTorch fp32", 2.5, "x", ENCODER, against("torch", "encoder fp32")),
    Goal(
        _ENCODER, "int8 against the best of onnxruntime and OpenVINO in int8", 1.0, "x", ENCODER,
        best_of(("onnxruntime", "openvino"), "encoder int8"),
    ),
    Goal(_PROMPTS, "second prompt: runs of image encoders", 0, "", SERVING, figure("second_prompt/encoder_runs"), True),
    Goal(_PROMPTS, "second prompt: first word sooner", 5, "x", SERVING, figure("second_prompt/first_word_ratio")),
    Goal(_PROMPTS, "eight captions batched against one by one, fp32", 3, "x", SERVING, figure("batch8/fp32/ratio")),
    Goal(_PROMPTS, "eight captions batched against one by one, 8-bit", 2, "x", SERVING, figure("batch8/w8/ratio")),
    Goal(_PROMPTS, "beam 3 over greedy, time", 1.8, "x", SERVING, figure("beam3/ratio"), True),
    Goal(_START, "demo bundle, process start to first result", 1.5, "s", TABLETOP,
         figure("cold_start/first_result_ms", 1e-3), True),
    Goal(_START, "resident memory over 1.6 × loaded weights + 200 MB", 1, "x", TABLETOP, memory_over_bound, True),
    Goal(_START, "graphs loaded that the first result does not use", 0, "", SERVING, figure("unused_graphs"), True),
    Goal(_QUALITY, "`--precision auto`: most that a metric lost", 0.5, "points", PRECISION, most_lost, True),
    Goal(_QUALITY, "memory over 1,000 mixed requests, growth", 1, "%", SOAK, figure("growth", 100), True),
)  # fmt: skip
