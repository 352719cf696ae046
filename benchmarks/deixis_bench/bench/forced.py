"""Generated texts of a given length, whatever the weights: the end token counts as any other.

A caption that ends early would be timed as a short one, and two bundles of different precision would be compared by
texts of different lengths. So search is told of an end id that does not exist; everything else is what a task does:
the same graphs in the same order, the same search, the same making of results. This is the one part of the benchmark
that looks inside the runtime.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import deixis
from deixis.captioning import decode_rules, make_caption, start_decoder, task_name
from deixis.decoding import Decoded, DecodeRules, GreedyStep, greedy_steps
from deixis.glamm.answers import Answer, grounded_text, show, words_of_answer
from deixis.glamm.generation import PromptedDecoder, Request
from deixis.glamm.grounded import in_instruction
from deixis.glamm.pipeline import GlammPipeline
from deixis.glamm.questions import Asked, expanded, regions_of
from deixis.pipeline import Pipeline
from deixis.prompts import prompt_tokens

NEVER = -1  # no token has this id


@dataclass
class Generated:
    """marks: `time.perf_counter` when each token was known. results: of the task, one per row. wide: the decoder read
    a prompt before the first token, in runs that are no steps.
    """

    marks: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    wide: bool = False


def captions(
    pipeline: Pipeline, scenes: Sequence[deixis.Scene], prompts: Sequence[deixis.Prompt], tokens: int
) -> Generated:
    """PixelLLM's captions of (scene, prompt) pairs in lockstep, greedy, of exactly `tokens` tokens.

    Raises PromptError when they do not fit into the cache.
    """
    options = deixis.DecodeOptions(max_new_tokens=tokens, beams=1)
    check = options.start()
    task = pipeline.task(task_name(prompts[0]))
    rules = dataclasses.replace(decode_rules(pipeline, task, options), end_id=NEVER)
    if rules.length != tokens + 2:
        raise deixis.PromptError(f"{tokens} new tokens do not fit: the model was loaded for {pipeline.capacity}")
    features: list[Any] = [scene.features for scene in scenes]
    given = [
        pipeline.checked(prompt_tokens(prompt, scene.geometry, pipeline.prompts))
        for scene, prompt in zip(scenes, prompts, strict=True)
    ]
    decoder = start_decoder(pipeline, features, given, task, rules, check)
    made = Generated()
    ids: list[np.ndarray] = []
    log_probs: list[np.ndarray] = []
    locations: list[np.ndarray] = []
    for step in greedy_steps(decoder, len(scenes), rules, check):
        locations.append(step.locations.copy())  # of the token before
        if step.ids is not None:
            made.marks.append(time.perf_counter())
            ids.append(step.ids)
            log_probs.append(step.log_probs)
    for row, (scene, tokens_of) in enumerate(zip(scenes, given, strict=True)):
        sequence = Decoded(
            np.array([step[row] for step in ids]),
            np.array([step[row] for step in log_probs], np.float32),
            np.array([step[row] for step in locations[1:]], np.float32),
            0.0,
            False,
        )
        made.results.append(make_caption(pipeline, task, sequence, scene.geometry, tokens_of.box))
    return made


def answers(
    pipeline: GlammPipeline,
    scenes: Sequence[deixis.Scene],
    name: str,
    text: str,
    tokens: int,
    boxes: Sequence[tuple[float, float, float, float]] = (),
    masks: int = 0,
) -> Generated:
    """GLaMM's answers to one question about every scene in lockstep, greedy, of exactly `tokens` tokens.

    name: the task, whose instruction `text` goes into. boxes: regions of every picture that the question names. masks:
    so many of the last tokens are taken for [SEG], and their masks decoded together.
    """
    task = pipeline.task(name)
    features: list[Any] = [scene.features for scene in scenes]
    question = Asked(in_instruction(task, text), tuple(boxes))
    requests = [Request.of(pipeline, task, one, question) for one in features]
    ids = np.array([request.ids for request in requests], np.int64)
    regions = regions_of(pipeline, features, [request.question.boxes for request in requests])
    session = pipeline.session(features, expanded(requests[0].ids, pipeline.conversation))
    rules = DecodeRules(tokens + 2, pipeline.manifest.tokenizer.begin_id, NEVER, ban_repeat=task.ban_repeat)
    check = deixis.DecodeOptions().start()
    made, rows = Generated(wide=True), [Answer() for _ in scenes]
    for step in greedy_steps(PromptedDecoder(session, ids, regions), len(rows), rules, check):
        made.marks.append(time.perf_counter())
        for row, answer in enumerate(rows):
            _take(answer, step, row, step.index > tokens - masks)
        if step.index == tokens:
            break
    shown = iter(
        show(pipeline, [s for a in rows for s in a.states], [f for f in features for _ in range(masks)], check)
    )
    for answer in rows:
        own = [next(shown) for _ in answer.states]
        if not masks:
            made.results.append(words_of_answer(pipeline, answer))
            continue
        # Forced ids hold no phrases that the masks could belong to.
        parsed = dataclasses.replace(answer.parse(pipeline), phrases=(), loose_masks=tuple(range(len(own))))
        made.results.append(grounded_text(answer, parsed, own))
    return made


def _take(answer: Answer, step: GreedyStep, row: int, with_mask: bool) -> None:
    assert step.ids is not None
    answer.ids.append(int(step.ids[row]))
    answer.log_probs.append(float(step.log_probs[row]))
    if with_mask:
        answer.states.append(np.array(step.locations[row], np.float32))
