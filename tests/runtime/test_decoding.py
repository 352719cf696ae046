"""Search: exact on the reference's table, batch equals single, deadline, cancel, length cut, locations."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis.decoding import (
    NEG,
    DecodeRules,
    Top,
    _continuations,
    _top,
    beam_search,
    collect_beams,
    greedy,
    greedy_steps,
    log_softmax,
)
from deixis.errors import CancelledError, DeadlineError, EngineError, PromptError
from deixis.options import DecodeOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "pixelllm" / "decode_table.npz"
never = DecodeOptions().start()


class TableDecoder:
    """A language model that is a table: logits after consuming token t at place i are table[i, t] + offsets[row].

    It remembers what each row consumed, as a cache would; the location of a token is ((place, token), (history's sum,
    0)), so that a wrong order of rows shows.
    """

    def __init__(self, table: np.ndarray, offsets: np.ndarray, beams: int = 1, candidates: int = 16) -> None:
        self.candidates = candidates
        self.table, self.offsets = table, np.repeat(offsets, beams, axis=0)
        self.history = np.zeros((len(self.offsets), 0), np.int64)
        self.steps = 0

    def step(self, ids: np.ndarray, banned: np.ndarray | None = None) -> tuple[Top, np.ndarray]:
        place = self.history.shape[1]
        self.history = np.concatenate([self.history, ids[:, None]], axis=1)
        self.steps += 1
        points = np.zeros((len(ids), 2, 2), np.float32)
        points[:, 0, 0], points[:, 0, 1], points[:, 1, 0] = place, ids, self.history.sum(axis=1)
        return Top.of_logits(self.table[place, ids] + self.offsets, banned, self.candidates), points

    def reorder(self, rows: np.ndarray) -> None:
        self.history = self.history[rows]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def rules(golden: dict[str, np.ndarray], **changes: object) -> DecodeRules:
    return DecodeRules(**{"length": golden["begin"].shape[1], "begin_id": 0, "end_id": 1, **changes})  # type: ignore[arg-type]


def random_model(seed: int, rows: int = 5, length: int = 12, vocabulary: int = 9) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    table = random.normal(size=(length, vocabulary, vocabulary)).astype(np.float32) * 2
    offsets = random.normal(size=(rows, vocabulary)).astype(np.float32)
    offsets[:, 1] += np.linspace(-60, 4, rows, dtype=np.float32)  # some rows end early, some never
    return table, offsets


def test_greedy_equals_reference(golden: dict[str, np.ndarray]) -> None:
    found = greedy(TableDecoder(golden["table"], golden["offsets"]), 4, rules(golden), never)
    expected = golden["greedy_tokens"]
    for row, sequence in enumerate(found):
        tokens = np.ones_like(expected[row])
        tokens[0], tokens[1 : 1 + len(sequence.ids)] = 0, sequence.ids
        assert np.array_equal(tokens, expected[row])
        assert sequence.score == pytest.approx(golden["greedy_log_probs"][row], rel=1e-5)


@pytest.mark.parametrize(("beams", "per_node"), [(3, 1), (3, 2), (4, 2), (2, 3)])
def test_beams_equal_reference(golden: dict[str, np.ndarray], beams: int, per_node: int) -> None:
    decoder = TableDecoder(golden["table"], golden["offsets"], beams)
    found = beam_search(decoder, 4, rules(golden, beams=beams, beams_per_node=per_node), never)
    assert np.array_equal(found.tokens, golden[f"beam{beams}_pn{per_node}_tokens"])
    np.testing.assert_allclose(found.scores, golden[f"beam{beams}_pn{per_node}_scores"], rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("beams", "per_node"), [(1, 1), (3, 1), (4, 2)])
def test_batch_equals_one_by_one(seed: int, beams: int, per_node: int) -> None:
    table, offsets = random_model(seed)
    use = DecodeRules(12, 0, 1, beams, per_node)

    def run(chosen: np.ndarray) -> list:
        decoder = TableDecoder(table, chosen, beams)
        if beams == 1:
            return greedy(decoder, len(chosen), use, never)
        return collect_beams(beam_search(decoder, len(chosen), use, never), use)

    together, alone = run(offsets), [run(offsets[i : i + 1])[0] for i in range(len(offsets))]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.ids, b.ids) and a.finished == b.finished and a.score == b.score
        assert np.array_equal(a.log_probs, b.log_probs) and np.array_equal(a.locations, b.locations)
    if beams == 1:
        assert {s.finished for s in together} == {True, False}  # the case is worth something only if both occur


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_locations_belong_to_their_tokens(seed: int, beams: int) -> None:
    """Every token's location is the one of the step that consumed it in the chosen hypothesis, also the last of a cut
    caption.
    """
    table, offsets = random_model(seed)
    use = DecodeRules(12, 0, 1, beams, 2 if beams > 1 else 1)
    if beams == 1:
        found = greedy(TableDecoder(table, offsets), 5, use, never)
    else:
        found = collect_beams(beam_search(TableDecoder(table, offsets, beams), 5, use, never), use)
    for sequence in found:
        assert len(sequence.locations) == len(sequence.ids) == len(sequence.log_probs)
        assert np.array_equal(sequence.locations[:, 0, 0], np.arange(1, len(sequence.ids) + 1))
        assert np.array_equal(sequence.locations[:, 0, 1], sequence.ids)
        assert np.array_equal(sequence.locations[:, 1, 0], np.cumsum(sequence.ids))


def test_beam_token_log_probs_sum_to_the_score() -> None:
    table, offsets = random_model(3)
    use = DecodeRules(12, 0, 1, 3, 2, ban_repeat=False)
    for sequence in collect_beams(beam_search(TableDecoder(table, offsets, 3), 5, use, never), use):
        if not sequence.finished:
            assert sequence.score == pytest.approx(float(sequence.log_probs.sum()), rel=1e-5)


def test_one_step_less_than_tokens_when_all_end() -> None:
    table, offsets = random_model(0)
    offsets[:, 1] = 50  # EOS at once
    decoder = TableDecoder(table, offsets)
    assert all(len(s.ids) == 0 and s.finished for s in greedy(decoder, 5, DecodeRules(12, 0, 1), never))
    assert decoder.steps == 1


def test_repetition_is_banned_in_greedy_only_when_told() -> None:
    table, offsets = np.zeros((8, 6, 6), np.float32), np.zeros((1, 6), np.float32)
    offsets[0, 3], offsets[0, 4] = 5, 4
    assert greedy(TableDecoder(table, offsets), 1, DecodeRules(8, 0, 1), never)[0].ids.tolist() == [3, 4, 3, 4, 3, 4]
    free = DecodeRules(8, 0, 1, ban_repeat=False)
    assert greedy(TableDecoder(table, offsets), 1, free, never)[0].ids.tolist() == [3] * 6


def test_top_of_ties_takes_the_lowest_index_first() -> None:
    table, offsets = np.zeros((6, 5, 5), np.float32), np.zeros((1, 5), np.float32)
    found = beam_search(TableDecoder(table, offsets, 2), 1, DecodeRules(6, 0, 1, 2, 1), never)
    assert found.tokens[0, -1, 1] == 1  # of five equal tokens 0 and 1 are looked at; 1 ends at once
    assert found.scores[0, 0] > NEG


@pytest.mark.parametrize(("width", "count"), [(5, 9), (64, 3), (1000, 8), (1000, 200)])
def test_top_is_a_stable_sort(width: int, count: int) -> None:
    values = np.random.default_rng(width).integers(0, 40, (6, width)).astype(np.float32)  # many ties
    found, indices = _top(values, count)
    expected = np.argsort(-values, axis=1, kind="stable")[:, :count]
    assert np.array_equal(indices, expected)
    assert np.array_equal(found, np.take_along_axis(values, expected, axis=1))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 12))
@settings(max_examples=300, deadline=None)
def test_the_likeliest_of_each_beam_are_enough(seed: int, rows: int, beams: int, per_node: int, kept: int) -> None:
    """Beam search takes what it would take of all logits: with ties, with beams that are none, whatever is kept."""
    random = np.random.default_rng(seed)
    logits = (random.integers(0, 6, (rows * beams, 12)) * random.choice([1e-6, 0.5, 4.0])).astype(np.float32)
    live = np.sort(random.choice([0, -0.5, -0.5, -700.25, NEG], (rows, beams)).astype(np.float32), axis=1)
    live[:, -1] = np.maximum(live[:, -1], -700.25)  # of a prompt that is not done one is always alive
    count = min(beams * per_node, 12)
    every = log_softmax(logits).reshape(rows, beams, 12)
    expected, flat = _top((every + live[:, :, None]).reshape(rows, -1), count)
    found = _continuations(Top.of_logits(logits, None, kept), live, count, np.zeros(rows, bool))
    scores, parents, ids, log_probs = found
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(parents * 12 + ids, flat)
    np.testing.assert_array_equal(log_probs, np.take_along_axis(every.reshape(rows, -1), flat, axis=1))


@pytest.mark.parametrize("candidates", [1, 4, 9])
def test_candidates_change_no_caption(candidates: int) -> None:
    table, offsets = random_model(2)
    for use in (DecodeRules(12, 0, 1), DecodeRules(12, 0, 1, 3, 2)):
        alike = []
        for kept in (candidates, 16):
            decoder = TableDecoder(table, offsets, use.beams, kept)
            alike.append(
                greedy(decoder, 5, use, never)
                if use.beams == 1
                else collect_beams(beam_search(decoder, 5, use, never), use)
            )
        for a, b in zip(*alike, strict=True):
            assert np.array_equal(a.ids, b.ids) and a.score == b.score and np.array_equal(a.locations, b.locations)


def test_a_banned_id_is_lowered_and_no_other() -> None:
    logits = np.array([[3, 2, 1], [3, 2, 1], [-2e4, 2, 1]], np.float32)
    top = Top.of_logits(logits, np.array([0, -1, 0]), 3)
    assert top.ids.tolist() == [[1, 2, 0], [0, 1, 2], [1, 2, 0]]
    lowered = np.array([[-1e4, 2, 1], [3, 2, 1], [-2e4, 2, 1]], np.float32)  # what is lower already stays
    np.testing.assert_array_equal(np.take_along_axis(log_softmax(lowered), top.ids, axis=1), top.log_probs)
    assert logits[0, 0] == 3 and top.logits is logits


def test_deadline_and_cancel_stop_between_steps() -> None:
    table, offsets = random_model(1)
    cancel = threading.Event()
    steps = greedy_steps(TableDecoder(table, offsets), 5, DecodeRules(12, 0, 1), DecodeOptions(cancel=cancel).start())
    next(steps)
    cancel.set()
    with pytest.raises(CancelledError):
        next(steps)
    for search in (greedy, beam_search):
        with pytest.raises(DeadlineError):
            search(TableDecoder(table, offsets), 5, DecodeRules(12, 0, 1), DecodeOptions(deadline_ms=0).start())


def test_nan_logits_are_an_error() -> None:
    table, offsets = random_model(1)
    offsets[2] = np.nan
    for search in (greedy, beam_search):
        with pytest.raises(EngineError):
            search(TableDecoder(table, offsets), 5, DecodeRules(12, 0, 1), never)


@pytest.mark.parametrize(
    "bad",
    [{"beams": 0}, {"beams": 1.5}, {"max_new_tokens": -1}, {"max_new_tokens": True}, {"deadline_ms": float("nan")}],
)
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(PromptError):
        DecodeOptions(**bad)  # type: ignore[arg-type]
