"""Greedy decoding and beam search, exactly as the reference does them (section 11), many prompts in lockstep.

Both work on a `Decoder`, which holds caches and knows nothing of search. The id array of a prompt has `length` places:
BOS at 0, generated ids at 1 .. length - 2, the last place is never written. One step consumes the ids at `index - 1`
and chooses those at `index`; the location it returns belongs to the consumed id. So the last id of a caption that was
cut by the length is consumed by one extra step, which chooses nothing.

Of the logits of a step only the likeliest ids count, a handful per row (`Top`): the graph picks them, so nothing here
is as wide as the vocabulary, but for ties that a handful cannot settle.

Rows never influence each other: each prompt ends by its own rule, so a batch gives what its prompts give one by one.
(The reference ends beam search when all rows may end; a row that may end cannot change any more, as no later hypothesis
can score higher than the bound of the stop rule.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deixis.errors import EngineError
from deixis.options import Check

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

NEG = np.float32(-1e7)  # keeps a hypothesis out of the live or the finished set
_BLOCK = 64  # values whose maximum is taken together in the search for the largest
REPEAT_CEILING = np.float32(-1e4)  # the logit of the previous id is lowered to this at most


@dataclass(frozen=True)
class Top:
    """The likeliest next ids of R rows, best first, of equally likely ones the lower id first.

    ids [R, K]; log_probs [R, K] of them among all ids, banned ones lowered before. logits [R, V] as the model gives
    them, nothing lowered; None where the graph's were not asked for.
    """

    ids: Ids
    log_probs: Floats
    logits: Floats | None = None

    @classmethod
    def of_logits(cls, logits: Floats, banned: Ids | None, count: int) -> Top:
        """What a graph makes of its logits [R, V], in numpy; K is `count`, or V if that is less.

        banned [R]: an id whose logit is lowered to REPEAT_CEILING at most; -1 for none.
        """
        allowed = np.array(logits, np.float32)
        if banned is not None:
            rows = np.flatnonzero(banned >= 0)
            own = banned[rows]
            allowed[rows, own] = np.minimum(allowed[rows, own], REPEAT_CEILING)
        log_probs, ids = _top(log_softmax(allowed), count)
        return cls(ids, log_probs, logits)


class Stepper(Protocol):
    """What greedy search needs of a model. Returned arrays may be overwritten by the next step."""

    def step(self, ids: Ids, banned: Ids | None = None) -> tuple[Top, Floats]:
        """Consume one id per row, ids [R]; `banned` [R] as in `Top.of_logits`.

        Returns the likeliest next ids and locations [R, points, 2] of the consumed; greedy search hands on whatever the
        model knows of a consumed id, [R, ...].
        """
        ...


class Decoder(Stepper, Protocol):
    """What beam search needs of a model. Its steps give logits too."""

    def reorder(self, rows: Ids) -> None:
        """Row r continues what row rows[r] was, rows [R]."""
        ...


@dataclass(frozen=True)
class DecodeRules:
    """How to decode: `length` places of the id array (at least 3), see `TaskSpec` for the others."""

    length: int
    begin_id: int
    end_id: int
    beams: int = 1
    beams_per_node: int = 1
    alpha: float = 0.6
    ban_repeat: bool = True


@dataclass(frozen=True)
class GreedyStep:
    """One step of N rows.

    index: place of `ids` in the id array. ids [N]: chosen ids, EOS for a row that has ended; None in the extra step of
    rows cut by the length. log_probs [N]: of the chosen ids, 0 for a row that had ended. locations [N, points, 2]: of
    the ids at index - 1.
    """

    index: int
    ids: Ids | None
    log_probs: Floats
    locations: Floats


@dataclass(frozen=True)
class Decoded:
    """One generated sequence of n ids, BOS and EOS left out.

    ids [n], log_probs [n] of the ids, locations [n, points, 2] relative to the valid picture, score as in section 11
    (an unfinished beam's is its plain log-probability), finished: it ended with EOS.
    """

    ids: Ids
    log_probs: Floats
    locations: Floats
    score: float
    finished: bool


@dataclass(frozen=True)
class Beams:
    """All hypotheses of N rows, best last: tokens [N, K, L], scores [N, K], and per token log_probs [N, K, L] and
    locations [N, K, L, points, 2]. finished [N]: the row's hypotheses ended with EOS. A slot nothing filled has score
    NEG."""

    tokens: Ids
    scores: Floats
    log_probs: Floats
    locations: Floats
    finished: NDArray[np.bool_]


def greedy_steps(decoder: Stepper, rows: int, rules: DecodeRules, check: Check) -> Iterator[GreedyStep]:
    """Decode greedily, one step at a time; ends when every row has ended or reached the length.

    `check` runs before each step.
    """
    previous = np.full(rows, rules.begin_id, np.int64)
    ended = np.zeros(rows, bool)
    for index in range(1, rules.length - 1):
        check()
        top, locations = decoder.step(previous, previous if rules.ban_repeat else None)
        ids, best = top.ids[:, 0].copy(), top.log_probs[:, 0].copy()
        _require_finite(best)
        ids[ended] = rules.end_id
        best[ended] = 0.0
        yield GreedyStep(index, ids, best, locations)
        previous = ids
        ended = ids == rules.end_id
        if ended.all():
            return
    check()
    _, locations = decoder.step(previous)
    yield GreedyStep(rules.length - 1, None, np.zeros(rows, np.float32), locations)


def greedy(decoder: Stepper, rows: int, rules: DecodeRules, check: Check) -> list[Decoded]:
    """Greedy decoding of `rows` prompts: the collected form of `greedy_steps`."""
    steps = [
        GreedyStep(s.index, s.ids, s.log_probs, s.locations.copy()) for s in greedy_steps(decoder, rows, rules, check)
    ]
    return [collect_greedy(steps, row, rules.end_id) for row in range(rows)]


def collect_greedy(steps: list[GreedyStep], row: int, end_id: int) -> Decoded:
    """The sequence of one row, from all its steps."""
    ids = np.array([step.ids[row] for step in steps if step.ids is not None], np.int64)
    ends = np.flatnonzero(ids == end_id)
    count = int(ends[0]) if len(ends) else len(ids)
    log_probs = np.array([step.log_probs[row] for step in steps], np.float32)
    locations = np.stack([step.locations[row] for step in steps])[1 : count + 1]
    # The EOS step counts in the sum, not in the number.
    score = float(log_probs.sum(dtype=np.float32) / np.float32(max(1, count)))
    return Decoded(ids[:count], log_probs[:count], locations, score, bool(len(ends)))


def beam_search(decoder: Decoder, rows: int, rules: DecodeRules, check: Check) -> Beams:
    """Beam search of `rows` prompts over a decoder of rows * beams rows, the beams of a prompt adjacent."""
    beams, length = rules.beams, rules.length
    live = _Hypotheses.empty(rows, beams, length, rules.end_id)
    live.tokens[:, :, 0] = rules.begin_id
    live_scores = np.tile(np.array([0.0] + [NEG] * (beams - 1), np.float32), (rows, 1))
    finished = _Hypotheses.empty(rows, beams, length, 0)
    finished_scores = np.full((rows, beams), NEG, np.float32)
    is_finished = np.zeros((rows, beams), bool)
    done = np.zeros(rows, bool)
    first_row = np.arange(rows)[:, None] * beams

    for index in range(1, length - 1):
        bound = live_scores[:, -1] / _penalty(length, rules.alpha)
        done |= is_finished.all(axis=1) & (finished_scores.min(axis=1) > bound)
        if done.all():
            break
        check()
        top, locations = decoder.step(live.tokens[:, :, index - 1].ravel())
        live.keep_locations(index - 1, locations)
        scores, parents, ids, log_probs = _continuations(top, live_scores, beams * rules.beams_per_node, done)
        _require_finite(scores)
        candidates = live.pick(parents)
        candidates.tokens[:, :, index] = ids
        candidates.log_probs[:, :, index] = log_probs
        ended = ids == rules.end_id

        live_scores, kept = _top(scores + ended * NEG, beams)
        live_scores, kept = live_scores[:, ::-1], kept[:, ::-1]
        live = candidates.pick(kept)
        decoder.reorder((first_row + np.take_along_axis(parents, kept, axis=1)).ravel())

        normalised = scores / _penalty(index, rules.alpha) + ~ended * NEG
        best, kept = _top(np.concatenate([finished_scores, normalised], axis=1), beams)
        best, kept = best[:, ::-1], kept[:, ::-1]
        finished_now = finished.join(candidates).pick(kept)
        flags = np.take_along_axis(np.concatenate([is_finished, ended], axis=1), kept, axis=1)
        finished.update(~done, finished_now)
        finished_scores = np.where(done[:, None], finished_scores, best)
        is_finished = np.where(done[:, None], is_finished, flags)

    some: NDArray[np.bool_] = np.logical_or.reduce(is_finished, axis=1)
    if not some.all():
        check()
        _, locations = decoder.step(live.tokens[:, :, length - 2].ravel())
        live.keep_locations(length - 2, locations)
    finished.update(~some, live)
    return Beams(
        finished.tokens,
        np.where(some[:, None], finished_scores, live_scores),
        finished.log_probs,
        finished.locations_of(),
        some,
    )


def collect_beams(beams: Beams, rules: DecodeRules) -> list[Decoded]:
    """The best sequence of every row."""
    return [collect_beam(beams, row, -1, rules) for row in range(len(beams.tokens))]


def collect_beam(beams: Beams, row: int, beam: int, rules: DecodeRules) -> Decoded:
    """One of a row's sequences."""
    ids = beams.tokens[row, beam, 1 : rules.length - 1]
    ends = np.flatnonzero(ids == rules.end_id)
    count = int(ends[0]) if len(ends) else len(ids)
    words = slice(1, count + 1)
    return Decoded(
        ids[:count],
        beams.log_probs[row, beam, words],
        beams.locations[row, beam, words],
        float(beams.scores[row, beam]),
        bool(beams.finished[row]),
    )


def _continuations(
    top: Top, live_scores: Floats, count: int, done: NDArray[np.bool_]
) -> tuple[Floats, Ids, Ids, Floats]:
    """The best `count` continuations of every prompt by one id: total scores, beams they continue, ids, and the ids'
    log-probabilities, all [N, count], best first; of equal ones the lower beam first, then the lower id.

    Of each beam its K likeliest ids are enough: what is not among them is less likely than K others of the same beam.
    But totals are rounded, so the last of a beam may be as good as the last that is taken, and so may be ids behind
    it. Then, and where K is too small, all logits decide. Prompts that are `done` [N] do not matter.
    """
    _require_finite(top.log_probs[:, 0])
    rows, beams = live_scores.shape
    kept = top.ids.shape[1]
    logits = top.logits
    assert logits is not None, "beam search needs a decoder that gives logits"
    vocabulary = logits.shape[1]
    if kept * beams >= min(count, beams * vocabulary):
        totals = (top.log_probs + live_scores.reshape(-1, 1)).reshape(rows, -1)
        places = (top.ids.reshape(rows, beams, kept) + np.arange(beams)[:, None] * vocabulary).reshape(rows, -1)
        order = np.lexsort((places, -totals))[:, :count]
        scores = np.take_along_axis(totals, order, axis=1)
        behind = totals.reshape(rows, beams, kept)[:, :, -1].max(axis=1) >= scores[:, -1]
        if kept == vocabulary or not (behind & ~done).any():
            ids = np.take_along_axis(top.ids.reshape(rows, -1), order, axis=1)
            log_probs = np.take_along_axis(top.log_probs.reshape(rows, -1), order, axis=1)
            return scores, order // kept, ids, log_probs
    every = log_softmax(np.asarray(logits, np.float32))
    scores, flat = _top((every + live_scores.reshape(-1, 1)).reshape(rows, -1), count)
    parents, ids = np.divmod(flat, vocabulary)
    return scores, parents, ids, np.take_along_axis(every.reshape(rows, -1), flat, axis=1)


def log_softmax(logits: Floats) -> Floats:
    """Log-softmax over the last axis, in float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float32))


def _penalty(length: int, alpha: float) -> np.float32:
    """Length penalty ((5 + length) / 6) ** alpha."""
    return np.float32((5.0 + length) / 6.0) ** np.float32(alpha)


def _top(values: Floats, count: int) -> tuple[Floats, Ids]:
    """Largest `count` of every row, descending; of equal values the lowest index first.

    Ties decide, so the order is exact.
    """
    count = min(count, values.shape[1])
    # A cheap bound first: `count` blocks have maxima of at least `least`, so that many values reach it. Few others do.
    blocks = np.maximum.reduceat(values, np.arange(0, values.shape[1], _BLOCK), axis=1)
    if blocks.shape[1] < count:
        blocks = values
    cut = blocks.shape[1] - count
    bounds = np.partition(blocks, cut, axis=1)[:, cut]
    indices = np.empty((len(values), count), np.int64)
    for row, (line, least) in enumerate(zip(values, bounds, strict=True)):
        near = np.flatnonzero(~(line < least))  # ascending; a stable sort keeps that order among equals
        indices[row] = near[np.argsort(-line[near], kind="stable")[:count]]
    return np.take_along_axis(values, indices, axis=1), indices


def _require_finite(values: Floats) -> None:
    if not np.isfinite(values).all():
        raise EngineError("the decoder gave logits that are not finite; verify the bundle, or use a higher precision")


@dataclass
class _Hypotheses:
    """Sequences with their log-probabilities and locations: tokens [N, M, L], log_probs [N, M, L], locations [N, M, L,
    points, 2].

    The number of points is only known after the first step; until then `locations` is None.
    """

    tokens: Ids
    log_probs: Floats
    locations: Floats | None = None

    @classmethod
    def empty(cls, rows: int, count: int, length: int, fill: int) -> _Hypotheses:
        shape = (rows, count, length)
        return cls(np.full(shape, fill, np.int64), np.zeros(shape, np.float32))

    def keep_locations(self, index: int, locations: Floats) -> None:
        """Store the locations [N * M, points, 2] of the ids at `index`."""
        rows, count, length = self.tokens.shape
        if self.locations is None:
            self.locations = np.zeros((rows, count, length, *locations.shape[1:]), np.float32)
        self.locations[:, :, index] = locations.reshape(rows, count, *locations.shape[1:])

    def locations_of(self) -> Floats:
        return np.zeros((*self.tokens.shape, 0, 2), np.float32) if self.locations is None else self.locations

    def pick(self, indices: Ids) -> _Hypotheses:
        """Sequences at `indices` [N, K] of every row, as copies."""
        row = np.arange(len(indices))[:, None]
        locations = None if self.locations is None else self.locations[row, indices]
        return _Hypotheses(self.tokens[row, indices], self.log_probs[row, indices], locations)

    def join(self, other: _Hypotheses) -> _Hypotheses:
        """This row's sequences followed by the other's."""
        theirs = other.locations_of()
        ours = (
            np.zeros((*self.tokens.shape, *theirs.shape[3:]), np.float32) if self.locations is None else self.locations
        )
        return _Hypotheses(
            np.concatenate([self.tokens, other.tokens], axis=1),
            np.concatenate([self.log_probs, other.log_probs], axis=1),
            np.concatenate([ours, theirs], axis=1),
        )

    def update(self, rows: NDArray[np.bool_], other: _Hypotheses) -> None:
        """Take over the rows [N] of `other`, which holds as many sequences."""
        if self.locations is None:
            self.locations = np.zeros_like(other.locations_of())
        self.tokens[rows], self.log_probs[rows] = other.tokens[rows], other.log_probs[rows]
        self.locations[rows] = other.locations_of()[rows]
