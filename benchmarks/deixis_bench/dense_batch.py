"""What it saves to describe the boxes of a picture together: one batch against one by one, and that the texts agree.

python -m deixis_bench.dense_batch tabletop --image table.jpg --out report.json

Both ways are measured in turn, so that a busy machine slows both; medians are compared. The picture is encoded before.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

import deixis
from deixis.results import Box
from deixis_bench.report import finish

T = TypeVar("T")


def spread_boxes(size: tuple[int, int], count: int) -> list[Box]:
    """`count` boxes of the same shape, spread over a picture of (height, width) px; neighbours overlap a little."""
    height, width = size
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    boxes = []
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = width * column / (columns + 0.5), height * row / (rows + 0.5)
        boxes.append((left, top, left + width * 1.5 / (columns + 0.5), top + height * 1.5 / (rows + 0.5)))
    return boxes


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what the call gave."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def compare(model: deixis.Model, scene: deixis.Scene, boxes: Sequence[Box], repeats: int) -> dict[str, float | bool]:
    """Describe the boxes of a scene `repeats` times in both ways.

    Returns:
        Medians in seconds, their ratio (of the batch to one by one), and whether all captions were the same.
    """
    prompts = [deixis.Prompt(box=box) for box in boxes]

    def together() -> list[deixis.Caption]:
        return model.caption_batch([(scene, prompt) for prompt in prompts])

    def alone() -> list[deixis.Caption]:
        return [model.caption_batch([(scene, prompt)])[0] for prompt in prompts]

    for way in (together, alone):  # loads the graphs
        way()
    batch_s, single_s, equal = [], [], True
    for _ in range(repeats):
        seconds, batch = timed(together)
        batch_s.append(seconds)
        seconds, singles = timed(alone)
        single_s.append(seconds)
        equal &= [caption.ids for caption in batch] == [caption.ids for caption in singles]
    batch_median, single_median = float(np.median(batch_s)), float(np.median(single_s))
    return {
        "batch_s": batch_median,
        "one_by_one_s": single_median,
        "ratio": batch_median / single_median,
        "captions_equal": equal,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deixis_bench.dense_batch", description="Captions of many boxes: one batch against one by one."
    )
    parser.add_argument("bundle", help="folder or name of a bundle")
    parser.add_argument("--image", type=Path, help="a picture (default: coloured blocks)")
    parser.add_argument("--boxes", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each way (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="where graphs run (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of one graph run (default: all cores)")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args(argv)
    if options.boxes < 1 or options.repeats < 1:
        parser.error("--boxes and --repeats are whole numbers from 1 on")
    try:
        picture = coloured_blocks() if options.image is None else deixis.load_image(options.image)
        with deixis.load(options.bundle, device=options.device, threads=options.threads) as model:
            scene = model.encode(picture)
            metrics = compare(model, scene, spread_boxes(scene.size, options.boxes), options.repeats)
            data = {
                "boxes": options.boxes,
                "repeats": options.repeats,
                "threads": model.info.threads,
                "picture": "coloured blocks" if options.image is None else options.image.name,
            }
            finish(metrics, data, model, options.out)
    except deixis.DeixisError as error:
        print(f"dense_batch: error: {error}", file=sys.stderr)
        return 1
    return 0 if metrics["captions_equal"] else 1


def coloured_blocks() -> np.ndarray:
    """RGB uint8 [480, 640, 3], always the same."""
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return blocks.repeat(40, axis=0).repeat(40, axis=1)


if __name__ == "__main__":
    sys.exit(main())
