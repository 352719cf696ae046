"""Captions: prompts in, words with places out, in batches or as a stream (sections 8 and 11)."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from deixis.batching import SceneFeatures, group_indices, pick
from deixis.bundle import TaskSpec
from deixis.caches import StepDecoder
from deixis.decoding import Decoded, DecodeRules, beam_search, collect_beams, greedy, greedy_steps
from deixis.geometry import Geometry
from deixis.options import Check, DecodeOptions
from deixis.pipeline import Pipeline
from deixis.prompts import Prompt, PromptTokens, prompt_tokens
from deixis.readout import make_words, valid_positions
from deixis.results import Box, Caption, Word
from deixis.streams import ResultStream
from deixis.tokenizer import Spelling, WordPieces, words_of


class CaptionStream(ResultStream[Word, Caption]):
    """Words of one caption as they come; `caption` is the whole of it.

    A word comes as soon as its last piece has been consumed, so with its final place. Beam search knows its winner only
    at the end: then all words come at once.
    """

    @property
    def caption(self) -> Caption:
        """The finished caption. Words not yet taken are run through first. Raises what the stream raised."""
        return self.result


def caption_batch(
    pipeline: Pipeline, scenes: Sequence[SceneFeatures], prompts: Sequence[Prompt], options: DecodeOptions
) -> list[Caption]:
    """One caption per (scene, prompt) pair; the result is that of one at a time."""
    check = options.start()
    tokens = [_tokens(pipeline, scene, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]
    names = [task_name(prompt) for prompt in prompts]
    captions: list[Caption | None] = [None] * len(prompts)
    for group in group_indices(names):
        task = pipeline.task(names[group[0]])
        rules = decode_rules(pipeline, task, options)
        for chunk in pipeline.chunks(pick(scenes, group), rules.beams):
            rows = pick(group, chunk)
            decoded = _decode(pipeline, pick(scenes, rows), pick(tokens, rows), task, rules, check)
            for row, sequence in zip(rows, decoded, strict=True):
                captions[row] = make_caption(pipeline, task, sequence, scenes[row].geometry, tokens[row].box)
    return [caption for caption in captions if caption is not None]


def stream_caption(pipeline: Pipeline, scene: SceneFeatures, prompt: Prompt, options: DecodeOptions) -> CaptionStream:
    """The caption of one pair as a stream. Prompt and options are checked now, the rest happens as words are taken."""
    check = options.start()
    tokens = _tokens(pipeline, scene, prompt)
    task = pipeline.task(task_name(prompt))
    rules = decode_rules(pipeline, task, options)
    pipeline.chunks([scene], rules.beams)
    if rules.beams > 1:
        return CaptionStream(_stream_at_end(pipeline, scene, tokens, task, rules, check))
    return CaptionStream(_stream_greedy(pipeline, scene, tokens, task, rules, check))


def task_name(prompt: Prompt) -> str:
    return "caption" if prompt.is_whole else "region_caption"


def decode_rules(pipeline: Pipeline, task: TaskSpec, options: DecodeOptions) -> DecodeRules:
    """The task's rules with the caller's options. The cache holds every id but the last place: it bounds the length."""
    wanted = task.max_length if options.max_new_tokens is None else options.max_new_tokens + 2
    spec = pipeline.manifest.tokenizer
    return DecodeRules(
        length=max(3, min(wanted, pipeline.capacity + 1)),
        begin_id=spec.begin_id,
        end_id=spec.end_id,
        beams=task.beams if options.beams is None else options.beams,
        beams_per_node=task.beams_per_node,
        alpha=task.alpha,
        ban_repeat=task.ban_repeat,
    )


def _tokens(pipeline: Pipeline, scene: SceneFeatures, prompt: Prompt) -> PromptTokens:
    pipeline.require(task_name(prompt))
    return pipeline.checked(prompt_tokens(prompt, scene.geometry, pipeline.prompts))


def start_decoder(
    pipeline: Pipeline,
    scenes: Sequence[SceneFeatures],
    tokens: Sequence[PromptTokens],
    task: TaskSpec,
    rules: DecodeRules,
    check: Check,
) -> StepDecoder:
    """A decoder that has read its prompts and generated nothing yet."""
    check()
    prefix = pipeline.prefix(scenes, tokens)
    check()
    cross = pipeline.cross(prefix, [pipeline.context_ids(task)] * len(tokens))
    return pipeline.decoder(cross, rules.beams, rules.length)


def _decode(
    pipeline: Pipeline,
    scenes: Sequence[SceneFeatures],
    tokens: Sequence[PromptTokens],
    task: TaskSpec,
    rules: DecodeRules,
    check: Check,
) -> list[Decoded]:
    decoder = start_decoder(pipeline, scenes, tokens, task, rules, check)
    if rules.beams == 1:
        return greedy(decoder, len(tokens), rules, check)
    return collect_beams(beam_search(decoder, len(tokens), rules, check), rules)


def _stream_greedy(
    pipeline: Pipeline, scene: SceneFeatures, tokens: PromptTokens, task: TaskSpec, rules: DecodeRules, check: Check
) -> Generator[Word, None, Caption]:
    decoder = start_decoder(pipeline, [scene], [tokens], task, rules, check)
    spelling = Spelling(pipeline.tokenizer)
    log_probs: list[np.float32] = []
    locations: list[np.ndarray] = []  # one less than ids until the last id is consumed
    told = 0  # characters of the text whose words have been given
    finished = False
    for step in greedy_steps(decoder, 1, rules, check):
        if step.index > 1:
            locations.append(step.locations[0].copy())
        log_probs.append(step.log_probs[0])
        finished = step.ids is not None and step.ids[0] == rules.end_id
        if step.ids is not None and not finished:
            spelling.add(int(step.ids[0]))
        whole = len(locations) == len(spelling.ids)
        words = words_of(spelling.text, spelling.spans, told)
        if not whole:  # the last word may go on
            words = [word for word in words[:-1] if max(word.pieces, default=0) < len(locations)]
        if words:
            told = words[-1].end
            yield from _words(pipeline, task, spelling, words, log_probs, locations, scene.geometry)
    count = len(spelling.ids)
    score = float(np.sum(log_probs, dtype=np.float32) / np.float32(max(1, count)))
    sequence = Decoded(
        np.array(spelling.ids, np.int64),
        np.array(log_probs[:count], np.float32),
        np.array(locations, np.float32).reshape(count, pipeline.points, 2),
        score,
        finished,
    )
    return make_caption(pipeline, task, sequence, scene.geometry, tokens.box)


def _stream_at_end(
    pipeline: Pipeline, scene: SceneFeatures, tokens: PromptTokens, task: TaskSpec, rules: DecodeRules, check: Check
) -> Generator[Word, None, Caption]:
    [sequence] = _decode(pipeline, [scene], [tokens], task, rules, check)
    caption = make_caption(pipeline, task, sequence, scene.geometry, tokens.box)
    yield from caption.words
    return caption


def make_caption(pipeline: Pipeline, task: TaskSpec, sequence: Decoded, geometry: Geometry, box: Box | None) -> Caption:
    """A decoded sequence as text and words; `box` is the region it describes, in pixels of the picture."""
    spelling = Spelling(pipeline.tokenizer)
    for piece in sequence.ids:
        spelling.add(int(piece))
    found = words_of(spelling.text, spelling.spans)
    words = _words(pipeline, task, spelling, found, sequence.log_probs, sequence.locations, geometry)
    return Caption(spelling.text.rstrip(), words, sequence.score, tuple(spelling.ids), sequence.finished, box)


def _words(
    pipeline: Pipeline,
    task: TaskSpec,
    spelling: Spelling,
    words: Sequence[WordPieces],
    log_probs: Sequence[np.float32] | np.ndarray,
    locations: Sequence[np.ndarray] | np.ndarray,
    geometry: Geometry,
) -> tuple[Word, ...]:
    """Words of the text so far; locations [points, 2] and log_probs of its ids, in their order. Of the ids only those
    of the words are looked at, so that a stream does not look at all of them with every word.
    """
    pieces = [piece for word in words for piece in word.pieces]
    if not words:
        return ()
    first, behind = min(pieces, default=0), max(pieces, default=-1) + 1
    spec = pipeline.manifest.tokenizer
    ids = np.array([*spelling.ids[first : behind + 1], spec.end_id], np.int64)  # with the one behind, which may matter
    valid = valid_positions(ids, task.points_at, spec)
    known = np.asarray(locations[first:behind], np.float32).reshape(behind - first, pipeline.points, 2)
    own = [WordPieces(word.start, word.end, tuple(piece - first for piece in word.pieces)) for word in words]
    return make_words(spelling.text, own, known, valid, np.asarray(log_probs[first:behind], np.float32), geometry)
