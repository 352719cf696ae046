"""One question, one answer, for many pictures at once: captions, with and without masks, questions, referring
(section 8).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from deixis.batching import group_indices, pick
from deixis.bundle import TaskSpec
from deixis.captioning import CaptionStream, task_name
from deixis.errors import PromptError
from deixis.glamm.answers import (
    Answer,
    Piece,
    Reader,
    Shown,
    grounded_text,
    is_mark,
    show,
    stream_answer,
    words_of_answer,
)
from deixis.glamm.generation import Request, generate, most_new_tokens, start
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.glamm.questions import Asked, check_question, check_text, room
from deixis.options import Check, DecodeOptions
from deixis.prompts import Prompt, Question, check_box
from deixis.results import Caption, GroundedText, Grounding, Word
from deixis.streams import ResultStream

GroundedStream = ResultStream[Piece, GroundedText]


def grounded_caption_batch(
    pipeline: GlammPipeline, scenes: Sequence[GlammFeatures], options: DecodeOptions
) -> list[GroundedText]:
    """A description of each picture, with a mask for every phrase that the model marks."""
    task = pipeline.task("grounded_caption")
    return _answer(pipeline, task, _plain_requests(pipeline, task, scenes), options)


def stream_grounded_caption(pipeline: GlammPipeline, scene: GlammFeatures, options: DecodeOptions) -> GroundedStream:
    """The same for one picture as a stream. Options are checked now, the rest happens as items are taken."""
    check = options.start()
    task = pipeline.task("grounded_caption")
    [request] = _plain_requests(pipeline, task, [scene])
    most_new_tokens(task, options, room(pipeline, 0, request.ids))
    return ResultStream(_stream(pipeline, task, request, options, check))


def ask_batch(
    pipeline: GlammPipeline, scenes: Sequence[GlammFeatures], questions: Sequence[Question], options: DecodeOptions
) -> list[GroundedText]:
    """The answer to each question about its picture, as the first of a conversation."""
    task = pipeline.task("ask")
    asked = [check_question(pipeline, s.geometry, q) for s, q in zip(scenes, questions, strict=True)]
    requests = [
        Request.of(pipeline, task, scene, Asked(in_instruction(task, one.text), one.boxes))
        for scene, one in zip(scenes, asked, strict=True)
    ]
    return _answer(pipeline, task, requests, options)


def refer_batch(
    pipeline: GlammPipeline, scenes: Sequence[GlammFeatures], texts: Sequence[str], mask: bool, options: DecodeOptions
) -> list[Grounding]:
    """The thing that each text means in its picture: the first mask of the answer, and the box around it.

    An answer without a mask (the model may decline, or reach its length) gives neither. Nothing is generated behind
    the mask. mask=False: only the box is returned; the mask is made all the same, for the box is read off it.
    """
    check = options.start()
    task = pipeline.task("refer")
    requests = [
        Request.of(pipeline, task, scene, Asked(in_instruction(task, check_text(pipeline, text, "text"))))
        for scene, text in zip(scenes, texts, strict=True)
    ]
    answers = generate(pipeline, requests, task, options, check, until_mask=True)
    showing = [row for row, answer in enumerate(answers) if answer.states]
    shown = show(pipeline, [answers[row].states[0] for row in showing], pick(scenes, showing), check)
    of_row = dict(zip(showing, shown, strict=True))
    return [_grounding(text, of_row.get(row), mask) for row, text in enumerate(texts)]


def caption_batch(
    pipeline: GlammPipeline, scenes: Sequence[GlammFeatures], prompts: Sequence[Prompt], options: DecodeOptions
) -> list[Caption]:
    """A description of each picture or region. Words have no places; masks that the model gives unasked are dropped."""
    check = options.start()
    requests = [_caption_request(pipeline, *pair) for pair in zip(scenes, prompts, strict=True)]
    captions: dict[int, Caption] = {}
    for rows in group_indices(task_name(prompt) for prompt in prompts):
        task = pipeline.task(task_name(prompts[rows[0]]))
        for row, answer in zip(rows, generate(pipeline, pick(requests, rows), task, options, check), strict=True):
            captions[row] = _caption(pipeline, requests[row], answer)
    return [captions[row] for row in range(len(prompts))]


def stream_caption(
    pipeline: GlammPipeline, scene: GlammFeatures, prompt: Prompt, options: DecodeOptions
) -> CaptionStream:
    """The same for one pair as a stream. Prompt and options are checked now, the rest happens as words are taken."""
    check = options.start()
    request = _caption_request(pipeline, scene, prompt)
    task = pipeline.task(task_name(prompt))
    most_new_tokens(task, options, room(pipeline, 0, request.ids))
    return CaptionStream(_stream_caption(pipeline, task, request, options, check))


def in_instruction(task: TaskSpec, text: str) -> str:
    """The user's text in the task's words."""
    return task.instruction.replace("{text}", text)


def _plain_requests(pipeline: GlammPipeline, task: TaskSpec, scenes: Sequence[GlammFeatures]) -> list[Request]:
    return [Request.of(pipeline, task, scene, Asked(task.instruction)) for scene in scenes]


def _answer(
    pipeline: GlammPipeline, task: TaskSpec, requests: Sequence[Request], options: DecodeOptions
) -> list[GroundedText]:
    """Generate, then decode the masks of all answers together."""
    check = options.start()
    answers = generate(pipeline, requests, task, options, check)
    states = [(state, request.features) for request, a in zip(requests, answers, strict=True) for state in a.states]
    shown = iter(show(pipeline, [state for state, _ in states], [features for _, features in states], check))
    return [grounded_text(a, a.parse(pipeline), [next(shown) for _ in a.states]) for a in answers]


def _stream(
    pipeline: GlammPipeline, task: TaskSpec, request: Request, options: DecodeOptions, check: Check
) -> Generator[Piece, None, GroundedText]:
    answer = Answer()
    steps = start(pipeline, [request], task, options, check)
    return (yield from stream_answer(pipeline, request.features, answer, steps, check))


def _caption_request(pipeline: GlammPipeline, scene: GlammFeatures, prompt: Prompt) -> Request:
    if prompt.points is not None or (prompt.labels is not None and prompt.box is None):
        raise PromptError("this model describes pictures and boxes, not points; give a box")
    task = pipeline.task(task_name(prompt))
    boxes = () if prompt.is_whole else (check_box(prompt, scene.geometry),)
    return Request.of(pipeline, task, scene, Asked(task.instruction, boxes))


def _caption(pipeline: GlammPipeline, request: Request, answer: Answer) -> Caption:
    parsed, words = words_of_answer(pipeline, answer)
    [box] = request.question.boxes or [None]
    return Caption(parsed.text, words, answer.score, tuple(answer.ids), answer.finished, box)


def _stream_caption(
    pipeline: GlammPipeline, task: TaskSpec, request: Request, options: DecodeOptions, check: Check
) -> Generator[Word, None, Caption]:
    answer = Answer()
    reader = Reader(pipeline, answer)
    for step in start(pipeline, [request], task, options, check):
        if not answer.take(step, 0, pipeline):
            break
        yield from reader.read(len(answer.ids), is_mark(pipeline, answer.ids[-1]))[1]
    yield from reader.read(len(answer.ids), True)[1]
    return _caption(pipeline, request, answer)


def _grounding(text: str, shown: Shown | None, mask: bool) -> Grounding:
    if shown is None:
        return Grounding(text, None)
    box = shown.mask.box
    return Grounding(text, box, shown.mask, shown.score) if mask else Grounding(text, box)
