"""What a user says to a GLaMM: questions and boxes, checked, and as the ids of a conversation (sections 2.3 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis.bundle import ConversationSpec, TaskSpec
from deixis.conversation import IMAGE_ID, REGION, prompt_ids, render, reserved_marks
from deixis.errors import PromptError, TextTooLongError
from deixis.geometry import Geometry
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.prompts import Prompt, Question, check_box
from deixis.results import Box

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """A checked question. text: with one `<bbox>` per box. boxes: (left, top, right, bottom) px, clipped to the
    picture.
    """

    text: str
    boxes: tuple[Box, ...] = ()


def check_text(pipeline: GlammPipeline, text: str, what: str, allowed: str | None = None) -> str:
    """The text, if the model can read it and it holds no marks of the conversation but the `allowed` one.

    Raises PromptError.
    """
    pipeline.tokenizer.encode(text, what)
    forbidden = [mark for mark in reserved_marks(text) if mark != allowed]
    if forbidden:
        raise PromptError(f"{what} holds {forbidden[0]}, which is a control token of the conversation; leave it out")
    return text


def check_question(pipeline: GlammPipeline, geometry: Geometry, question: Question) -> Asked:
    """A user's question about a picture and regions of it.

    Args:
        pipeline: of the model that is asked.
        geometry: of the picture.
        question: its text may name each box by `<bbox>`, in their order; a text that names none gets one per box
            behind it. Its boxes: [k, 4], or one box [4], px of the picture; None or an empty list = none.

    Raises:
        PromptError: empty text, control tokens, a box without area or outside the picture, more or fewer `<bbox>` than
            boxes.
        TaskError: boxes for a model that takes none.
    """
    text = check_text(pipeline, question.text, "the question", REGION)
    given = tuple(check_box(Prompt(box=box), geometry) for box in _rows(question.boxes))
    named = text.count(REGION)
    if given and not named:
        text = " ".join([text.rstrip(), *[REGION] * len(given)])
    elif named != len(given):
        raise PromptError(
            f"the question names {_count(named, REGION, REGION)} but has {_count(len(given), 'box', 'boxes')}; "
            f"give one box per {REGION}"
        )
    if given:
        pipeline.require("region_caption")
        most = pipeline.range("V")[1] - pipeline.conversation.image_tokens
        if len(given) > most:
            raise PromptError(f"{len(given)} boxes are too many; this bundle takes at most {most}")
    return Asked(text, given)


def check_length(pipeline: GlammPipeline, task: TaskSpec, question: str) -> None:
    """Raise TextTooLongError when a question is longer than the bundle's task allows."""
    count = len(encode(pipeline, question))
    if count > task.instruction_tokens:
        raise TextTooLongError(
            f"the question has {count} tokens, the model takes at most {task.instruction_tokens}; shorten it"
        )


def encode(pipeline: GlammPipeline, text: str) -> list[int]:
    """Ids of a text with marks, no begin id; `deixis.conversation` calls it."""
    return list(pipeline.tokenizer.encode(text).ids)


def first_text(pipeline: GlammPipeline, question: str) -> str:
    """The conversation's text up to the first answer."""
    return render(pipeline.conversation, [(question, None)])


def ids_of(pipeline: GlammPipeline, text: str) -> list[int]:
    """Ids of a conversation's text, IMAGE_ID where the picture goes."""
    return prompt_ids(text, lambda part: encode(pipeline, part), pipeline.conversation)


def expanded(ids: Sequence[int], spec: ConversationSpec) -> int:
    """Positions that ids take: the picture stands for many."""
    return len(ids) + (spec.image_tokens - 1) * list(ids).count(IMAGE_ID)


def regions_of(
    pipeline: GlammPipeline, features: Sequence[GlammFeatures], boxes: Sequence[Sequence[Box]]
) -> list[Floats | None]:
    """The vectors [k, D] of each row's boxes. The region encoder runs only when there are any.

    The published code rounds boxes to bfloat16 at inference (section 2.3), up to one pixel in 256. That is not
    imitated: training did not round, and boxes here are as exact as they were given.
    """
    if not any(boxes):
        return [None] * len(boxes)
    return list(pipeline.regions(features, [np.array(own, np.float64).reshape(-1, 4) for own in boxes]))


def room(pipeline: GlammPipeline, position: int, ids: Sequence[int]) -> int:
    """How many ids may be generated behind `position` consumed ones and the given ids.

    Raises TextTooLongError when not even one fits.
    """
    needed = position + expanded(ids, pipeline.conversation)
    # the last generated id is never consumed
    left = pipeline.capacity - needed + 1
    if left < 1:
        raise TextTooLongError(
            f"with this text the conversation has {needed} tokens ({pipeline.conversation.image_tokens} are the "
            f"picture's), the model was loaded for {pipeline.capacity}; shorten it, start anew, or load the bundle "
            f"with a larger cache_capacity (at most {pipeline.range('T')[1]})"
        )
    return left


def _rows(boxes: ArrayLike | None) -> list[ArrayLike]:
    if boxes is None:
        return []
    try:
        array = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise PromptError(f"boxes must be a list of (left, top, right, bottom), found {str(boxes)[:60]!r}") from None
    if array.size == 0:
        return []
    if array.ndim not in (1, 2) or array.shape[-1] != 4:
        raise PromptError(f"boxes must be a list of (left, top, right, bottom), found an array of {list(array.shape)}")
    return list(array.reshape(-1, 4))


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"
