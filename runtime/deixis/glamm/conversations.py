"""Chats: several questions about one picture, each answered in the light of those before (sections 5.2 and 8)."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deixis.conversation import follow_up_ids
from deixis.decoding import GreedyStep
from deixis.errors import ClosedError, PromptError
from deixis.glamm.answers import Answer, Piece, grounded_text, show, stream_answer
from deixis.glamm.generation import PromptedDecoder, most_new_tokens, steps_of
from deixis.glamm.grounded import GroundedStream, in_instruction
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.questions import (
    Asked,
    check_length,
    check_question,
    encode,
    expanded,
    first_text,
    ids_of,
    regions_of,
    room,
)
from deixis.glamm.session import LanguageSession
from deixis.options import Check, DecodeOptions
from deixis.prompts import Question
from deixis.results import Box, GroundedText
from deixis.streams import ResultStream


@dataclass(frozen=True)
class Turn:
    """A question and its answer. question: with its `<bbox>` marks. boxes: px of the picture, one per mark."""

    question: str
    boxes: tuple[Box, ...]
    answer: GroundedText

    def to_dict(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "boxes": [list(box) for box in self.boxes],
            "answer": self.answer.to_dict(),
        }


class Chat:
    """A conversation about one picture. Comes from `scene.chat()`; use it as a context manager, or call `close`.

    The picture is encoded once. What has been said stays in the decoder's cache, so a turn costs only its own question
    and answer. The masks of an answer are those of that answer alone.

    A turn that fails, is cancelled, passes its deadline or whose stream is closed before its end leaves the chat as it
    was before that turn. An answer that was cut by its length (finished=False) counts as said.

    One turn at a time: while one runs, or its stream has been begun and not finished, another raises PromptError, from
    whichever thread it comes. Different chats are independent of each other, also on one scene.
    """

    def __init__(self, pipeline: GlammPipeline, features: GlammFeatures) -> None:
        self._pipeline = pipeline
        self._task = pipeline.task("ask")
        self._features: GlammFeatures | None = features
        self._session: LanguageSession | None = None
        self._pending: list[int] = []  # said, but not yet consumed by the session
        self._turns: list[Turn] = []
        self._busy = threading.Lock()

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What has been said."""
        return tuple(self._turns)

    def close(self) -> None:
        """Give back the memory of the cache; `turns` stay readable. May be called twice.

        A turn that is running in another thread ends by itself, but cannot be followed by another.
        """
        self._features = self._session = None

    def ask(self, text: str, boxes: ArrayLike | None = None, options: DecodeOptions | None = None) -> GroundedText:
        """The next turn.

        Args:
            text: the question. It may name boxes by `<bbox>`; one that names none gets the marks behind it.
            boxes: [k, 4] (left, top, right, bottom) px of the picture.
            options: max_new_tokens, deadline_ms, cancel.

        Raises PromptError, TextTooLongError when the conversation has outgrown the cache, ClosedError, and as the
        options say.
        """
        chosen = options or DecodeOptions()
        check = chosen.start()
        asked = self._check(text, boxes, chosen)
        with self._turn() as features:
            answer = Answer()
            for step in self._steps(features, asked, chosen, check):
                if not answer.take(step, 0, self._pipeline):
                    break
            shown = show(self._pipeline, answer.states, [features] * len(answer.states), check)
            found = grounded_text(answer, answer.parse(self._pipeline), shown)
            self._keep(asked, answer, found)
            return found

    def stream(self, text: str, boxes: ArrayLike | None = None, options: DecodeOptions | None = None) -> GroundedStream:
        """The same as words and phrases with masks, as they come.

        The question is checked now. The turn begins when the first item is taken, and counts when the last has been; a
        stream that is closed or thrown away before gives the turn up.
        """
        chosen = options or DecodeOptions()
        check = chosen.start()
        return ResultStream(self._stream(self._check(text, boxes, chosen), chosen, check))

    def _stream(self, asked: Asked, options: DecodeOptions, check: Check) -> Generator[Piece, None, GroundedText]:
        with self._turn() as features:
            answer = Answer()
            steps = self._steps(features, asked, options, check)
            found = yield from stream_answer(self._pipeline, features, answer, steps, check)
            self._keep(asked, answer, found)
            return found

    def _check(self, text: str, boxes: ArrayLike | None, options: DecodeOptions) -> Asked:
        asked = check_question(self._pipeline, self._open().geometry, Question(text, boxes))
        most_new_tokens(self._task, options, 1)
        text = in_instruction(self._task, asked.text)
        check_length(self._pipeline, self._task, text)
        return Asked(text, asked.boxes)

    def _open(self) -> GlammFeatures:
        features = self._features
        if features is None:
            raise ClosedError("the chat was closed; start another one with scene.chat()")
        return features

    @contextmanager
    def _turn(self) -> Iterator[GlammFeatures]:
        """One turn alone; when it does not come to its end, everything is as before."""
        if not self._busy.acquire(blocking=False):
            raise PromptError("a turn of this chat is not finished: take all of its stream, or close it")
        try:
            features, session, pending = self._open(), self._session, self._pending
            position = 0 if session is None else session.position
            try:
                yield features
            except BaseException:
                if self._features is not None:
                    self._session, self._pending = session, pending
                if session is not None:
                    session.rewind(position)
                raise
        finally:
            self._busy.release()

    def _steps(
        self, features: GlammFeatures, asked: Asked, options: DecodeOptions, check: Check
    ) -> Iterator[GreedyStep]:
        """Begin the answer: the session has consumed all that was said before, and the steps consume the question."""
        pipeline, session = self._pipeline, self._session
        if session is None:
            ids = ids_of(pipeline, first_text(pipeline, asked.text))
        else:
            said = follow_up_ids(pipeline.conversation, asked.text, lambda part: encode(pipeline, part))
            ids = [*self._pending, *said]
        count = most_new_tokens(self._task, options, room(pipeline, session.position if session else 0, ids))
        check()
        regions = regions_of(pipeline, [features], [asked.boxes])
        if session is None:
            session = self._session = pipeline.session([features], expanded(ids, pipeline.conversation))
        elif len(self._pending) > 1:  # a cut answer's last id: stepped, for in a prompt <bbox> would want a box
            session.step(np.array(ids[:1], np.int64))
            ids = ids[1:]
        decoder = PromptedDecoder(session, np.array([ids], np.int64), regions)
        return steps_of(pipeline, decoder, 1, self._task, count, check)

    def _keep(self, asked: Asked, answer: Answer, found: GroundedText) -> None:
        """The turn counts. Of the answer all but the last id has been consumed, and the end has not."""
        end = self._pipeline.manifest.tokenizer.end_id
        self._pending = [end] if answer.finished else [answer.ids[-1], end]
        self._turns.append(Turn(asked.text, asked.boxes, found))
