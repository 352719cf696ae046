"""What serving many requests costs: prompts on an encoded scene, batches, beams, two scenes in flight, threads.

python -m deixis_bench.serving tabletop [OTHER_BUNDLE ...] --json report.json

Every ratio is taken within a round, in which both ways run one after the other, and reported as median, least and most
over the rounds: of the clock, and as `.../processor/...` of processor time. Further bundles (the same model in another
precision) only have their batches measured, as `batch8/PRECISION/...`.

second_prompt/first_word_ratio: picture to the first word of its caption, over a region's prompt to its first word on
that picture. batch8: eight regions one by one over all in one batch. beam3: a caption with three beams over greedy;
`step_ratio` is that of a step, for the two may end after different numbers of them. in_flight: encode and caption of
some pictures one after the other, over encoding one while the one before it is described in a second thread;
`in_flight_single` with one thread a run instead of all. spin, pinned: sleeping threads over those that spin, or are
pinned to cores; above 1 is faster than the default.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.timing import LOAD
from deixis_bench.dense_batch import coloured_blocks, spread_boxes
from deixis_bench.report import report_of, write_report

Picture = NDArray[np.uint8]
ENCODERS = frozenset({"semantic_encoder", "sam_encoder", "global_encoder", "grounding_encoder"})
BATCH, BEAMS, PICTURES = 8, 3, 4


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float

    def over(self, other: Cost) -> Cost:
        return Cost(self.clock / other.clock, self.processor / other.processor)


@dataclass
class Table:
    """Ratios by name, a value a round."""

    rounds: dict[str, list[Cost]] = field(default_factory=dict)

    def add(self, name: str, ratio: Cost) -> None:
        self.rounds.setdefault(name, []).append(ratio)

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, ratios in self.rounds.items():
            for prefix, values in (
                (name, [ratio.clock for ratio in ratios]),
                (f"{name}/processor", [ratio.processor for ratio in ratios]),
            ):
                found |= {
                    f"{prefix}/median": float(np.median(values)),
                    f"{prefix}/least": min(values),
                    f"{prefix}/most": max(values),
                }
        return found


def cost_of(call: Callable[[], object]) -> Cost:
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return Cost(time.perf_counter() - clock, time.process_time() - processor)


class Serving:
    """The measurements of one model. pictures: of any sizes, at least two; scenes are not kept by the model."""

    def __init__(self, model: deixis.Model, pictures: Sequence[Picture], table: Table) -> None:
        self.model = model
        self.pictures = list(pictures)
        self.table = table
        self.scene = model.encode(self.pictures[0])
        self.boxes = spread_boxes(self.scene.size, BATCH)

    def graph_runs(self, call: Callable[[], object]) -> dict[str, int]:
        """How often each graph runs in a call."""
        with self.model.timed() as spans:
            call()
        names = [span.name for span in spans if span.name in self.model.manifest.graphs]
        return {name: names.count(name) for name in names}

    def counts(self) -> dict[str, Any]:
        """What is counted, once: runs of encoders for a second prompt, and graphs that were loaded in vain."""
        with self.model.timed() as spans:
            scene = self.model.encode(self.pictures[0])
            scene.caption()
        used = {span.name for span in spans if not span.name.startswith(LOAD)}
        unused = [role for role in self.model.info.loaded_graphs if role not in used]
        runs = self.graph_runs(lambda: scene.caption(box=self.boxes[0]))
        return {"unused_graphs": len(unused), "second_prompt/encoder_runs": sum(runs.get(name, 0) for name in ENCODERS)}

    def first_words(self) -> None:
        pictures, seconds = self.pictures[:2], []
        for picture in pictures:
            scenes: list[deixis.Scene] = []

            def fresh(picture: Picture = picture, scenes: list[deixis.Scene] = scenes) -> None:
                scenes.append(self.model.encode(picture))
                next(iter(scenes[0].stream_caption()), None)

            first = cost_of(fresh)
            again = cost_of(lambda: next(iter(scenes[0].stream_caption(box=self.boxes[0])), None))  # noqa: B023
            seconds.append((first, again))
        first, again = (
            Cost(sum(c.clock for c in row), sum(c.processor for c in row)) for row in zip(*seconds, strict=True)
        )
        self.table.add("second_prompt/first_word_ratio", first.over(again))

    def batches(self, label: str) -> bool:
        """Returns whether the texts of both ways are the same."""
        together: list[deixis.Caption] = []
        alone: list[deixis.Caption] = []
        pairs = [(self.scene, deixis.Prompt(box=box)) for box in self.boxes]
        batched = cost_of(lambda: together.extend(self.model.caption_batch(pairs)))
        single = cost_of(lambda: alone.extend(self.model.caption_batch([pair])[0] for pair in pairs))
        self.table.add(f"batch{BATCH}/{label}/ratio", single.over(batched))
        return [caption.ids for caption in together] == [caption.ids for caption in alone]

    def beams(self, steps: tuple[int, int]) -> None:
        """steps: runs of the decoder's step, of greedy search and of the beams'."""
        greedy = cost_of(self.greedy_caption)
        beams = cost_of(self.beam_caption)
        ratio = beams.over(greedy)
        self.table.add(f"beam{BEAMS}/ratio", ratio)
        per_step = steps[0] / steps[1]
        self.table.add(f"beam{BEAMS}/step_ratio", Cost(ratio.clock * per_step, ratio.processor * per_step))

    def greedy_caption(self) -> deixis.Caption:
        return self.scene.caption(options=deixis.DecodeOptions(beams=1))

    def beam_caption(self) -> deixis.Caption:
        return self.scene.caption(options=deixis.DecodeOptions(beams=BEAMS))

    def in_turn(self) -> None:
        for picture in self.pictures:
            self.model.encode(picture).caption()

    def in_flight(self) -> None:
        """Each picture is described in a second thread, while this one encodes the next."""
        with ThreadPoolExecutor(1) as second:
            done = [second.submit(self.model.encode(picture).caption) for picture in self.pictures]
            for caption in done:
                caption.result()

    def encode_and_caption(self) -> None:
        self.model.encode(self.pictures[0]).caption()


def precision_of(model: deixis.Model) -> str:
    """Of the decoder's weights, as batches are named: what is computed in full precision is fp32."""
    weights = model.manifest.graphs["decoder_step"].precision.weights
    return weights if weights in ("int8", "w8", "w4") else "fp32"


