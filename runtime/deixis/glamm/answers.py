"""From generated ids and states to texts with phrases and masks (sections 6.1, 6.6 and 8)."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deixis.conversation import ParsedAnswer, PhraseSpan, parse_answer_ids
from deixis.decoding import GreedyStep
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.masks import segment_mask
from deixis.options import Check
from deixis.results import GroundedPhrase, GroundedText, Mask, Word

Floats = NDArray[np.float32]
Piece = Word | GroundedPhrase


@dataclass
class Answer:
    """What one row has generated so far.

    ids: without the end. log_probs: of the ids. states: [D] of each [SEG], the one that predicted it. total:
    log-probability of all, the end included.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    states: list[Floats] = field(default_factory=list)
    total: float = 0.0
    finished: bool = False

    def take(self, step: GreedyStep, row: int, pipeline: GlammPipeline) -> bool:
        """Take what a step chose for a row; False when the answer has ended."""
        assert step.ids is not None
        piece, log_prob = int(step.ids[row]), float(step.log_probs[row])
        if self.finished:
            return False
        self.total += log_prob
        if piece == pipeline.manifest.tokenizer.end_id:
            self.finished = True
            return False
        self.ids.append(piece)
        self.log_probs.append(log_prob)
        if piece == pipeline.conversation.mask_id:
            self.states.append(np.array(step.locations[row], np.float32))
        return True

    @property
    def score(self) -> float:
        """Log-probability per token, as for captions: the end counts in the sum, not in the number."""
        return self.total / max(1, len(self.ids))

    def parse(self, pipeline: GlammPipeline, count: int | None = None) -> ParsedAnswer:
        """What the first `count` ids say; all of them by default."""
        return parse_answer_ids(self.ids[:count], pipeline.tokenizer.decode, pipeline.conversation)


class Reader:
    """Words of a growing answer, each once, as soon as it is complete.

    A word is what stands between white space or marks, so the full stop behind a phrase's mask is a word of its own.
    Spans are those of the final text.
    """

    def __init__(self, pipeline: GlammPipeline, answer: Answer) -> None:
        self._pipeline, self._answer = pipeline, answer
        self._ends: list[int] = []  # where the text ended after each id
        self._given = 0

    def read(self, count: int, closed: bool) -> tuple[ParsedAnswer, list[Word]]:
        """Look at the first `count` ids; `closed`: no id will continue their last word."""
        parsed = self._answer.parse(self._pipeline, count)
        if count > len(self._ends):
            self._ends.append(max(len(parsed.text), self._ends[-1] if self._ends else 0))
        limit = len(parsed.text) if closed else _last_word(parsed.text)
        found = re.compile(r"\S+").finditer(parsed.text, self._given, max(limit, self._given))
        words = [Word(m.group(), m.start(), m.end(), None, self._score(*m.span())) for m in found]
        self._given = max(self._given, limit)
        return parsed, words

    def _score(self, start: int, end: int) -> float | None:
        """Mean log-probability of the ids that added characters of a span."""
        starts = [0, *self._ends]
        own = [i for i, own_end in enumerate(self._ends) if starts[i] < end and own_end > max(start, starts[i])]
        return float(np.mean([self._answer.log_probs[i] for i in own])) if own else None


def words_of_answer(pipeline: GlammPipeline, answer: Answer) -> tuple[ParsedAnswer, tuple[Word, ...]]:
    """All that `Reader` gives of a whole answer."""
    reader = Reader(pipeline, answer)
    words: list[Word] = []
    for count, piece in enumerate(answer.ids, 1):
        words += reader.read(count, is_mark(pipeline, piece))[1]
    parsed, last = reader.read(len(answer.ids), True)
    return parsed, (*words, *last)


def is_mark(pipeline: GlammPipeline, piece: int) -> bool:
    spec = pipeline.conversation
    return piece in (spec.mask_id, spec.phrase_start_id, spec.phrase_end_id)


@dataclass(frozen=True)
class Shown:
    """A mask in pixels of the picture, and the mask decoder's predicted IoU."""

    mask: Mask
    score: float


def show(
    pipeline: GlammPipeline, states: Sequence[Floats], features: Sequence[GlammFeatures], check: Check
) -> list[Shown]:
    """The masks of states [D], each in its picture; the result is that of one at a time."""
    if not states:
        return []
    check()
    logits, scores = pipeline.masks(np.stack(states), features)
    threshold = pipeline.manifest.mask.threshold
    masks = [segment_mask(m, one.geometry, threshold) for m, one in zip(logits, features, strict=True)]
    return [Shown(Mask.from_array(mask), float(score)) for mask, score in zip(masks, scores, strict=True)]


def phrase_of(span: PhraseSpan, shown: Sequence[Shown]) -> GroundedPhrase:
    own = None if span.mask_index is None else shown[span.mask_index]
    if own is None:
        return GroundedPhrase(span.text, span.start, span.end)
    return GroundedPhrase(span.text, span.start, span.end, own.mask, own.mask.box, own.score)


def grounded_text(answer: Answer, parsed: ParsedAnswer, shown: Sequence[Shown]) -> GroundedText:
    """An answer whose masks have been decoded: `shown` has one for every [SEG], in their order."""
    return GroundedText(
        text=parsed.text,
        phrases=tuple(phrase_of(span, shown) for span in parsed.phrases),
        masks=tuple(shown[index].mask for index in parsed.loose_masks),
        problems=parsed.problems,
        score=answer.score,
        ids=tuple(answer.ids),
        finished=answer.finished,
    )


def stream_answer(
    pipeline: GlammPipeline, features: GlammFeatures, answer: Answer, steps: Iterable[GreedyStep], check: Check
) -> Generator[Piece, None, GroundedText]:
    """Words as they are complete, and phrases as soon as their mask is decoded, right behind their words.

    A phrase that gets no mask comes when that is certain: with the next phrase, or at the end. Phrases come in the
    order of the text. `answer` is filled on the way.
    """
    reader = Reader(pipeline, answer)
    shown: list[Shown] = []
    given = 0
    for step in steps:
        if not answer.take(step, 0, pipeline):
            break
        parsed, words = reader.read(len(answer.ids), is_mark(pipeline, answer.ids[-1]))
        yield from words
        if len(answer.states) > len(shown):
            shown += show(pipeline, answer.states[len(shown) :], [features], check)
        certain = parsed.phrases
        if certain and certain[-1].mask_index is None:
            certain = certain[:-1]  # it may still get one
        for span in certain[given:]:
            given += 1
            yield phrase_of(span, shown)
    parsed, words = reader.read(len(answer.ids), True)
    yield from words
    for span in parsed.phrases[given:]:
        yield phrase_of(span, shown)
    return grounded_text(answer, parsed, shown)


def _last_word(text: str) -> int:
    """Where the last word begins."""
    return max((match.end() for match in re.finditer(r"\s", text)), default=0)
