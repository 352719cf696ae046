"""What an answer costs against its length, with a key-value cache and without: time, and that both give the same.

python -m deixis_bench.answer_length BUNDLE --threads 1 --json report.json

For bundles of the family glamm. The question names a region. An answer of n tokens takes

- cached: the image encoders and the whole prompt once, then n - 1 steps of one token;
- uncached, as the published code works (GLaMM section 7): the image encoders and the whole text so far for each of the
  n tokens. The same graphs do it, so that nothing but the cache differs.

Both ways read the same answer, whose ids are drawn at random, so that it has the wanted length whatever the weights; at
every token both must name the same likeliest next id, from the same state. They take turns every few tokens, so that a
busy machine slows both, and time is taken on the clock and of the processor, which others disturb less. What both do
once per answer for its masks is measured apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.bundle import open_bundle
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.questions import expanded, first_text, ids_of
from deixis.glamm.session import LanguageSession
from deixis.image import square
from deixis.model import find_bundle
from deixis_bench.dense_batch import coloured_blocks
from deixis_bench.report import report_of, write_report

Floats = NDArray[np.float32]
Seconds = NDArray[np.float64]  # [..., 2]: on the clock, and of the processor, which other programs disturb less
T = TypeVar("T")

TURN = 16  # tokens after which the other way has its turn
SAME = 1e-4  # states differ by rounding: at most this share of the largest value
CURVE = 33  # points of the curves in a report


@dataclass(frozen=True)
class Look:
    """What the image encoders give the language model: a picture, and the vectors of the question's regions."""

    features: GlammFeatures
    regions: Sequence[Floats | None]


class Asked:
    """One question about one picture, and the two ways to its answer.

    Raises TaskError for a bundle of another family.
    """

    def __init__(self, model: deixis.Model, picture: NDArray[np.uint8]) -> None:
        """`picture`: RGB uint8 [H, W, 3]."""
        if not isinstance(model.pipeline, GlammPipeline):
            family = model.manifest.model.family
            raise deixis.TaskError(f"bundle {model.manifest.model.name!r} is of the family {family!r}, not glamm")
        self.pipeline = pipeline = model.pipeline
        [self._features] = pipeline.encode([picture])
        self._square = square(picture, pipeline.global_image)[None].astype(np.float32)
        height, width = picture.shape[:2]
        with_region = not pipeline.missing("region_caption")
        boxes = [(0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)] if with_region else []
        self.boxes = np.array(boxes).reshape(-1, 4)
        task = pipeline.task("region_caption" if with_region else "caption")
        self.ids = ids_of(pipeline, first_text(pipeline, task.instruction))

    @property
    def positions(self) -> int:
        """Those of the prompt, the picture's included."""
        return expanded(self.ids, self.pipeline.conversation)

    def look(self) -> Look:
        """Run the image encoders on the resized picture."""
        outputs = self.pipeline.engine.run("global_encoder", {"image": self._square})
        levels = tuple(outputs[f"level.{n}"][0] for n in range(len(self._features.levels)))
        features = dataclasses.replace(self._features, features=outputs["features"][0], levels=levels)
        regions = self.pipeline.regions([features], [self.boxes]) if len(self.boxes) else [None]
        return Look(features, regions)

    def read(self, answer: Sequence[int]) -> tuple[LanguageSession, int, Floats]:
        """Run the image encoders, and the prompt with an answer so far in one go.

        Returns the session, the answer's likeliest next id and the state [D] that it comes from.
        """
        look = self.look()
        session = self.pipeline.session([look.features], self.positions + len(answer))
        top, states = session.feed(np.array([[*self.ids, *answer]]), look.regions)
        return session, int(top.ids[0, 0]), states[0, -1]

    def answer(self, tokens: int) -> list[int]:
        """Ids of an answer that does not end, and names no region, for it has none: always the same."""
        spec, vocabulary = self.pipeline.conversation, self.pipeline.manifest.tokenizer.vocab_size
        allowed = np.setdiff1d(np.arange(vocabulary), [spec.end_id, spec.region_id or spec.end_id])
        return np.random.default_rng(0).choice(allowed, tokens).tolist()

    def masks(self, state: Floats) -> None:
        """Run the grounding encoder and the pixel decoder for one mask, as both ways do once per answer; nothing when
        the bundle makes no masks.
        """
        if not self.pipeline.has_masks:
            return
        fresh = dataclasses.replace(self._features)  # keeps no map of the grounding encoder
        self.pipeline.masks(state[None], [fresh])


