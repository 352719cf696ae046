"""Ids in lockstep out of language sessions: greedy generation behind prompts (section 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis.batching import group_indices, pick
from deixis.bundle import TaskSpec
from deixis.decoding import DecodeRules, GreedyStep, Top, greedy_steps
from deixis.errors import PromptError
from deixis.glamm.answers import Answer
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.questions import Asked, check_length, expanded, first_text, ids_of, regions_of, room
from deixis.glamm.session import LanguageSession
from deixis.options import Check, DecodeOptions

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """One question about one picture, as the first of a conversation. ids: IMAGE_ID once, `<bbox>` once per box."""

    features: GlammFeatures
    question: Asked
    ids: list[int]

    @classmethod
    def of(cls, pipeline: GlammPipeline, task: TaskSpec, features: GlammFeatures, question: Asked) -> Request:
        """Raises TextTooLongError when the question is longer than the task's may be."""
        check_length(pipeline, task, question.text)
        return cls(features, question, ids_of(pipeline, first_text(pipeline, question.text)))


class PromptedDecoder:
    """A session as search wants it. The first step consumes the prompt in place of the begin id; what search calls the
    location of a consumed id is its state [D], which is the one that predicts the id chosen in that step.
    """

    def __init__(self, session: LanguageSession, ids: Ids, regions: Sequence[Floats | None]) -> None:
        self._session = session
        self._prompt: tuple[Ids, Sequence[Floats | None]] | None = (ids, regions)

    def step(self, ids: Ids, banned: Ids | None = None) -> tuple[Top, Floats]:
        """The likeliest next ids, and states [R, D] of the consumed."""
        if self._prompt is None:
            return self._session.step(ids, banned)
        prompt, self._prompt = self._prompt, None
        top, states = self._session.feed(*prompt, banned)
        return top, states[:, -1]


def most_new_tokens(task: TaskSpec, options: DecodeOptions, left: int) -> int:
    """How many ids to generate: what is asked for, at most what there is room for. Raises PromptError for beams."""
    if options.beams not in (None, 1):
        raise PromptError(f"this model decodes greedily, found {options.beams} beams; leave them out")
    return max(1, min(task.max_length if options.max_new_tokens is None else options.max_new_tokens, left))


def steps_of(
    pipeline: GlammPipeline, decoder: PromptedDecoder, rows: int, task: TaskSpec, count: int, check: Check
) -> Iterator[GreedyStep]:
    """At most `count` steps; `locations` of a step are the states [R, D] that predicted its ids."""
    spec = pipeline.manifest.tokenizer
    rules = DecodeRules(count + 2, spec.begin_id, spec.end_id, ban_repeat=task.ban_repeat)
    for step in greedy_steps(decoder, rows, rules, check):
        yield step
        if step.index == count:  # the last id need not be consumed
            return


def start(
    pipeline: GlammPipeline, requests: Sequence[Request], task: TaskSpec, options: DecodeOptions, check: Check
) -> Iterator[GreedyStep]:
    """Steps of requests of equal length, which run together."""
    features = [request.features for request in requests]
    ids = np.array([request.ids for request in requests], np.int64)
    count = most_new_tokens(task, options, room(pipeline, 0, requests[0].ids))
    check()
    regions = regions_of(pipeline, features, [request.question.boxes for request in requests])
    session = pipeline.session(features, expanded(requests[0].ids, pipeline.conversation))
    return steps_of(pipeline, PromptedDecoder(session, ids, regions), len(requests), task, count, check)


def generate(
    pipeline: GlammPipeline,
    requests: Sequence[Request],
    task: TaskSpec,
    options: DecodeOptions,
    check: Check,
    until_mask: bool = False,
) -> list[Answer]:
    """The answers to requests. Prompts of equal length run in lockstep; the result is that of one at a time.

    until_mask: nothing behind an answer's first [SEG] is wanted, so the row may end there.
    """
    for request in requests:  # all that can be refused is refused before anything runs
        most_new_tokens(task, options, room(pipeline, 0, request.ids))
    answers = [Answer() for _ in requests]
    for group in group_indices((len(request.ids), len(request.question.boxes)) for request in requests):
        alike = pick(requests, group)
        for chunk in pipeline.chunks([request.features for request in alike], len(alike[0].question.boxes)):
            rows = pick(group, chunk)
            going = set(range(len(rows)))
            for step in start(pipeline, pick(requests, rows), task, options, check):
                for row in sorted(going):
                    answer = answers[rows[row]]
                    if not answer.take(step, row, pipeline) or (until_mask and answer.states):
                        going.discard(row)
                if not going:
                    break
    return answers
