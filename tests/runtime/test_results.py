"""Results are frozen, in original pixels, and become JSON whatever is in them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from deixis.results import Caption, Grounding, Mask, Segment, Trace, Word

WORD = Word("mug", 2, 5, ((10.0, 20.0), (30.0, 60.0)), -0.5)
MASK = Mask.from_array(np.eye(4, dtype=bool))


def test_word() -> None:
    assert WORD.box == (10.0, 20.0, 30.0, 60.0)
    assert WORD.center == (20.0, 40.0)
    nowhere = Word("a", 0, 1)
    assert nowhere.box is None and nowhere.center is None and nowhere.to_dict()["points"] is None


@pytest.mark.parametrize(
    "result",
    [
        Caption("a mug", (Word("a", 0, 1), WORD), -1.25, (5, 6), True, (0.0, 0.0, 9.0, 9.0)),
        Trace("a mug", (WORD,)),
        Grounding("the mug", (1.0, 2.0, 3.0, 4.0), MASK, 0.9),
        Grounding("the mug", (1.0, 2.0, 3.0, 4.0)),
        Segment(MASK, 0.5, MASK.box),
        MASK,
    ],
)
def test_frozen_hashable_and_json(result: Caption | Trace | Grounding | Segment | Mask) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = "x"  # type: ignore[misc]
    assert hash(result) == hash(dataclasses.replace(result))
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text) == result.to_dict()


def test_only_finite_numbers_reach_json() -> None:
    nan, inf = float("nan"), float("inf")
    word = Word("a", 0, 1, ((nan, 0.0), (1.0, inf)), -inf)
    values = Caption("a", (word,), nan, (1,), box=(0.0, nan, 1.0, 1.0)).to_dict()
    json.dumps(values, allow_nan=False)
    assert values["score"] is None and values["box"] is None
    assert values["words"][0]["points"] is None and values["words"][0]["score"] is None


def test_numpy_numbers_become_plain_ones() -> None:
    score, ids = np.float32(0.5), tuple(np.array([1, 2]))
    word = Word("a", 0, 1, ((np.float64(1), np.float64(2)), (np.float64(3), np.float64(4))), score)
    json.dumps(Caption("a", (word,), score, ids).to_dict())
    json.dumps(Grounding("a", tuple(np.arange(4.0)), MASK, score).to_dict())