@dataclass(frozen=True)
class Round:
    """One answer in both ways. cached, uncached: for each of its n tokens [n, 2]; where the uncached way was not run,
    between those of the neighbours. masks: [2]. equal: as many ids were the same, of those compared.
    """

    cached: Seconds
    uncached: Seconds
    masks: Seconds
    compared: int
    equal: int
    difference: float  # of states, at most, relative to the largest value


def timed(call: Callable[[], T]) -> tuple[Seconds, T]:
    """Seconds [2], and what the call gave."""
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return np.array([time.perf_counter() - clock, time.process_time() - processor]), result


def answer_once(asked: Asked, most: int, points: Sequence[int]) -> Round:
    """Make an answer of `most` tokens cached, and uncached those tokens whose index is in `points`."""
    wanted = set(points)
    cached, taken = np.zeros((most, 2)), dict[int, Seconds]()
    answer = asked.answer(most)
    chosen: list[int] = []
    states: list[Floats] = []
    equal, difference = 0, 0.0
    session: LanguageSession | None = None
    for begin in range(0, most, TURN):
        turn = range(begin, min(begin + TURN, most))
        for token in turn:
            if session is None:
                cached[token], (session, likeliest, state) = timed(lambda: asked.read([]))
            else:
                last, running = np.array([answer[token - 1]]), session
                cached[token], (rows, row_states) = timed(lambda: running.step(last))  # noqa: B023 - called at once
                likeliest, state = int(rows.ids[0, 0]), row_states[0]
            chosen.append(likeliest)
            states.append(np.array(state))
        for token in sorted(wanted.intersection(turn)):
            before = answer[:token]
            taken[token], (_, likeliest, state) = timed(lambda: asked.read(before))  # noqa: B023 - called at once
            equal += likeliest == chosen[token]
            gap = float(np.abs(state - states[token]).max() / np.abs(states[token]).max())
            if not np.isfinite(gap):
                raise deixis.EngineError(f"the state behind token {token} is not finite; verify the bundle")
            difference = max(difference, gap)
    masks, _ = timed(lambda: asked.masks(states[-1]))
    run = sorted(taken)
    known = np.array([taken[token] for token in run])
    uncached = np.stack([np.interp(np.arange(most), run, column) for column in known.T], axis=1)
    return Round(cached, uncached, masks, len(run), equal, difference)


def spread_points(most: int, count: int | None) -> list[int]:
    """Indices of `count` tokens out of `most`, evenly from the first to the last; None = all."""
    return np.unique(np.linspace(0, most - 1, min(count or most, most)).round().astype(int)).tolist()


def figures(rounds: Sequence[Round], tokens: int) -> dict[str, Any]:
    """What an answer of so many tokens costs, on the clock and of the processor.

    An answer's first tokens cost what a shorter answer costs: every length is read off the same rounds.
    """
    cached = np.array([found.cached[:tokens].sum(axis=0) for found in rounds])
    uncached = np.array([found.uncached[:tokens].sum(axis=0) for found in rounds])
    masks = np.array([found.masks for found in rounds])
    both = {kind: _compared(cached[:, n], uncached[:, n], masks[:, n]) for n, kind in enumerate(("clock", "processor"))}
    return {"new_tokens": tokens, **both}


def _compared(cached: Seconds, uncached: Seconds, masks: Seconds) -> dict[str, float]:
    """Seconds and their ratio over the rounds, [rounds] each: median, least and most."""
    found: dict[str, float] = {}
    for name, values in (("cached_s", cached), ("uncached_s", uncached), ("ratio", uncached / cached)):
        found[name] = float(np.median(values))
        found[f"{name}_least"], found[f"{name}_most"] = float(values.min()), float(values.max())
    return found | {"ratio_with_masks": float(np.median((uncached + masks) / (cached + masks)))}


