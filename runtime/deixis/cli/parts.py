"""Commands of the other parts of the distribution, found by entry point; a part that is not installed says how to get
it.
"""

from __future__ import annotations

from importlib import metadata

from deixis.errors import PromptError

GROUP = "deixis.commands"
# which extra brings a command; commands of parts that other people write need not stand here
EXTRAS = {"export": "export", "train": "train", "eval": "eval", "bench": "bench"}


def known() -> set[str]:
    """Names of all commands that live outside the runtime, installed or not."""
    return set(EXTRAS) | {entry.name for entry in metadata.entry_points(group=GROUP)}


def run(command: str, arguments: list[str]) -> int:
    """Run a part's command. Raises PromptError (bad use) with the line that installs it when it is missing."""
    entries = [entry for entry in metadata.entry_points(group=GROUP) if entry.name == command]
    hint = "install the package that brings it"
    if command in EXTRAS:
        hint = f'run: pip install "deixis[{EXTRAS[command]}]"'
    if not entries:
        raise PromptError(f"'{command}' is not installed here; {hint}")
    try:
        function = entries[0].load()
    except ImportError as error:
        raise PromptError(f"'{command}' cannot start ({error}); {hint}") from error
    try:
        return int(function([a for a in arguments if a != "--debug"]) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
