"""What a token of a caption costs at Flan-T5-small's size, by precision, length, beams and batch.

python -m deixis_bench.decoder_step --threads 2 --json FILE

Bundles with the weights of the rivals' text part are made once, in a folder that is kept, and run in turn in this
process: each round measures everything of every precision, and the memory's bandwidth, so ratios are of neighbours in
time. All of it is the runtime's own search and caches; no image encoder runs.

Of every precision: `greedy` is 64 tokens from an empty cache. `length` is 16 tokens behind 10 and behind 900 that the
cache holds. `beams` is a beam search with 3 beams, against greedy of as many steps. `batch` is 8 prompts together
against one by one, 32 tokens each. Bytes are those of the weights that a step multiplies with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.caches import CrossCache, SelfCache, StepDecoder
from deixis.decoding import Decoder, DecodeRules, Top, beam_search, greedy_steps
from deixis.errors import DeixisError
from deixis.pipeline import Pipeline
from deixis_bench.bench.graph_cost import cost_of
from deixis_bench.bench.machine import describe
from deixis_bench.bench.ort_probe import ProbeError
from deixis_bench.bench.roofline import buffer_bytes, read_rates
from deixis_bench.report import write_report
from deixis_bench.rivals.campaign import ensure_weights
from deixis_bench.rivals.contract import RivalError, Spec
from deixis_bench.rivals.make_bundle import bundle_of

PRECISIONS = ("fp32", "w8", "w4")
GREEDY, NEAR, FAR, AT_LENGTH, BEAMS, PROMPTS, BATCHED = 64, 10, 900, 16, 3, 8, 32
CAPACITY = 1024
Ids = NDArray[np.int64]


@dataclass
class Counted:
    """A decoder whose steps are counted."""

    decoder: Decoder
    steps: int = 0

    def step(self, ids: Ids, banned: Ids | None = None) -> tuple[Top, NDArray[np.float32]]:
        self.steps += 1
        return self.decoder.step(ids, banned)

    def reorder(self, rows: Ids) -> None:
        self.decoder.reorder(rows)


@dataclass
class Subject:
    """One precision: its model, the prompts it continues, and caches that are filled up to the lengths."""

    name: str
    pipeline: Pipeline
    weight_bytes: int
    cross: CrossCache
    crosses: CrossCache
    at: dict[int, StepDecoder] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)  # seconds a step, by what was measured

    @classmethod
    def of(cls, name: str, pipeline: Pipeline, prompt: Sequence[int]) -> Subject:
        width = pipeline.manifest.graphs["text_encoder"].inputs["visual_prefix"].shape[-1]
        random = np.random.default_rng(0)
        prefix = random.standard_normal((PROMPTS, 1, int(width))).astype(np.float32)
        contexts = [list(np.roll(prompt[1:], row)) for row in range(PROMPTS)]
        every = pipeline.cross(prefix, contexts)
        alone = _row(every, 0)
        subject = cls(name, pipeline, _bytes_read(pipeline, alone), alone, every)
        for length in (NEAR, FAR):
            decoder = pipeline.decoder(subject.cross, 1, CAPACITY + 1)
            for token in random.integers(3, pipeline.manifest.tokenizer.vocab_size, length):
                decoder.step(np.array([token]))
            subject.at[length] = decoder
        return subject

    def note(self, what: str, measure: Callable[[], tuple[float, int]]) -> None:
        seconds, steps = measure()
        self.times.setdefault(what, []).append(seconds / steps)

    def round(self) -> None:
        """Measure everything once."""
        self.note("greedy", lambda: self._greedy(self.cross, GREEDY))
        for length, decoder in self.at.items():
            self.note(f"length_{length}", lambda d=decoder, n=length: _steps_at(d, n))
        seconds, steps = self._beams()
        self.times.setdefault("beams", []).append(seconds / steps)
        self.note("beams_greedy", lambda: self._greedy(self.cross, steps))
        self.note("batch", lambda: self._greedy(self.crosses, BATCHED))
        self.note("one_by_one", self._one_by_one)

    def _greedy(self, cross: CrossCache, count: int) -> tuple[float, int]:
        tokens = self.pipeline.manifest.tokenizer
        decoder = Counted(self.pipeline.decoder(cross, 1, count + 2))
        rules = DecodeRules(count + 2, tokens.begin_id, tokens.end_id)
        start = perf_counter()
        for _ in greedy_steps(decoder, cross.rows, rules, _go_on):
            pass
        return perf_counter() - start, decoder.steps

    def _one_by_one(self) -> tuple[float, int]:
        """Time of a step of all prompts, that is of as many steps as there are prompts."""
        found = [self._greedy(_row(self.crosses, row), BATCHED) for row in range(PROMPTS)]
        return sum(seconds for seconds, _ in found), max(steps for _, steps in found)

    def _beams(self) -> tuple[float, int]:
        tokens = self.pipeline.manifest.tokenizer
        decoder = Counted(self.pipeline.decoder(self.cross, BEAMS, BATCHED + 2))
        rules = DecodeRules(BATCHED + 2, tokens.begin_id, tokens.end_id, BEAMS, 1)
        start = perf_counter()
        beam_search(decoder, 1, rules, _go_on)
        return perf_counter() - start, decoder.steps


def _go_on() -> None:
    """No deadline."""


def _steps_at(decoder: StepDecoder, length: int) -> tuple[float, int]:
    decoder.state.self_cache.rewind(length)
    decoder.step(np.array([5]))  # the cache may grow here
    start = perf_counter()
    for token in range(5, 5 + AT_LENGTH):
        decoder.step(np.array([token]))
    return perf_counter() - start, AT_LENGTH


def _row(cross: CrossCache, row: int) -> CrossCache:
    def one(array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.ascontiguousarray(array[row : row + 1])

    return CrossCache(tuple(map(one, cross.keys)), tuple(map(one, cross.values)), one(cross.encoder_mask))


def _bytes_read(pipeline: Pipeline, cross: CrossCache) -> int:
    """Of weights, by one step as onnxruntime executes it."""
    cache = SelfCache(pipeline.manifest.caches.self_cache, 1, GREEDY)
    new = {"ids": np.array([[5]]), "position": np.array([3]), "banned": np.array([-1])}
    return cost_of(pipeline.bundle, "decoder_step", {**new, **cross.inputs(), **cache.inputs()}).bytes_read


def summary(subjects: Sequence[Subject], read_gb_s: Sequence[float]) -> dict[str, float]:
    """Flat metrics: medians in ms a step, ratios as median, least and most over the rounds."""
    metrics: dict[str, float] = {"read_gb_s": float(np.median(read_gb_s))}

    def put(name: str, values: NDArray[np.float64]) -> None:
        for kind, value in (("median", np.median(values)), ("least", values.min()), ("most", values.max())):
            metrics[f"{name}/{kind}"] = float(value)

    for subject in subjects:
        times = {what: np.array(values) for what, values in subject.times.items()}
        for what, values in times.items():
            put(f"{subject.name}/{what}_ms", values * 1000)
        put(f"{subject.name}/bandwidth_share", subject.weight_bytes / times["greedy"] / 1e9 / np.array(read_gb_s))
        put(f"{subject.name}/length_ratio", times[f"length_{FAR}"] / times[f"length_{NEAR}"])
        put(f"{subject.name}/beams_ratio", times["beams"] / times["beams_greedy"])
        put(f"{subject.name}/batch_throughput", times["one_by_one"] / times["batch"])
        put(f"{subject.name}/speedup_to_{subjects[0].name}", np.array(subjects[0].times["greedy"]) / times["greedy"])
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.decoder_step", description="What a token of a caption costs."
    )
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, help="which (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of one run of a graph (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="of all measurements (default: %(default)s)")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: to see that it runs")
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache" / "deixis-rivals", help="folder for bundles"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are whole numbers from 1 on")
    try:
        subjects, rates = run(options)
    except (DeixisError, ProbeError, RivalError) as error:
        print(f"decoder_step: error: {error}", file=sys.stderr)
        return 1
    metrics = summary(subjects, rates)
    for name, value in metrics.items():
        print(f"{name:<40} {value:.4f}")
    if options.json is not None:
        settings = {name: getattr(options, name) for name in ("threads", "rounds", "size")}
        names = {"format": "deixis-decoder-step", "version": 1, "machine": describe(), "settings": settings}
        every: dict[str, Any] = {subject.name: subject.times for subject in subjects}
        bytes_of = {subject.name: subject.weight_bytes for subject in subjects}
        write_report(
            options.json, {**names, "metrics": metrics, "weight_bytes": bytes_of, "seconds": every, "read_gb_s": rates}
        )
    return 0


def run(options: argparse.Namespace) -> tuple[list[Subject], list[float]]:
    """All rounds: the subjects with their times, and the bandwidth in GB/s of each round. Raises RivalError."""
    root = options.work.resolve() / f"text-{options.size}"
    weights = ensure_weights("text", options.size, root, print)
    subjects: list[Subject] = []
    rates: list[float] = []
    with ExitStack() as stack:
        for precision in options.precisions:
            spec = Spec("deixis", "text", precision, weights, root / "step", options.threads, GREEDY)
            path = bundle_of(spec, precision)
            model = stack.enter_context(
                deixis.load(path, device="cpu", threads=options.threads, cache_capacity=CAPACITY, verify=False)
            )
            assert isinstance(model.pipeline, Pipeline)
            subjects.append(Subject.of(precision, model.pipeline, spec.prompt))
        for number in range(options.rounds + 1):
            if number == 1:  # the first was to warm up
                for subject in subjects:
                    subject.times.clear()
                rates.clear()
            rates.append(max(read_rates(buffer_bytes(), options.threads, 2).values()) / 1e9)
            first = number % len(subjects)
            for subject in [*subjects[first:], *subjects[:first]]:
                subject.round()
            print(json.dumps({"round": number, "of": options.rounds}), file=sys.stderr)
    return subjects, rates


if __name__ == "__main__":
    sys.exit(main())