def measure(bundles: Sequence[str], pictures: Sequence[Picture], rounds: int, threads: int | None) -> dict[str, Any]:
    """All measurements, as a report. Raises DeixisError."""
    table = Table()
    with ExitStack() as stack:

        def loaded(bundle: str, **options: Any) -> Serving:
            model = stack.enter_context(deixis.load(bundle, "cpu", scene_budget_mb=0, **options))
            return Serving(model, pictures, table)

        main = loaded(bundles[0], threads=threads)
        metrics: dict[str, Any] = main.counts()
        talks = main.model.info.family == "glamm"  # decodes greedily only
        others = [loaded(bundle, threads=threads) for bundle in bundles[1:]]
        kinds = {"spin": loaded(bundles[0], threads=threads, spin=True)}
        used = main.model.info.threads or 1
        single = loaded(bundles[0], threads=1) if used > 1 else None
        if used > 1 and sys.platform == "linux" and used <= len(cores := usable_processors()):
            kinds["pinned"] = loaded(bundles[0], cores=cores[:used])
        steps = (1, 1)
        if not talks:
            runs = [main.graph_runs(call) for call in (main.greedy_caption, main.beam_caption)]
            steps = (runs[0]["decoder_step"], runs[1]["decoder_step"])
        for each in [main, *others, *kinds.values(), *([single] if single else [])]:
            each.encode_and_caption()  # warm-up
            each.batches("warm-up")
        table.rounds.clear()
        same = True
        for _ in range(rounds):
            main.first_words()
            for each in (main, *others):
                same &= each.batches(precision_of(each.model))
            if not talks:
                main.beams(steps)
            in_turn = cost_of(main.in_turn)
            table.add("in_flight/ratio", in_turn.over(cost_of(main.in_flight)))
            if single:
                table.add("in_flight_single/ratio", in_turn.over(cost_of(single.in_flight)))
            plain = cost_of(main.encode_and_caption)
            for name, kind in kinds.items():
                table.add(f"{name}/ratio", plain.over(cost_of(kind.encode_and_caption)))
        metrics |= table.metrics()
        metrics["captions_equal"] = same
        data = {"rounds": rounds, "threads": used, "pictures": len(pictures), "beam_steps": list(steps)}
        data["precisions"] = [precision_of(each.model) for each in (main, *others)]
        return report_of(metrics, data, main.model)


def usable_processors() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.serving",
        description="Prompts on encoded scenes, batches, beams, two scenes in flight, kinds of threads; all as ratios.",
    )
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folder or name; of further ones, batches only")
    parser.add_argument("--images", nargs="+", type=Path, metavar="FILE", help="pictures (default: coloured blocks)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="threads of one graph run (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    options = parser.parse_args(argv)
    if options.rounds < 1 or (options.images and len(options.images) < 2):
        parser.error("--rounds is a whole number from 1 on, and --images are at least two")
    try:
        pictures = [deixis.load_image(path) for path in options.images or ()] or [
            np.roll(coloured_blocks(), 40 * shift, axis=1) for shift in range(PICTURES)
        ]
        report = measure(options.bundles, pictures, options.rounds, options.threads)
    except deixis.DeixisError as error:
        print(f"serving: error: {error}", file=sys.stderr)
        return 1
    for name, value in report["metrics"].items():
        print(f"{name:<48} {value:.3f}" if isinstance(value, float) else f"{name:<48} {value}")
    if options.json:
        write_report(options.json, report)
    return 0 if report["metrics"]["captions_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
