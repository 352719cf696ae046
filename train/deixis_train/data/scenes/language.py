"""What is said about a scene: the closed list of words, names of things, captions with a box per word.

Words are lower case and separated by single spaces, punctuation marks are words of their own; `join` glues them.
Captions are deterministic (objects from left to right, a size word only where kind and colour are shared), so that a
small model can learn what to say from the picture alone. Texts in free order are in `traces`, referring expressions in
`expressions`, questions in `questions`; `texts` puts all of them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deixis_train.data.scenes.objects import COLORS, KINDS, SIZES

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in px; x1 and y1 are exclusive

MARGIN = 0.04  # two objects count as apart in a direction from this share of the picture's width or height on
NEAR = 0.25  # two objects count as near, give or take MARGIN, where their feet are closer than this share of the width
MAX_WORDS = 62  # of any text, punctuation marks included: a sequence of 64 tokens with its start and its end

MARKS = ",.:"
_PLAIN_WORDS = """
a long image caption an object of where is the and there are on in at to from with i see you can here also it table
thing stand stands left right middle center front back far side leftmost rightmost behind next near beside between big
little
"""
WORDS: tuple[str, ...] = (*_PLAIN_WORDS.split(), *SIZES, *COLORS, *KINDS)
"""Every word that captions, traces, expressions, region captions and the instructions that ask for them may use;
questions have a list of their own."""


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


class Word(NamedTuple):
    """A word or punctuation mark of a text. box: where it points. thing: index of the object that it points at, None
    for the table. named: whether it is part of a noun phrase that names that object."""

    text: str
    box: Box
    thing: int | None
    named: bool


Words = list[Word]


def join(words: Sequence[str]) -> str:
    """Words as one string, punctuation marks glued to the word before them."""
    return "".join(w if not k or w in MARKS else f" {w}" for k, w in enumerate(words))


PLACES = ("on the left", "in the middle", "on the right")  # thirds of the picture


@dataclass(frozen=True)
class View:
    """The objects of a picture of ``width`` x ``height`` px, and how they lie to each other.

    Relations are numbers: a relation holds for sure above ``MARGIN`` and fails for sure below -``MARGIN``; what lies
    between is not talked about.
    """

    items: tuple[Item, ...]
    width: int
    height: int

    def across(self, a: int, b: int) -> float:
        """How far ``a`` lies to the right of ``b``, as a share of the width."""
        return (self.items[a].center - self.items[b].center) / self.width

    def along(self, a: int, b: int) -> float:
        """How much nearer to the camera ``a`` stands than ``b``: offset of the feet as a share of the height."""
        return (self.items[a].foot[1] - self.items[b].foot[1]) / self.height

    def nearness(self, a: int, b: int) -> float:
        """``NEAR`` less the distance of the feet as a share of the width."""
        return NEAR - math.dist(self.items[a].foot, self.items[b].foot) / self.width

    def thirds(self, index: int) -> dict[str, float]:
        """For each of ``PLACES``, how far the object's centre lies inside that third, as a share of the width."""
        x = self.items[index].center / self.width
        return dict(zip(PLACES, (1 / 3 - x, 1 / 6 - abs(x - 0.5), x - 2 / 3), strict=True))

    def order(self) -> list[int]:
        """Objects from left to right."""
        return sorted(range(len(self.items)), key=lambda i: (self.items[i].center, i))


