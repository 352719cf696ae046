"""Questions about a scene and their answers: colour, kind, count, place, relation and existence. Their words are meant
for larger language models, so they go beyond the closed list of `language.WORDS` by `QUESTION_WORDS`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deixis_train.data.scenes.expressions import unique_names
from deixis_train.data.scenes.language import MARGIN, PHRASES, RELATIONS, Item, View, article, name, place
from deixis_train.data.scenes.objects import COLORS, KINDS

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {kind: f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s" for kind in (*KINDS, "object")}
QUESTION_WORDS: tuple[str, ...] = ("what", "color", "kind", "how", "many", "yes", "no", *NUMBERS, *PLURALS.values())

Pair = tuple[str, str]  # question, answer


def _colors(items: Sequence[Item]) -> list[Pair]:
    out = []
    for index, item in enumerate(items):
        out += [
            (f"what color is the {n}?", item.color) for n in unique_names(items, index) if item.color not in n.split()
        ]
    return out


def _kinds(items: Sequence[Item]) -> list[Pair]:
    out = []
    for index, item in enumerate(items):
        names = [n for n in unique_names(items, index) if item.kind not in n.split()]
        out += [(f"what kind of object is the {n}?", article(item.kind)) for n in names]
        out += [(f"what is the {n}?", name(items, index)) for n in names]
    return out


def _counts(items: Sequence[Item], rng: np.random.Generator) -> list[Pair]:
    kind, color = str(rng.choice(KINDS)), str(rng.choice(list(COLORS)))
    present = items[int(rng.integers(len(items)))]
    counted = [
        (PLURALS["object"], len(items)),
        *((PLURALS[k], sum(o.kind == k for o in items)) for k in sorted({kind, present.kind})),
        *((f"{c} {PLURALS['object']}", sum(o.color == c for o in items)) for c in sorted({color, present.color})),
    ]
    return [(f"how many {what} are there?", NUMBERS[number]) for what, number in counted if number < len(NUMBERS)]


def _places(view: View) -> list[Pair]:
    out = []
    for index, item in enumerate(view.items):
        if max(view.thirds(index).values()) > MARGIN / 2:
            out += [(f"where is the {n}?", place(item, view.width)) for n in unique_names(view.items, index)]
    return out


def _relations(view: View) -> tuple[list[Pair], list[Pair]]:
    """Relations between things that can be named alone, those that hold and those that do not."""
    true: list[Pair] = []
    false: list[Pair] = []
    names = [unique_names(view.items, i) for i in range(len(view.items))]
    for i, called in enumerate(names):
        for j, other in enumerate(names):
            if i == j or not called or not other:
                continue
            for relation, score in RELATIONS.items():
                question = f"is the {called[-1]} {PHRASES[relation][-1]} the {other[-1]}?"
                value = score(view, i, j)
                if value > MARGIN:
                    true.append((question, "yes"))
                elif value < -MARGIN:
                    false.append((question, "no"))
    return true, false


def _existence(items: Sequence[Item]) -> tuple[list[Pair], list[Pair]]:
    present = {(o.color, o.kind) for o in items}
    pairs = [(color, kind) for color in COLORS for kind in KINDS]
    asked = {pair: f"is there {article(' '.join(pair))}?" for pair in pairs}
    return (
        [(asked[pair], "yes") for pair in pairs if pair in present],
        [(asked[pair], "no") for pair in pairs if pair not in present],
    )


def questions(items: Sequence[Item], width: int, height: int, rng: np.random.Generator) -> list[Pair]:
    """Up to ten different questions with their answers: two each of colour, kind and count, one of place, and one or
    two that take yes or no, as often the one as the other."""
    view = View(tuple(items), width, height)

    def some(pairs: list[Pair], count: int) -> list[Pair]:
        return [pairs[int(k)] for k in rng.permutation(len(pairs))[:count]]

    related, existing = _relations(view), _existence(items)
    return [
        *some(_colors(items), 2),
        *some(_kinds(items), 2),
        *some(_counts(items, rng), 2),
        *some(_places(view), 1),
        *some(related[int(rng.integers(2))], 1),
        *some(existing[0], 1),
        *some(existing[1], 1),
    ]