def measure(asked: Asked, tokens: Sequence[int], rounds: int, points: int | None) -> dict[str, Any]:
    """Answers of the given lengths in both ways, `rounds` times.

    Returns:
        lengths: `figures` of each length. curve: processor seconds at more lengths. masks_s: the grounding encoder and
        one mask, processor seconds. ids_equal, states_equal: of both ways, wherever both ran.
    """
    most = max(tokens)
    measured = spread_points(most, points)
    answer = asked.answer(most)
    session, _, state = asked.read(answer[:-1])  # loads the graphs, and the engine takes what the longest text needs
    session.step(np.array(answer[-1:]))
    asked.masks(state)
    found = [answer_once(asked, most, measured) for _ in range(rounds)]
    curve = [figures(found, int(n)) for n in np.unique(np.geomspace(1, most, CURVE).round())]
    difference = max(one.difference for one in found)
    return {
        "lengths": [figures(found, n) for n in tokens],
        "masks_s": float(np.median([one.masks[1] for one in found])),
        "ids_equal": all(one.equal == one.compared for one in found),
        "ids_compared": sum(one.compared for one in found),
        "states_equal": difference <= SAME,
        "states_difference": difference,
        "uncached_tokens_run": len(measured),
        "uncached_tokens_interpolated": most - len(measured),
        "curve": {
            "new_tokens": [point["new_tokens"] for point in curve],
            **{name: [point["processor"][name] for point in curve] for name in ("cached_s", "uncached_s")},
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.answer_length",
        description="Time per answer against its length: with a key-value cache and without.",
    )
    parser.add_argument("bundle", help="folder or name of a bundle of the family glamm")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 512], help="lengths of answers (default: 64 256 512)"
    )
    parser.add_argument("--image", type=Path, help="a picture (default: coloured blocks)")
    parser.add_argument("--rounds", type=int, default=3, help="answers in both ways (default: %(default)s)")
    parser.add_argument(
        "--points",
        type=int,
        help="run only so many tokens uncached, spread evenly, and interpolate between them (default: all)",
    )
    parser.add_argument("--device", default="auto", help="where graphs run (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of one graph run (default: all cores)")
    parser.add_argument("--json", type=Path, help="write the report")
    options = parser.parse_args(argv)
    if min(options.tokens) < 1 or options.rounds < 1:
        parser.error("--tokens and --rounds are whole numbers from 1 on")
    if options.points is not None and options.points < 2:
        parser.error("--points is a whole number from 2 on: the first token and the last are always run")
    try:
        picture = coloured_blocks() if options.image is None else deixis.load_image(options.image)
        path = find_bundle(options.bundle)
        most = open_bundle(path, verify_hashes=False).manifest.dims["T"].max
        with deixis.load(path, device=options.device, threads=options.threads, cache_capacity=most) as model:
            asked = Asked(model, picture)
            if asked.positions + max(options.tokens) > most:
                raise deixis.TextTooLongError(
                    f"the prompt has {asked.positions} tokens; with {max(options.tokens)} more it does not fit into "
                    f"the bundle's {most}: choose --tokens up to {most - asked.positions}"
                )
            metrics = measure(asked, sorted(set(options.tokens)), options.rounds, options.points)
            data = {
                "prompt_positions": asked.positions,
                "image_tokens": asked.pipeline.conversation.image_tokens,
                "regions": len(asked.boxes),
                "rounds": options.rounds,
                "threads": model.info.threads,
                "picture": "coloured blocks" if options.image is None else options.image.name,
            }
            print(table(metrics))
            if options.json is not None:
                write_report(options.json, report_of(metrics, data, model))
    except deixis.DeixisError as error:
        print(f"answer_length: error: {error}", file=sys.stderr)
        return 1
    return 0 if metrics["ids_equal"] and metrics["states_equal"] else 1


def table(metrics: dict[str, Any]) -> str:
    """What was measured, as a markdown table, and a line on what was compared and interpolated."""
    lines = [
        "| new tokens | time of | cached | uncached | ratio (least to most) | with masks |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['new_tokens']} | {kind} | {row[kind]['cached_s']:.3f} s | {row[kind]['uncached_s']:.3f} s | "
        f"{row[kind]['ratio']:.1f} ({row[kind]['ratio_least']:.1f} to {row[kind]['ratio_most']:.1f}) | "
        f"{row[kind]['ratio_with_masks']:.1f} |"
        for row in metrics["lengths"]
        for kind in ("processor", "clock")
    ]
    same = "the same" if metrics["ids_equal"] else "NOT the same"
    total = metrics["uncached_tokens_run"] + metrics["uncached_tokens_interpolated"]
    run = metrics["uncached_tokens_run"]
    how = "all tokens were run" if run == total else f"{run} of {total} tokens were run, the others are interpolated"
    return "\n".join(
        [
            *lines,
            "",
            f"ids: {same} ({metrics['ids_compared']} compared); states: at most {metrics['states_difference']:.1e} "
            f"apart, {'as rounding' if metrics['states_equal'] else 'NOT the same'}; uncached: {how}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
