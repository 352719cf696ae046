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
from deixis.cli.arguments import TALKING_BUNDLE
from deixis.errors import BundleNotFoundError, PromptError
from deixis.files import check_target, write_atomic
from deixis.image import load_image
from deixis.options import DecodeOptions
from deixis.results import Caption, DenseCaption, GroundedPhrase, GroundedText, Grounding, Segment, Trace

if TYPE_CHECKING:
    from deixis.model import Model
    from deixis.scene import Scene

Picture = NDArray[np.uint8]
Result = Caption | DenseCaption | GroundedText | Grounding | Segment | Trace
Prompt = dict[str, Any]  # box, points and labels as the scene's methods take them


def caption(options: argparse.Namespace) -> int:
    if options.stream and options.json == "-":
        raise PromptError("--stream and --json - both write to the standard output; choose one")
    decode = DecodeOptions(max_new_tokens=options.max_new_tokens, beams=options.beams, deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> Sequence[Result]:
        return [_caption(scene, prompt, decode, options.stream) for prompt in _prompts(options) or [{}]]

    def draw(image: Picture, results: Sequence[Any]) -> Picture:
        return _stack([overlay.draw_caption(image, result) for result in results])

    return run_task(options, ask, draw, skip_lines=None if options.stream else 0)


def dense_caption(options: argparse.Namespace) -> int:
    decode = DecodeOptions(max_new_tokens=options.max_new_tokens, beams=options.beams, deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> Sequence[Result]:
        return list(scene.dense_captions(options.limit, options.min_score, options.join_scores, decode))

    return run_task(options, ask, overlay.draw_dense_captions)


def refer(options: argparse.Namespace) -> int:
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> Sequence[Result]:
        return [scene.refer(phrase, mask=not options.no_mask, options=limits) for phrase in options.phrases]

    return run_task(options, ask, overlay.draw_grounding)


def segment(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    if not prompts:
        raise PromptError("say what to segment: give --box or --point")
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> Sequence[Result]:
        return [scene.segment(**prompt, options=limits) for prompt in prompts]

    def draw(image: Picture, results: Sequence[Any]) -> Picture:
        return _stack([overlay.draw_segments(image, r, **p) for r, p in zip(results, prompts, strict=True)])

    return run_task(options, ask, draw)


def trace(options: argparse.Namespace) -> int:
    limits = DecodeOptions(deadline_ms=options.deadline_ms)

    def ask(scene: Scene) -> Sequence[Result]:
        return [scene.trace(options.text, options=limits)]

    return run_task(options, ask, lambda image, results: overlay.draw_trace(image, results[0]))


def load(options: argparse.Namespace) -> Model:
    """The model that the options name."""
    try:
        return deixis.load(
            options.bundle, device=options.device, threads=options.threads, spin=options.spin, cores=options.cores
        )
    except BundleNotFoundError:
        if options.bundle != TALKING_BUNDLE:
            raise
        raise BundleNotFoundError(
            "this needs a GLaMM, and none comes with this version; name a bundle with --bundle "
            "(docs/training.md says how one is made)"
        ) from None


def lines_of(result: Result) -> list[str]:
    """A result as lines for a person."""
    if isinstance(result, (Caption, Trace)):
        if not any(word.center for word in result.words):  # a model that gives no places
            return [result.text]
        width = max(len(word.text) for word in result.words)
        places = [
            f"  {word.text:<{width}}  "
            + ("-" if word.center is None else f"{word.center[0]:.0f}, {word.center[1]:.0f}")
            for word in result.words
        ]
        return [result.text, *places]
    if isinstance(result, DenseCaption):
        place = ", ".join(f"{v:.0f}" for v in result.box)
        return [f"{result.score:.2f}  {result.text}: box {place}"]
    if isinstance(result, GroundedText):
        phrases = [_place(f"  {phrase.text}", phrase) for phrase in result.phrases]
        loose = [_place(f"  mask {i}", Segment(mask, None, mask.box)) for i, mask in enumerate(result.masks, 1)]
        return [result.text, *phrases, *loose, *(f"  problem: {problem}" for problem in result.problems)]
    return [_place(result.text if isinstance(result, Grounding) else "segment", result)]


def _place(name: str, result: GroundedPhrase | Grounding | Segment) -> str:
    if result.mask is None and result.box is None:
        return f"{name}: nothing found"
    score = "" if result.score is None else f"  score {result.score:.2f}"
    box = "nothing" if result.box is None else ", ".join(f"{v:.0f}" for v in result.box)
    mask = "" if result.mask is None else f"  mask {result.mask.area} px"
    return f"{name}: box {box}{mask}{score}"


def run_task(
    options: argparse.Namespace,
    ask: Callable[[Scene], Sequence[Result]],
    draw: Callable[[Picture, Sequence[Any]], Picture],
    skip_lines: int | None = 0,
) -> int:
    """Ask about one picture, and write what comes back wherever the options want it.

    skip_lines: so many lines of every result have been printed already; None = all of them.
    """
    check_targets(options)
    image = load_image(options.image)
    with closing(load(options)) as model:
        results = ask(model.encode(image))
        about = {"bundle": model.info.name, "device": model.info.device}
    if options.overlay:
        overlay.save_image(options.overlay, draw(image, results))
    if options.json:
        write_results(options, image, about, [result.to_dict() for result in results])
    if skip_lines is not None and options.json != "-":
        lines = [line for result in results for line in lines_of(result)[skip_lines:]]
        print("".join(f"{line}\n" for line in lines) if results else "nothing found\n", end="")
    return 0


def check_targets(options: argparse.Namespace) -> None:
    """What can fail without the model fails before it is loaded."""
    if options.overlay:
        overlay.check_suffix(options.overlay)
        check_target(options.overlay)
    if options.json and options.json != "-":
        check_target(options.json)


def write_results(
    options: argparse.Namespace, image: Picture, about: dict[str, str], results: Sequence[dict[str, Any]]
) -> None:
    """The results of a command, and what they are about, as JSON."""
    height, width = image.shape[:2]
    head = {"command": options.command, "image": str(options.image), "width": width, "height": height, **about}
    write_json(options.json, {**head, "results": list(results)})


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
