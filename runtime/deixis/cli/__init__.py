"""The `deixis` command. Exit code 0 = done, 1 = failed, 2 = used wrongly; errors are one line on stderr.

Other parts of the distribution add their commands through the entry-point group `deixis.commands`: the entry's name
is the command, its object a function `main(argv: list[str]) -> int` that gets the arguments behind the command.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from deixis.errors import DeixisError, PromptError

USAGE, FAILURE, INTERRUPTED, BROKEN_PIPE = 2, 1, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Tracebacks are shown only with --debug."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="deixis: %(message)s")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (DeixisError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        return _failed(describe(error), USAGE if isinstance(error, PromptError) else FAILURE)
    except Exception as error:  # a mistake of ours: still one line, and how to see more
        if debug:
            traceback.print_exc()
        return _failed(f"{type(error).__name__}: {describe(error)} (run again with --debug and report it)", FAILURE)


def describe(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _failed(message: str, code: int) -> int:
    print(f"deixis: error: {message}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    from deixis.cli import arguments as parsing
    from deixis.cli import parts

    command = next((a for a in arguments if not a.startswith("-")), "")
    if command in parts.known():
        position = arguments.index(command)
        return parts.run(command, arguments[position + 1 :])
    try:
        options = parsing.parser().parse_args(arguments)
    except SystemExit as stop:  # --help, --version, or a usage error that has been printed
        return stop.code if isinstance(stop.code, int) else USAGE
    return options.run(options)
