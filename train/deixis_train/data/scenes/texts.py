"""All that is said about one scene, made again at any time from its line of ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deixis_train.data.scenes import language
from deixis_train.data.scenes.expressions import expressions
from deixis_train.data.scenes.language import Box, Item, Words
from deixis_train.data.scenes.questions import Pair, questions
from deixis_train.data.scenes.traces import traces


@dataclass(frozen=True)
class Texts:
    """captions: five, objects from left to right; the first is the narration. traces: in free order. expressions:
    (text, index of the one object it fits). regions: one per object. questions: (question, answer)."""

    captions: tuple[Words, ...]
    traces: tuple[Words, ...]
    expressions: tuple[tuple[str, int], ...]
    regions: tuple[str, ...]
    questions: tuple[Pair, ...]


def say(items: Sequence[Item], table: Box, width: int, height: int, seed: int) -> Texts:
    """The texts about ``items`` in a picture of ``width`` x ``height`` px; ``table`` is the box of the visible table
    top in px. Nothing but the arguments decides: the same arguments give the same texts."""

    def rng(stream: int) -> np.random.Generator:
        return np.random.default_rng([seed, 2, stream])

    return Texts(
        tuple(language.captions(items, table, width)),
        tuple(traces(items, table, width, height, rng(0))),
        tuple(expressions(items, width, height, rng(1))),
        tuple(language.region(item) for item in items),
        tuple(questions(items, width, height, rng(2))),
    )


def texts_of(line: dict[str, Any]) -> Texts:
    """The texts about the scene of a shard's line (see `generate`)."""
    items = [Item(o["kind"], o["color"], o["size"], tuple(o["box"]), tuple(o["foot"])) for o in line["objects"]]
    return say(items, tuple(line["table"]), line["width"], line["height"], line["seed"])
