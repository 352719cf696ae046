"""Texts about a scene: captions with a box per word, referring expressions that single out one object, region captions.

Words are lower case and separated by single spaces, punctuation marks are words of their own. The policy is
deterministic (objects from left to right, a size word only where kind and colour are shared) so that a small model
can learn what to say from the picture alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in px; x1 and y1 are exclusive
Words = list[tuple[str, Box]]

MARGIN = 0.04  # two objects count as apart in a direction from this share of the picture's width or height on


@dataclass(frozen=True)
class Item:
    """An object as the texts see it. box: of its visible pixels. foot: px (x, y) of the point of the table below its
    axis; without camera roll a larger y of the foot means nearer to the camera."""

    kind: str
    color: str
    size: str
    box: Box
    foot: tuple[float, float]

    @property
    def center(self) -> float:
        """Horizontal centre of the box in px."""
        return (self.box[0] + self.box[2]) / 2


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def region(item: Item) -> str:
    """Caption of one object's box: "a small red mug"."""
    return _article(f"{item.size} {item.color} {item.kind}")


def name(items: Sequence[Item], index: int) -> str:
    """ "a red mug", or "a small red mug" where the scene has another red mug."""
    item = items[index]
    same = sum((o.kind, o.color) == (item.kind, item.color) for o in items)
    return region(item) if same > 1 else _article(f"{item.color} {item.kind}")


def _place(item: Item, width: int) -> str:
    third = int(3 * item.center / width)
    return ("on the left", "in the middle", "on the right")[min(third, 2)]


def _listing(items: Sequence[Item], order: Sequence[int], after: Callable[[Item], str]) -> Words:
    """ "A , B and C"; ``after`` gives the words that follow an object's name. A comma or "and" points where the phrase
    that it leads to points."""
    words: Words = []
    for position, index in enumerate(order):
        lead = "" if position == 0 else "and " if position == len(order) - 1 else ", "
        text = f"{lead}{name(items, index)} {after(items[index])}"
        words += [(word, items[index].box) for word in text.split()]
    return words


def captions(items: Sequence[Item], table: Box, width: int) -> list[Words]:
    """Five captions of the whole scene, the plainest first; each is a list of (word, box).

    Words of an object's phrase have its box; words that lead to a phrase have the box of that phrase; "on a table" has
    the visible table's box; the full stop stays where the caption has arrived.
    """
    order = sorted(range(len(items)), key=lambda i: (items[i].center, i))
    first = items[order[0]].box
    plain = _listing(items, order, lambda item: "")
    placed = _listing(items, order, lambda item: _place(item, width))

    def at(text: str, box: Box) -> Words:
        return [(word, box) for word in text.split()]

    texts = [
        at("there is", first) + plain + at("on a table", table),
        at("a table with", table) + plain,
        at("there is", first) + placed,
        at("from left to right there is", first) + plain,
        plain + at("stand on a table", table),
    ]
    return [[*words, (".", words[-1][1])] for words in texts]


@dataclass(frozen=True)
class _Noun:
    """A noun phrase without its article, and the indices of the objects that it fits."""

    text: str
    fits: frozenset[int]


def _nouns(items: Sequence[Item], index: int) -> list[_Noun]:
    """All noun phrases that fit object ``index``, the vaguest first."""
    item = items[index]
    out = []
    for size, color, kind in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)):
        fits = frozenset(
            i
            for i, o in enumerate(items)
            if (not size or o.size == item.size)
            and (not color or o.color == item.color)
            and (not kind or o.kind == item.kind)
        )
        words = [item.size] * size + [item.color] * color + [item.kind if kind else "object"]
        out.append(_Noun(" ".join(words), fits))
    return out


def _superlatives(items: Sequence[Item], noun: _Noun, index: int, width: int, height: int) -> list[str]:
    """Places that single ``index`` out among the objects that ``noun`` fits, with ``MARGIN`` to every other."""
    across = [items[o].center - items[index].center for o in noun.fits if o != index]
    along = [items[o].foot[1] - items[index].foot[1] for o in noun.fits if o != index]
    dx, dy = MARGIN * width, MARGIN * height
    out = []
    if min(across) > dx:
        out += [f"the leftmost {noun.text}", f"the {noun.text} on the far left"]
    if max(across) < -dx:
        out += [f"the rightmost {noun.text}", f"the {noun.text} on the far right"]
    if max(along) < -dy:
        out.append(f"the {noun.text} at the front")
    if min(along) > dy:
        out.append(f"the {noun.text} at the back")
    if len(across) == 2 and min(across) < -dx and max(across) > dx:
        out.append(f"the {noun.text} in the middle")
    return out


def _relations(items: Sequence[Item], noun: _Noun, index: int, width: int, height: int) -> list[str]:
    """Relations to an object that can be named alone, which ``index`` and no other object of ``noun`` has."""
    out = []
    dx, dy = MARGIN * width, MARGIN * height
    for anchor in range(len(items)):
        if anchor == index:
            continue
        names = [n.text for n in _nouns(items, anchor) if n.fits == {anchor}]
        others = [i for i in noun.fits if i not in (index, anchor)]
        if not names or not others:
            continue
        across = {i: items[i].center - items[anchor].center for i in (*others, index)}
        along = {i: items[i].foot[1] - items[anchor].foot[1] for i in (*others, index)}
        for words, offset, apart in (
            ("left of", {i: -v for i, v in across.items()}, dx),
            ("right of", across, dx),
            ("in front of", along, dy),
            ("behind", {i: -v for i, v in along.items()}, dy),
        ):
            if offset[index] > apart and all(offset[i] < -apart for i in others):
                out.append(f"the {noun.text} {words} the {names[0]}")
    return out


def expressions(
    items: Sequence[Item], width: int, height: int, rng: np.random.Generator, per_object: int = 3
) -> list[tuple[str, int]]:
    """Referring expressions as (text, index of the one object that it fits), up to ``per_object`` different ones for
    each object: by name where a name suffices, by place among its like, by relation to another."""
    out = []
    for index in range(len(items)):
        nouns = _nouns(items, index)
        shared = [n for n in nouns if len(n.fits) > 1]
        groups = [
            [f"the {n.text}" for n in nouns if n.fits == {index}],
            [text for n in shared for text in _superlatives(items, n, index, width, height)],
            [text for n in shared for text in _relations(items, n, index, width, height)],
        ]
        chosen: list[str] = []
        while len(chosen) < per_object and any(groups):
            weights = np.array(
                [share if group else 0.0 for share, group in zip((0.5, 0.25, 0.25), groups, strict=True)]
            )
            group = groups[int(rng.choice(3, p=weights / weights.sum()))]
            chosen.append(group.pop(int(rng.integers(len(group)))))
        out += [(text, index) for text in chosen]
    return out
