"""What can be typed: the argument parser of the runtime's own commands."""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn

from deixis._version import __version__
from deixis.cli import parts
from deixis.engines import DEVICES

DEFAULT_BUNDLE = "tabletop"
TALKING_BUNDLE = "tabletop-glamm"  # for the commands of models that converse


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"deixis: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of everything but the other parts' commands; parsed options carry `run`, the function to call."""
    from deixis.cli import checks, demo, talk, tasks

    root = Parser(
        prog="deixis",
        description="Words with locations, boxes and masks, from pixel-aligned language models; without PyTorch.",
        epilog=f"Further commands, each with its own --help: {', '.join(sorted(parts.known()))}.",
    )
    root.add_argument("--version", action="version", version=f"deixis {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    sub = commands.add_parser("demo", help="run every task on the shipped pictures, and make pictures of it")
    sub.add_argument("--out", default="out/demo", metavar="DIR", help="folder for the pictures (default: %(default)s)")
    sub.add_argument("--pictures", metavar="DIR", help="folder with prompts.json (default: the one beside the bundle)")
    _model(sub)
    sub.set_defaults(run=demo.run)

    sub = commands.add_parser("caption", help="describe a picture, or a region of it, every word with its place")
    _task(sub)
    _prompt(sub)
    _decoding(sub)
    sub.add_argument("--stream", action="store_true", help="print words as they come")
    sub.set_defaults(run=tasks.caption)

    sub = commands.add_parser("dense-caption", help="find the objects of a picture and describe each")
    _task(sub)
    sub.add_argument("--limit", type=_positive, metavar="N", help="describe so many objects at most")
    sub.add_argument("--min-score", type=_share, metavar="S", help="leave out what scores less, 0 to 1")
    sub.add_argument(
        "--join-scores",
        action=argparse.BooleanOptionalAction,
        help="let the captions' probabilities join the scores (default: as the bundle says)",
    )
    _decoding(sub)
    sub.set_defaults(run=tasks.dense_caption)

    sub = commands.add_parser("refer", help="find the box and mask of phrases")
    _task(sub)
    sub.add_argument("phrases", nargs="+", metavar="PHRASE", help='what to find, such as "the red mug"')
    sub.add_argument("--no-mask", action="store_true", help="boxes only")
    sub.set_defaults(run=tasks.refer)

    sub = commands.add_parser("segment", help="cut out what a box or points select")
    _task(sub)
    _prompt(sub)
    sub.set_defaults(run=tasks.segment)

    sub = commands.add_parser("trace", help="find the place of every word of a given text")
    _task(sub)
    sub.add_argument("text", metavar="TEXT", help="the words to be placed")
    sub.set_defaults(run=tasks.trace)

    sub = commands.add_parser("grounded-caption", help="describe a picture, with a mask for every phrase")
    _task(sub, TALKING_BUNDLE)
    _length(sub)
    sub.add_argument("--stream", action="store_true", help="print words as they come")
    sub.set_defaults(run=talk.grounded_caption)

    sub = commands.add_parser("ask", help="answer a question about a picture, with masks where the answer shows things")
    _task(sub, TALKING_BUNDLE)
    sub.add_argument("question", metavar="QUESTION", help="it names the boxes by <bbox>, in their order, or not at all")
    _boxes(sub)
    _length(sub)
    sub.add_argument("--stream", action="store_true", help="print words as they come")
    sub.set_defaults(run=talk.ask)

    sub = commands.add_parser(
        "chat",
        help="talk about a picture",
        description="Talk about a picture: one question a line, from the terminal or from the standard input. "
        "A box in a question is written as [x0,y0,x1,y1], in pixels. 'exit' or the end of the input ends it.",
    )
    _task(sub, TALKING_BUNDLE)
    _length(sub)
    sub.set_defaults(run=talk.chat)

    sub = commands.add_parser("ground-phrases", help="find the masks of the things that a given text names")
    _task(sub, TALKING_BUNDLE)
    sub.add_argument("text", metavar="TEXT", help="the text")
    sub.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="PHRASE",
        help="a part of the text; may be repeated (default: the model marks the phrases)",
    )
    sub.set_defaults(run=talk.ground_phrases)

    sub = commands.add_parser("inspect", help="print what a bundle holds")
    sub.add_argument("bundle", metavar="BUNDLE", nargs="?", default=DEFAULT_BUNDLE, help="folder or name of a bundle")
    sub.add_argument("--json", action="store_true", help="the whole manifest as JSON")
    sub.add_argument("--debug", action="store_true", help="show tracebacks and logs")
    sub.set_defaults(run=checks.inspect)

    sub = commands.add_parser("verify", help="run a bundle's golden vectors on this machine and compare")
    sub.add_argument("bundle", metavar="BUNDLE", nargs="?", default=DEFAULT_BUNDLE, help="folder or name of a bundle")
    _device(sub)
    sub.add_argument("--json", metavar="FILE", help="write the comparison as JSON; - is the standard output")
    sub.set_defaults(run=checks.verify)

    sub = commands.add_parser("doctor", help="say what is installed and which devices work")
    sub.add_argument("--debug", action="store_true", help="show tracebacks and logs")
    sub.set_defaults(run=checks.doctor)
    return root


