"""Whether memory stays flat over a long run: many requests of all tasks of a bundle, in one process.

python -m deixis_bench.soak tabletop --requests 1000 --json report.json

Requests are drawn by the seed: task, picture (of different sizes, more than the scenes that are kept), region, text,
length, batch. The first fifth is the warm-up. `growth` is the median resident memory of the last tenth of the requests
over that of the tenth behind the warm-up, less 1: the command fails when it is above `--limit`. With `--held`, freed
memory goes back to the system before these looks, so that what the C library keeps for later does not count: a short
run needs that. `--leak-kb` keeps so much of every request on purpose, to see that it is noticed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

import deixis
from deixis.memory import return_freed_memory
from deixis_bench.report import finish

Picture = NDArray[np.uint8]
WARM_UP, WINDOW = 0.2, 0.1  # parts of the requests
PICTURES = 10
_SIDES = (40, 64, 90, 180, 240, 480, 640)  # px


class Requests:
    """Draws requests for a model and sends them. texts: given texts for the tasks that take one."""

    def __init__(self, model: deixis.Model, seed: int, texts: Sequence[str], most_tokens: int) -> None:
        self._model = model
        self._random = np.random.default_rng(seed)
        self._texts = list(texts)
        self._most_tokens = most_tokens
        self._pictures = [self._picture() for _ in range(PICTURES)]
        can = set(model.info.tasks)
        talks = model.info.family == "glamm"
        named: dict[str, Callable[[deixis.Scene], object]] = {"caption": self._caption, "stream": self._stream}
        if "region_caption" in can:
            named |= {"region_caption": self._region, "batch": self._batch}
        for task, send in (
            ("refer", lambda scene: scene.refer(self._text(), options=self._options() if talks else None)),
            ("trace", lambda scene: scene.trace(self._text())),
            ("segment", self._segment),
            ("dense_captions", lambda scene: scene.dense_captions(options=self._options())),
            ("ask", lambda scene: scene.ask(self._text(), options=self._options())),
            ("grounded_caption", lambda scene: scene.grounded_caption(options=self._options())),
            ("ground_phrases", self._phrases),
        ):
            if task in can:
                named[task] = send
        if talks:
            named["chat"] = self._chat
        self.kinds = named if "caption" in can else {k: v for k, v in named.items() if k in can}

    def send(self) -> str:
        """Send the next request. Returns its kind."""
        names = sorted(self.kinds)
        kind = names[self._random.integers(len(names))]
        self.kinds[kind](self._scene())
        return kind

    def _picture(self) -> Picture:
        height, width = self._random.choice(_SIDES, 2)
        return self._random.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def _scene(self) -> deixis.Scene:
        return self._model.encode(self._pictures[self._random.integers(PICTURES)])

    def _options(self) -> deixis.DecodeOptions:
        return deixis.DecodeOptions(max_new_tokens=int(self._random.integers(1, self._most_tokens + 1)))

    def _text(self) -> str:
        return self._texts[self._random.integers(len(self._texts))]

    def _box(self, scene: deixis.Scene) -> tuple[float, ...]:
        height, width = scene.size
        (x0, x1), (y0, y1) = (np.sort(self._random.uniform(0, side, 2)) for side in (width, height))
        return float(x0), float(y0), float(max(x1, x0 + 1)), float(max(y1, y0 + 1))

    def _caption(self, scene: deixis.Scene) -> object:
        return scene.caption(options=self._options())

    def _stream(self, scene: deixis.Scene) -> object:
        """Half of the streams are left before their end."""
        stream = scene.stream_caption(options=self._options())
        if self._random.random() < 0.5:
            return next(iter(stream), None)
        return list(stream)

    def _region(self, scene: deixis.Scene) -> object:
        return scene.caption(box=self._box(scene), options=self._options())

    def _batch(self, scene: deixis.Scene) -> object:
        scenes = [scene, *(self._scene() for _ in range(self._random.integers(1, 4)))]
        return self._model.caption_batch([(s, deixis.Prompt(box=self._box(s))) for s in scenes], self._options())

    def _segment(self, scene: deixis.Scene) -> object:
        return scene.segment(box=self._box(scene), multimask=True)

    def _phrases(self, scene: deixis.Scene) -> object:
        text = self._text()
        return scene.ground_phrases(text, [text.split()[0]])

    def _chat(self, scene: deixis.Scene) -> object:
        with scene.chat() as chat:
            return [chat.ask(self._text(), options=self._options()) for _ in range(2)]


def run(requests: Requests, count: int, held: bool = False, leak_bytes: int = 0) -> tuple[list[float], Counter[str]]:
    """Send `count` requests, keeping `leak_bytes` of memory at each. held: in the windows that are compared, freed
    memory goes back to the system before each look.

    Returns:
        Resident memory in MB (10^6 bytes) after each, and how many there were of each kind.
    """
    process, kept = psutil.Process(), list[NDArray[np.uint8]]()
    resident = []
    kinds: Counter[str] = Counter()
    compared = {index for window in windows(count) for index in window}
    for index in range(count):
        kinds[requests.send()] += 1
        if leak_bytes:
            kept.append(np.ones(leak_bytes, np.uint8))
        if held and index in compared:
            gc.collect()
            return_freed_memory()
        resident.append(process.memory_info().rss / 1e6)
    return resident, kinds


def windows(count: int) -> tuple[range, range]:
    """Indices of the requests behind the warm-up and at the end whose memory is compared."""
    width, start = max(1, round(WINDOW * count)), round(WARM_UP * count)
    return range(start, start + width), range(count - width, count)


def summarise(resident: Sequence[float]) -> dict[str, float]:
    """growth: see the module; after_warm_up_mb, at_end_mb: the medians it compares; peak_mb: of all requests."""
    after, end = (float(np.median([resident[i] for i in window])) for window in windows(len(resident)))
    return {
        "growth": end / after - 1,
        "after_warm_up_mb": after,
        "at_end_mb": end,
        "peak_mb": float(np.max(resident)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.soak", description="Memory over many mixed requests of one process."
    )
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--requests", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", default=["a red mug on the table", "the blue bowl"], metavar="TEXT",
                        help="texts for the tasks that take one")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=24, help="longest text (default: %(default)s)")
    parser.add_argument(
        "--scene-budget-mb", type=float, default=4, help="of scenes that are kept (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of one graph run (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=0.01, help="most growth (default: %(default)s)")
    parser.add_argument("--held", action="store_true", help="count only what is held, not what the C library keeps")
    parser.add_argument("--leak-kb", type=int, default=0, help="keep so much of every request, to check the check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    options = parser.parse_args(argv)
    if options.requests < 20 or options.max_new_tokens < 1 or options.leak_kb < 0:
        parser.error("--requests are at least 20, --max-new-tokens at least 1, --leak-kb at least 0")
    try:
        with deixis.load(options.bundle, threads=options.threads, scene_budget_mb=options.scene_budget_mb) as model:
            requests = Requests(model, options.seed, options.texts, options.max_new_tokens)
            started = time.perf_counter()
            resident, kinds = run(requests, options.requests, options.held, options.leak_kb * 1000)
            metrics: dict[str, Any] = summarise(resident)
            data = {
                "requests": options.requests,
                "seconds": time.perf_counter() - started,
                "kinds": dict(sorted(kinds.items())),
                "limit": options.limit,
                "held": options.held,
                "leak_kb": options.leak_kb,
                "resident_mb": [round(value, 2) for value in resident[:: max(1, options.requests // 200)]],
            }
            finish(metrics, data, model, options.json)
    except deixis.DeixisError as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 1
    if metrics["growth"] > options.limit:
        print(
            f"soak: memory grew by {100 * metrics['growth']:.2f} %, allowed {100 * options.limit:g} %", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