RELATIONS: dict[str, Callable[[View, int, int], float]] = {
    "left of": lambda view, a, b: -view.across(a, b),
    "right of": lambda view, a, b: view.across(a, b),
    "in front of": lambda view, a, b: view.along(a, b),
    "behind": lambda view, a, b: -view.along(a, b),
    "next to": lambda view, a, b: view.nearness(a, b),
}
PHRASES: dict[str, tuple[str, ...]] = {  # ways to say a relation or a place
    "on the left": ("on the left", "on the left side"),
    "in the middle": ("in the middle", "in the center"),
    "on the right": ("on the right", "on the right side"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "next to": ("next to", "beside", "near"),
}


def article(words: str) -> str:
    """ "a mug", "an orange mug"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def region(item: Item) -> str:
    """Caption of one object's box: "a small red mug"."""
    return article(f"{item.size} {item.color} {item.kind}")


def name(items: Sequence[Item], index: int) -> str:
    """ "a red mug", or "a small red mug" where the scene has another red mug."""
    item = items[index]
    same = sum((o.kind, o.color) == (item.kind, item.color) for o in items)
    return region(item) if same > 1 else article(f"{item.color} {item.kind}")


def place(item: Item, width: int) -> str:
    """The third of the picture that the centre of the object's box lies in."""
    return PLACES[min(int(3 * item.center / width), 2)]


@dataclass(frozen=True)
class Noun:
    """A noun phrase without its article, and the indices of the objects that it fits."""

    text: str
    fits: frozenset[int]


def nouns(items: Sequence[Item], index: int) -> list[Noun]:
    """All noun phrases of size, colour and kind that fit object ``index``, the vaguest first."""
    item = items[index]
    out = []
    for size, color, kind in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)):
        fits = frozenset(
            i
            for i, o in enumerate(items)
            if (not size or o.size == item.size)
            and (not color or o.color == item.color)
            and (not kind or o.kind == item.kind)
        )
        words = [item.size] * size + [item.color] * color + [item.kind if kind else "object"]
        out.append(Noun(" ".join(words), fits))
    return out


def _things(items: Sequence[Item], order: Sequence[int], lead: Callable[[int], str]) -> Words:
    """ "A , B and C"; ``lead`` gives the words between comma or "and" and the name of an object. All words that lead to
    a name, commas too, point where the name points."""
    words: Words = []
    for position, index in enumerate(order):
        joint = "" if position == 0 else "and " if position == len(order) - 1 else ", "
        box = items[index].box
        words += [Word(text, box, index, False) for text in f"{joint}{lead(index)}".split()]
        words += [Word(text, box, index, True) for text in name(items, index).split()]
    return words


def captions(items: Sequence[Item], table: Box, width: int) -> list[Words]:
    """Five captions of the whole scene that name all objects from left to right, the plainest first.

    Words of an object's phrase have its box; words that lead to a phrase have the box of that phrase; "on a table" has
    the visible table's box; the full stop stays where the caption has arrived. Ten objects that all need a size word
    take 60 words at most, so nothing is ever left out.
    """
    order = sorted(range(len(items)), key=lambda i: (items[i].center, i))
    first = order[0]
    plain = _things(items, order, lambda index: "")
    places = {i: place(items[i], width) for i in order}
    begins = {i for k, i in enumerate(order) if k == 0 or places[order[k - 1]] != places[i]}
    placed = _things(items, order, lambda index: places[index] if index in begins else "")

    def at(text: str, thing: int | None) -> Words:
        box = table if thing is None else items[thing].box
        return [Word(word, box, thing, False) for word in text.split()]

    texts = [
        at("there is", first) + plain + at("on a table", None),
        at("a table with", None) + plain,
        placed,
        at("from left to right there is", first) + plain,
        plain + at("stand on a table", None),
    ]
    return [[*words, words[-1]._replace(text=".", named=False)] for words in texts]


def phrases(words: Words) -> list[tuple[int, int, int]]:
    """The names in a text as (start, end, object): spans of characters of the joined text."""
    out: list[tuple[int, int, int]] = []
    end, previous = 0, None
    for k, word in enumerate(words):
        start = end if not k or word.text in MARKS else end + 1
        end = start + len(word.text)
        if not word.named or word.thing is None:
            previous = None
        elif word.thing == previous:
            out[-1] = (out[-1][0], end, word.thing)
        else:
            out.append((start, end, word.thing))
            previous = word.thing
    return out
