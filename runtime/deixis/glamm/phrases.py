"""Grounding the phrases of a given text. The paper mentions it and publishes neither prompt nor code, so this is our
definition; docs/tasks.md has it for users.

The text is put into the mouth of the model, as the answer to the question for a grounded description, in the form of
training: every phrase as `<p> phrase </p> [SEG]`. The mask of a phrase is that of the state that predicts its [SEG], as
when the model had said it itself.

Without given phrases the model marks them. The text is cut into words (letters and digits, with inner hyphens and
apostrophes) and single other signs. Before each of them the model has at most these ways to go on: copy it; inside a
phrase, close the phrase first; outside of one (or behind one that it just closed), open a phrase first, though only
before a word. Of these the likeliest is taken: P(next piece) against P(mark) * P(next piece | mark); [SEG] behind
`</p>` counts as certain. Signs that the tokenizer makes one piece of are not separated. A phrase still open at the end
of the text is closed there. As a way through a mark is never likelier than the mark itself, it is followed only if the
mark alone beats copying: one run of the decoder per word, and one per way that was tried.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deixis.conversation import MASK, PHRASE_END, PHRASE_START, PhraseSpan, tag_phrases
from deixis.decoding import log_softmax
from deixis.errors import EngineError, PromptError
from deixis.glamm.answers import phrase_of, show
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.questions import check_text, expanded, first_text, ids_of, room
from deixis.glamm.session import LanguageSession
from deixis.options import Check, DecodeOptions
from deixis.results import GroundedText
from deixis.tasks import Phrases

Floats = NDArray[np.float32]
Span = tuple[int, int]

_UNITS = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")


def ground_phrases(
    pipeline: GlammPipeline, scene: GlammFeatures, text: str, phrases: Phrases | None, options: DecodeOptions
) -> GroundedText:
    """The text with a mask for every phrase: the given ones, or those that the model marks (see above).

    Args:
        pipeline: of the model.
        scene: the picture.
        text: returned as it is; spans of the result are spans of it.
        phrases: substrings of the text, or spans (start, end) of its characters; at least one. A substring stands for
            its first occurrence as whole words that no earlier one has taken. None: the model marks them.
        options: deadline_ms and cancel apply.

    Raises:
        PromptError: empty text, control tokens, phrases that are not in the text, are empty or overlap.
        TextTooLongError: text and marks do not fit into the cache.
    """
    check = options.start()
    task = pipeline.task("ground_phrases")
    check_text(pipeline, text, "text")
    question = first_text(pipeline, task.instruction)
    transcript = Transcript(pipeline, scene, check)
    if phrases is None:
        room(pipeline, 0, ids_of(pipeline, f"{question} {text}"))
        spans = _marked_by_model(pipeline, transcript, question, text)
    else:
        spans = find_spans(text, phrases)
        transcript.consume(ids_of(pipeline, f"{question} {tag_phrases(text, spans)}"))
    states = transcript.mask_states(len(ids_of(pipeline, question)))
    shown = show(pipeline, states, [scene] * len(states), check)
    found = [PhraseSpan(text[start:end], start, end, index) for index, (start, end) in enumerate(spans)]
    return GroundedText(text, tuple(phrase_of(span, shown) for span in found))


def find_spans(text: str, phrases: Phrases) -> list[Span]:
    """Spans of phrases, in the order of the text, without white space at their ends. Raises PromptError."""
    if isinstance(phrases, str) or not isinstance(phrases, Sequence):
        raise PromptError("phrases must be a list of substrings of the text, or of spans (start, end)")
    if not phrases:
        raise PromptError("no phrases are given; leave them out to let the model mark them")
    taken: list[Span] = []
    for phrase in phrases:
        taken.append(_substring(text, phrase, taken) if isinstance(phrase, str) else _span(text, phrase))
    spans = sorted(taken)
    for (start, end), (following, _) in itertools.pairwise(spans):
        if following < end:
            raise PromptError(f"phrases overlap at {text[following:end]!r} (characters {start}..{end})")
    return spans


def _substring(text: str, phrase: str, taken: Sequence[Span]) -> Span:
    wanted = phrase.strip()
    if not wanted:
        raise PromptError("a phrase is empty")
    pattern = re.escape(wanted)
    pattern = (r"\b" if wanted[0].isalnum() else "") + pattern + (r"\b" if wanted[-1].isalnum() else "")
    places = [match.span() for match in re.finditer(pattern, text)]
    if not places:
        raise PromptError(f"phrase {phrase!r} does not stand in the text as whole words")
    for start, end in places:
        if all(end <= other_start or other_end <= start for other_start, other_end in taken):
            return start, end
    raise PromptError(f"phrase {phrase!r} stands in the text only where another phrase does")


def _span(text: str, span: object) -> Span:
    try:
        start, end = (int(v) for v in span)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise PromptError(f"a phrase must be a substring or (start, end), found {str(span)[:60]!r}") from None
    if not 0 <= start < end <= len(text):
        raise PromptError(f"phrase ({start}, {end}) lies outside the text of {len(text)} characters, or is empty")
    inside = text[start:end]
    if not inside.strip():
        raise PromptError(f"phrase ({start}, {end}) is only white space")
    return start + len(inside) - len(inside.lstrip()), end - (len(inside) - len(inside.rstrip()))


class Transcript:
    """Ids that one session has consumed, of which another text may change the end: only what differs is run."""

    def __init__(self, pipeline: GlammPipeline, scene: GlammFeatures, check: Check) -> None:
        self._pipeline, self._scene, self._check = pipeline, scene, check
        self._spec = pipeline.conversation
        self._ids: list[int] = []
        self._session: LanguageSession | None = None

    def consume(self, ids: Sequence[int]) -> Floats:
        """Log-probabilities [vocab] of what follows `ids`."""
        room(self._pipeline, 0, ids)
        self._check()
        if self._session is None:
            self._session = self._pipeline.session([self._scene], expanded(ids, self._spec))
        same = 0
        while same < min(len(ids) - 1, len(self._ids)) and ids[same] == self._ids[same]:
            same += 1
        self._session.rewind(expanded(ids[:same], self._spec))
        logits = self._session.feed(np.array([ids[same:]], np.int64))[0].logits
        if logits is None or not np.isfinite(logits).all():
            raise EngineError(
                "the decoder gave logits that are not finite; verify the bundle, or use a higher precision"
            )
        self._ids = list(ids)
        return log_softmax(np.array(logits, np.float32))[0]

    def mask_states(self, first: int) -> list[Floats]:
        """The state [D] that predicts each [SEG] from index `first` on."""
        assert self._session is not None
        places = [i for i in range(first, len(self._ids)) if self._ids[i] == self._spec.mask_id]
        return [self._session.states[0, expanded(self._ids[:i], self._spec) - 1] for i in places]


@dataclass(frozen=True)
class _Draft:
    """A beginning of the text with marks. answer: it, marked. copied: characters of the text that are in it."""

    text: str
    answer: str = ""
    copied: int = 0
    opened: int | None = None  # where the open phrase begins
    spans: tuple[Span, ...] = ()

    @property
    def inside(self) -> bool:
        return self.opened is not None

    @property
    def begun(self) -> bool:
        """A phrase is open and has no word yet."""
        return self.opened is not None and self.copied <= self.opened

    def copy(self, unit: Span) -> _Draft:
        begin = unit[0] if self.begun else self.copied
        return replace(self, answer=self.answer + self.text[begin : unit[1]], copied=unit[1])

    def open(self, unit: Span) -> _Draft:
        gap = self.text[self.copied : unit[0]]
        return replace(self, answer=f"{self.answer}{gap}{PHRASE_START} ", opened=unit[0])

    def close(self) -> _Draft:
        assert self.opened is not None
        spans = (*self.spans, (self.opened, self.copied))
        return replace(self, answer=f"{self.answer} {PHRASE_END} {MASK}", opened=None, spans=spans)


def _marked_by_model(pipeline: GlammPipeline, transcript: Transcript, question: str, text: str) -> list[Span]:
    """Spans of the phrases that the model marks; the transcript has consumed the marked text then."""
    spec = pipeline.conversation

    def ids(draft: _Draft) -> list[int]:
        return ids_of(pipeline, f"{question} {draft.answer}" if draft.answer else question)

    def best(draft: _Draft, log_probs: Floats, unit: Span) -> tuple[float, _Draft]:
        """The likeliest way to the draft that has one unit more, and its log-probability."""
        plain, so_far = draft.copy(unit), ids(draft)
        following = ids(plain)
        if following[: len(so_far)] != so_far or len(following) == len(so_far):
            return 0.0, plain  # the tokenizer makes one piece of it and what precedes it
        way = float(log_probs[following[len(so_far)]]), plain
        if draft.begun or not (draft.inside or text[unit[0]].isalnum()):
            return way
        marked = draft.close() if draft.inside else draft.open(unit)
        mark = float(log_probs[spec.phrase_end_id if draft.inside else spec.phrase_start_id])
        if mark > way[0]:
            further, through = best(marked, transcript.consume(ids(marked)), unit)
            way = max(way, (mark + further, through), key=lambda found: found[0])
        return way

    draft = _Draft(text)
    log_probs = transcript.consume(ids(draft))
    for match in _UNITS.finditer(text):
        _, draft = best(draft, log_probs, match.span())
        log_probs = transcript.consume(ids(draft))
    if draft.inside:
        draft = draft.close()
        transcript.consume(ids(draft))
    return list(draft.spans)
