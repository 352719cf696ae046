"""caption, dense-caption, refer, segment, trace: one picture, one answer, as text, JSON and overlay."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis import overlay
from deixis.errors import PromptError
from deixis.files import check_target, write_atomic
from deixis.image import load_image
from deixis.options import DecodeOptions
from deixis.results import Caption, DenseCaption, Grounding, Segment, Trace

if TYPE_CHECKING:
    from deixis.model import Model
    from deixis.scene import Scene

Picture = NDArray[np.uint8]
Result = Caption | DenseCaption | Grounding | Segment | Trace
Prompt = dict[str, Any]  # box, points and labels as the scene's methods take them


def caption(options: argparse.Namespace) -> int:
    if options.stream and options.json == "-":
        raise PromptError("--stream and --json - both write to the standard output; choose one")
    decode = DecodeOptions(max_new_tokens=options.max_new_tokens, beams=options.beams, deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> list[Result]:
        return [_caption(scene, prompt, decode, options.stream) for prompt in _prompts(options) or [{}]]

    def draw(image: Picture, results: Sequence[Any]) -> Picture:
        return _stack([overlay.draw_caption(image, result) for result in results])

    return _run(options, ask, draw, print_text=not options.stream)


def dense_caption(options: argparse.Namespace) -> int:
    decode = DecodeOptions(max_new_tokens=options.max_new_tokens, beams=options.beams, deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> list[Result]:
        return list(scene.dense_captions(options.limit, options.min_score, options.join_scores, decode))

    return _run(options, ask, overlay.draw_dense_captions)


def refer(options: argparse.Namespace) -> int:
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> list[Result]:
        return [scene.refer(phrase, mask=not options.no_mask, options=limits) for phrase in options.phrases]

    return _run(options, ask, overlay.draw_grounding)


def segment(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    if not prompts:
        raise PromptError("say what to segment: give --box or --point")
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> list[Result]:
        return [scene.segment(**prompt, options=limits) for prompt in prompts]

    def draw(image: Picture, results: Sequence[Any]) -> Picture:
        return _stack([overlay.draw_segments(image, r, **p) for r, p in zip(results, prompts, strict=True)])

    return _run(options, ask, draw)


def trace(options: argparse.Namespace) -> int:
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> list[Result]:
        return [scene.trace(options.text, options=limits)]

    return _run(options, ask, lambda image, results: overlay.draw_trace(image, results[0]))


def load(options: argparse.Namespace) -> Model:
    """The model that the options name."""
    return deixis.load(options.bundle, device=options.device, threads=options.threads)


def lines_of(result: Result) -> list[str]:
    """A result as lines for a person."""
    if isinstance(result, (Caption, Trace)):
        width = max((len(word.text) for word in result.words), default=0)
        places = [
            f"  {word.text:<{width}}  "
            + ("-" if word.center is None else f"{word.center[0]:.0f}, {word.center[1]:.0f}")
            for word in result.words
        ]
        return [result.text, *places]
    if isinstance(result, DenseCaption):
        place = ", ".join(f"{v:.0f}" for v in result.box)
        return [f"{result.score:.2f}  {result.text}: box {place}"]
    score = "" if result.score is None else f"  score {result.score:.2f}"
    box = "nothing" if result.box is None else ", ".join(f"{v:.0f}" for v in result.box)
    mask = "" if result.mask is None else f"  mask {result.mask.area} px"
    name = result.text if isinstance(result, Grounding) else "segment"
    return [f"{name}: box {box}{mask}{score}"]


def _run(
    options: argparse.Namespace,
    ask: Callable[[Scene], list[Result]],
    draw: Callable[[Picture, Sequence[Any]], Picture],
    print_text: bool = True,
) -> int:
    # what can fail without the model fails before it is loaded
    if options.overlay:
        overlay.check_suffix(options.overlay)
        check_target(options.overlay)
    if options.json and options.json != "-":
        check_target(options.json)
    image = load_image(options.image)
    with closing(load(options)) as model:
        results = ask(model.encode(image))
        about = {"bundle": model.info.name, "device": model.info.device}
    if options.overlay:
        overlay.save_image(options.overlay, draw(image, results))
    if options.json:
        height, width = image.shape[:2]
        head = {"command": options.command, "image": str(options.image), "width": width, "height": height, **about}
        write_json(options.json, {**head, "results": [result.to_dict() for result in results]})
    if print_text and options.json != "-":
        print("\n".join(line for result in results for line in lines_of(result)) if results else "nothing found")
    return 0


def write_json(target: str, value: object) -> None:
    """JSON to a file, or to the standard output for "-"."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_atomic(target, text.encode())


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    if options.box and options.point:
        raise PromptError("give --box or --point, not both")
    if options.point:
        labels = [int(p[2]) if len(p) == 3 else 1 for p in options.point]
        return [{"points": [p[:2] for p in options.point], "labels": labels}]
    return [{"box": box} for box in options.box]


def _caption(scene: Scene, prompt: Prompt, decode: DecodeOptions, stream: bool) -> Caption:
    if not stream:
        return scene.caption(**prompt, options=decode)
    words = scene.stream_caption(**prompt, options=decode)
    for i, word in enumerate(words):
        sys.stdout.write(f"{' ' if i else ''}{word.text}")
        sys.stdout.flush()
    sys.stdout.write("\n")
    return words.caption


def _stack(pictures: Sequence[Picture]) -> Picture:
    return pictures[0] if len(pictures) == 1 else overlay.contact_sheet(pictures, columns=min(len(pictures), 3))
