"""What a benchmark is told, and the pictures and texts it uses: the same for every bundle and every machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.base_pipeline import BasePipeline

HEIGHT, WIDTH = 480, 640  # px of the pictures
BLOCK = 40  # px of their coloured blocks


@dataclass(frozen=True)
class Settings:
    """threads: of one graph run, None = as many as the engine likes. batch: pictures and prompts that run together.
    prompt_tokens: of texts that are given (a phrase, a sentence, a question). new_tokens: of texts that are generated.
    rounds: in which every request runs once, after `warmup_rounds` that do not count. cold: fresh processes;
    0 = nothing is measured cold.
    """

    device: str = "auto"
    threads: int | None = None
    batch: int = 1
    prompt_tokens: int = 8
    new_tokens: int = 32
    rounds: int = 10
    warmup_rounds: int = 2
    cold: int = 3
    seed: int = 0


def threads_of(threads: int) -> int:
    """Threads that an engine uses which was told this many; 0 = one per core that this process may use."""
    return threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def make_pictures(count: int, seed: int) -> list[NDArray[np.uint8]]:
    """RGB pictures uint8 [480, 640, 3] of coloured blocks, each another one, always the same for a seed."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, HEIGHT // BLOCK, WIDTH // BLOCK, 3), dtype=np.uint8)
    return list(blocks.repeat(BLOCK, axis=1).repeat(BLOCK, axis=2))


def region(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) px over the middle of a picture of (height, width)."""
    height, width = size
    return 0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height


def text_of(pipeline: BasePipeline, tokens: int) -> str:
    """A text that the model's tokenizer makes exactly so many tokens of, out of the first pieces that are a text by
    themselves. Raises PromptError when the vocabulary has no such text.
    """
    text = ""
    for piece in range(pipeline.manifest.tokenizer.vocab_size):
        word = pipeline.tokenizer.decode([piece]).strip()
        while word:
            longer = f"{text} {word}".strip()
            count = _count(pipeline, longer)
            if not 0 < count <= tokens or count <= _count(pipeline, text):
                break
            text = longer
            if count == tokens:
                return text
    raise deixis.PromptError(f"the tokenizer of {pipeline.manifest.model.name!r} has no text of {tokens} tokens")


def _count(pipeline: BasePipeline, text: str) -> int:
    """Tokens of a text; 0 when there is none, or one that the tokenizer does not read."""
    try:
        return len(pipeline.tokenizer.encode(text).ids) if text else 0
    except deixis.PromptError:
        return 0
