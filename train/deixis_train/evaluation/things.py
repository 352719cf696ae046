"""Which things a text names, for data whose instances have a kind and a colour: rendered scenes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

Thing = tuple[str, str]  # colour, kind

BETWEEN = 2  # words that may stand between a colour and its kind: "a red shiny metal mug"


def names_phrase(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in `text`, next to each other and whatever the case."""
    return _places(_words(text), _words(phrase)) != []


def names_thing(text: str, colour: str, kind: str) -> bool:
    """Whether a text says both the colour and the kind of a thing."""
    return names_phrase(text, colour) and names_phrase(text, kind)


def named_things(text: str, colours: Collection[str], kinds: Collection[str]) -> Counter[Thing]:
    """(colour, kind) of the things a text names: a kind, and the nearest colour shortly before it.

    Longer names of kinds go first, so that "coffee mug" is not also a mug.
    """
    words = _words(text)
    taken = [False] * len(words)
    found: Counter[Thing] = Counter()
    ends: list[tuple[int, int, str]] = []  # where kinds stand: start, end, kind
    for kind in sorted(kinds, key=lambda k: (-len(_words(k)), k)):
        size = len(_words(kind))
        for start in _places(words, _words(kind)):
            if not any(taken[start : start + size]):
                taken[start : start + size] = [True] * size
                ends.append((start, start + size, kind))
    for start, _, kind in sorted(ends):
        for index in range(start - 1, max(-1, start - 2 - BETWEEN), -1):
            if taken[index] or words[index] in (",", "and"):
                break
            if words[index] in colours:
                found[words[index], kind] += 1
                break
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9'-]+|,", text.lower())


def _places(words: list[str], phrase: list[str]) -> list[int]:
    size = len(phrase)
    return [i for i in range(len(words) - size + 1) if phrase and words[i : i + size] == phrase]
