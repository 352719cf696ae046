"""What parent and workers of a campaign agree on: the parts that are measured, what is asked of a rival, what it gives.

A part is a piece of work that every rival does with the same weights:

- "text": greedy decoding of an encoder-decoder T5 behind 64 ids. The encoder is not in the measurement.
- "llama": greedy decoding of a LLaMA behind a prompt of 64 ids. The prompt is not in the measurement.
- "encoder": an image encoder, once per run.

In both text parts the first id comes with the encoder or the prompt; the time is that of the `new_tokens` ids after it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTS = ("text", "llama", "encoder")
SIZES = ("full", "tiny")  # tiny: for tests, its times mean nothing
PROMPT_TOKENS = 64
MOST_NEW_TOKENS = 256  # what the reference continuation of a folder of weights has
NOTES, REFERENCE = "rivals.json", "reference.npz"  # in a folder of weights


class RivalError(Exception):
    """Why a rival cannot be measured here, in one line."""


@dataclass(frozen=True)
class Spec:
    """What one worker is to run.

    name and precision: of the rival. folder: the weights that all share (`weights`). work: a folder for what the rival
    makes of them, kept between campaigns. threads: of one run. new_tokens: ids to be timed, in text parts.
    """

    name: str
    part: str
    precision: str
    folder: Path
    work: Path
    threads: int
    new_tokens: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> Spec:
        values = json.loads(text)
        return Spec(**(values | {"folder": Path(values["folder"]), "work": Path(values["work"])}))

    @property
    def prompt(self) -> list[int]:
        """The 64 ids of a text part."""
        return json.loads((self.folder / NOTES).read_text(encoding="utf-8"))["prompt"]

    def picture(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Part encoder: image [1, S, S, 3] of 0..255 and valid_hw [1, 2] px."""
        with np.load(self.folder / REFERENCE) as arrays:
            return arrays["image"], arrays["valid_hw"]


class Stopwatch:
    """Seconds of the clock and of all the process's threads between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._started: tuple[float, float] | None = None

    @property
    def running(self) -> bool:
        return self._started is not None

    def start(self) -> None:
        self._started = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        assert self._started is not None, "the watch was not started"
        clock, cpu = time.perf_counter(), time.process_time()
        self.seconds, self.cpu_seconds = clock - self._started[0], cpu - self._started[1]
        self._started = None

    def __enter__(self) -> Stopwatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Answer:
    """One run. tokens: the first id and the `new_tokens` timed ones. outputs: arrays by name, of an encoder."""

    watch: Stopwatch
    tokens: list[int] | None = None
    outputs: dict[str, NDArray[Any]] | None = None


@dataclass(frozen=True)
class Loaded:
    """A rival ready to run. version: of the package that does the work. note: what a reader of numbers must know."""

    version: str
    run: Callable[[], Answer]
    note: str = ""


def decode_after_first(step: Callable[[int], int], first: int, count: int) -> Answer:
    """Time `count` calls of `step`, which takes an id and gives the next; `first` is the id that is already there."""
    tokens = [first]
    with Stopwatch() as watch:
        for _ in range(count):
            tokens.append(step(tokens[-1]))
    return Answer(watch, tokens)


def one_line(error: BaseException) -> str:
    """An exception's name and its text without line breaks, at most 300 characters."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, RivalError) else f"{type(error).__name__}: {text}")[:300]