def _device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", choices=DEVICES, default="auto", help="where graphs run (default: %(default)s)")
    sub.add_argument("--threads", type=_positive, metavar="N", help="threads of one graph run (default: all cores)")
    sub.add_argument(
        "--cores", type=_cores, metavar="LIST", help="processors to pin those threads to, one each, such as 0,1 or 0-3"
    )
    sub.add_argument("--spin", action="store_true", help="let threads that wait for work stay awake")
    sub.add_argument("--debug", action="store_true", help="show tracebacks and logs")


def _model(sub: argparse.ArgumentParser, bundle: str = DEFAULT_BUNDLE) -> None:
    sub.add_argument("--bundle", default=bundle, help="folder or name of a bundle (default: %(default)s)")
    _device(sub)


def _task(sub: argparse.ArgumentParser, bundle: str = DEFAULT_BUNDLE) -> None:
    sub.add_argument("image", metavar="IMAGE", help="a picture file")
    _model(sub, bundle)
    sub.add_argument("--json", metavar="FILE", help="write the result as JSON; - is the standard output")
    sub.add_argument("--overlay", metavar="FILE", help="write a picture of the result (.png, .jpg)")
    sub.add_argument("--deadline-ms", type=_milliseconds, metavar="MS", help="give up when one answer takes longer")


def _boxes(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--box",
        type=_box,
        action="append",
        default=[],
        metavar="X0,Y0,X1,Y1",
        help="a region in pixels; may be repeated",
    )


def _prompt(sub: argparse.ArgumentParser) -> None:
    _boxes(sub)
    sub.add_argument(
        "--point",
        type=_point,
        action="append",
        default=[],
        metavar="X,Y[,LABEL]",
        help="a point in pixels, label 1 = on the thing (default), 0 = not on it; repeated points select one thing",
    )


def _decoding(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--beams", type=_positive, metavar="N", help="beam search with N hypotheses; 1 = greedy")
    _length(sub)


def _length(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest text")


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def _cores(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdigit() and len(end) < 6 for end in ends) or int(ends[0]) > int(ends[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of processors such as 0,1 or 0-3")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return tuple(found)


def _share(text: str) -> float:
    (value,) = _floats(text, (1,), "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _milliseconds(text: str) -> float:
    (value,) = _floats(text, (1,), "a number of milliseconds")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds from 0 on")
    return value


def _box(text: str) -> tuple[float, ...]:
    return _floats(text, (4,), "four numbers x0,y0,x1,y1")


def _point(text: str) -> tuple[float, ...]:
    values = _floats(text, (2, 3), "x,y or x,y,label")
    if len(values) == 3 and values[2] not in (0, 1):
        raise argparse.ArgumentTypeError(f"{text!r}: the label must be 1 (on the thing) or 0 (not on it)")
    return values


def _floats(text: str, counts: tuple[int, ...], expected: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return values
