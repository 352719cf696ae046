"""grounded-caption, ask, chat, ground-phrases: what models that converse and show masks can do."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from deixis import overlay
from deixis.cli import describe
from deixis.cli.tasks import check_targets, lines_of, load, run_task, write_results
from deixis.conversation import REGION
from deixis.errors import DeixisError, PromptError
from deixis.image import load_image
from deixis.options import DecodeOptions
from deixis.results import Box, GroundedPhrase, GroundedText, Word
from deixis.streams import ResultStream

if TYPE_CHECKING:
    from deixis.glamm.conversations import Chat
    from deixis.scene import Scene

Picture = NDArray[np.uint8]

_NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
_BOX = re.compile(rf"\[({_NUMBER}(?:,{_NUMBER}){{3}})\]")
_LEAVE = ("exit", "quit")


def grounded_caption(options: argparse.Namespace) -> int:
    decode = _decode(options)

    def ask(scene: Scene) -> list[GroundedText]:
        return [_print(scene.stream_grounded_caption(decode)) if options.stream else scene.grounded_caption(decode)]

    return _one(options, ask)


def ask(options: argparse.Namespace) -> int:
    decode, boxes = _decode(options), options.box or None

    def ask(scene: Scene) -> list[GroundedText]:
        if not options.stream:
            return [scene.ask(options.question, boxes, decode)]
        with scene.model.chat(scene) as chat:
            return [_print(chat.stream(options.question, boxes, decode))]

    return _one(options, ask, options.box)


def ground_phrases(options: argparse.Namespace) -> int:
    limits = DecodeOptions(deadline_ms=options.deadline_ms)
    return _one(options, lambda scene: [scene.ground_phrases(options.text, options.phrase or None, limits)])


def chat(options: argparse.Namespace) -> int:
    """Questions from the terminal, or from the lines of the standard input. A question that fails leaves the
    conversation as it was; on a terminal it is told and the next one asked, else it ends the command.
    """
    check_targets(options)
    decode = _decode(options)
    image = load_image(options.image)
    terminal = sys.stdin.isatty()
    with closing(load(options)) as model, model.encode(image).chat() as talk:
        about = {"bundle": model.info.name, "device": model.info.device}
        for question in _questions(sys.stdin, terminal):
            try:
                _turn(talk, question, decode, options, image)
            except (DeixisError, KeyboardInterrupt) as error:
                if not terminal:
                    raise
                told = "given up" if isinstance(error, KeyboardInterrupt) else describe(error)
                print(f"\ndeixis: {told}", file=sys.stderr)
        turns = [turn.to_dict() for turn in talk.turns]
    if options.json:
        write_results(options, image, about, turns)
    return 0


def boxes_in(question: str) -> tuple[str, list[Box]]:
    """A question with its boxes, written as [x0,y0,x1,y1], taken out of it: `<bbox>` stands in their places."""
    boxes: list[Box] = []
    for match in _BOX.finditer(question):
        left, top, right, bottom = (float(value) for value in match[1].split(","))
        boxes.append((left, top, right, bottom))
    return _BOX.sub(REGION, question), boxes


def _turn(talk: Chat, question: str, decode: DecodeOptions, options: argparse.Namespace, image: Picture) -> None:
    text, boxes = boxes_in(question)
    if options.json == "-":
        answer = talk.ask(text, boxes, decode)
    else:
        answer = _print(talk.stream(text, boxes, decode))
        print("".join(f"{line}\n" for line in lines_of(answer)[1:]), end="", flush=True)
    if options.overlay and (answer.masks or answer.phrases):
        overlay.save_image(options.overlay, overlay.draw_grounded(image, answer, boxes))


def _questions(lines: TextIO, terminal: bool) -> Iterator[str]:
    """Lines that ask something, up to the end of the input."""
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
    for line in _typed() if terminal else lines:
        if terminal and line.strip().lower() in _LEAVE:
            return
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    with suppress(EOFError):
        while True:
            yield input("> ")


def _one(options: argparse.Namespace, ask: Any, boxes: Sequence[Box] = ()) -> int:
    """One answer, as text, JSON and overlay."""

    def draw(image: Picture, results: Sequence[Any]) -> Picture:
        return overlay.draw_grounded(image, results[0], boxes)

    streams = getattr(options, "stream", False)
    if streams and options.json == "-":
        raise PromptError("--stream and --json - both write to the standard output; choose one")
    return run_task(options, ask, draw, skip_lines=1 if streams else 0)


def _print(stream: ResultStream[Word | GroundedPhrase, GroundedText]) -> GroundedText:
    """Words as they come; what is known of masks follows when the text is whole."""
    with stream:
        for text in _pieces(stream):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return stream.result


def _pieces(items: Iterable[Word | GroundedPhrase]) -> Iterator[str]:
    end = 0
    for item in items:
        if isinstance(item, Word):
            yield (" " if item.start > end else "") + item.text
            end = item.end


def _decode(options: argparse.Namespace) -> DecodeOptions:
    return DecodeOptions(max_new_tokens=options.max_new_tokens, deadline_ms=options.deadline_ms)
