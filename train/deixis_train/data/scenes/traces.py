"""Texts in free order: sentences as people type them, about some of the things of a scene, each word with a box.

Unlike captions they follow no order and may leave things out or come back to them; every name still fits one object
alone. Words of a name, and of what is said about it, have its box: "a red ball is behind" points at the ball, "the mug"
after it at the mug. Words that lead to a name ("on the left there is") have the box of that name. Commas, "and" and
full stops between sentences stay where the text has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deixis_train.data.scenes.expressions import superlatives, unique_names, vary
from deixis_train.data.scenes.language import (
    MARGIN,
    PHRASES,
    RELATIONS,
    Box,
    Item,
    View,
    Word,
    Words,
    article,
    name,
    nouns,
)

LONGEST = 60  # words of a trace; below `language.MAX_WORDS`, so that a full stop always fits

Clause = list[tuple[str, int]]  # pieces of text and the thing each is about; a piece "*" stands for its name

_PLAIN = ("there is *", "there is also *", "i see *", "you can see *", "here is *")
_PLACED = (
    "* is {place}",
    "* is {place}",
    "{place} there is *",
    "{place} is *",
    "{place} *",
    "there is * {place}",
    "i see * {place}",
    "* stands {place}",
    "* {place}",
    "* is here {place}",
)
_VERBS = {"is", "stands", "see"}


class _Teller:
    """Finds true clauses about a scene. `known`: what each thing may be called; things without a name stay out."""

    def __init__(self, view: View, rng: np.random.Generator) -> None:
        self.view, self.rng = view, rng
        count = len(view.items)
        self.known = {i: self._names(i) for i in range(count)}
        self.things = [i for i in range(count) if self.known[i][0] or self.known[i][1]]
        self.places = {i: self._places(i) for i in range(count)}
        self.related = [
            (i, j, relation)
            for i in self.things
            for j in self.things
            if i != j
            for relation, score in RELATIONS.items()
            if score(view, i, j) > MARGIN
        ]

    def _names(self, index: int) -> tuple[list[str], list[str]]:
        """Attributes that fit ``index`` alone, and places that single it out among its like."""
        shared = [n for n in nouns(self.view.items, index) if len(n.fits) > 1]
        return unique_names(self.view.items, index), [t for n in shared for t in superlatives(self.view, n, index)]

    def _places(self, index: int) -> list[str]:
        view, others = self.view, [i for i in range(len(self.view.items)) if i != index]
        out = [w for third, by in view.thirds(index).items() if by > MARGIN / 2 for w in PHRASES[third]]
        for word, relation in (("far left", "left of"), ("far right", "right of")):
            if others and all(RELATIONS[relation](view, index, o) > MARGIN for o in others):
                out.append(f"on the {word}")
        for word, relation in (("front", "in front of"), ("back", "behind")):
            if others and all(RELATIONS[relation](view, index, o) > MARGIN for o in others):
                out.append(f"at the {word}")
        return out

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def call(self, index: int, alone: bool) -> str:
        """A name with its article: mostly as captions name it, sometimes shorter or by place. What follows the noun
        ("at the front") would be misread in a clause that says more: there only where nothing else is clear."""
        by_attributes, by_place = self.known[index]
        short = [text for text in by_place if text.startswith(("left", "right", "middle"))]
        if not by_attributes:
            return f"the {vary(self.pick(short or by_place), self.rng)}"
        by_place = by_place if alone else short
        if by_place and self.rng.random() < 0.12:
            return f"the {vary(self.pick(by_place), self.rng)}"
        full = name(self.view.items, index).split(" ", 1)[1]
        noun = full if self.rng.random() < 0.6 else vary(self.pick(by_attributes), self.rng)
        return f"the {noun}" if self.rng.random() < 0.3 else article(noun)

    def clause(self, last: int | None, told: set[int]) -> Clause:
        """One true clause; about a thing not told of yet, mostly."""
        fresh = [i for i in self.things if i not in told]
        pool = fresh if fresh and self.rng.random() < 0.85 else self.things
        thing = pool[int(self.rng.integers(len(pool)))]
        beside_it = [(i, r) for i, j, r in self.related if j == last and i != last]
        if beside_it and self.rng.random() < 0.2:
            other, relation = beside_it[int(self.rng.integers(len(beside_it)))]
            assert last is not None
            return [(f"{self.pick(PHRASES[relation])} it", last), (self.pick(("is", "there is")), other), ("*", other)]
        kind = self.rng.random()
        if kind < 0.5:
            about = [(j, r) for i, j, r in self.related if i == thing]
            if about:
                anchor, relation = about[int(self.rng.integers(len(about)))]
                return self._relation(thing, anchor, self.pick(PHRASES[relation]))
        if kind < 0.55:
            between = self._between(thing)
            if between:
                return between
        if kind < 0.85 and self.places[thing]:
            frame = self.pick(_PLACED).format(place=self.pick(self.places[thing]))
            return self._about(frame, thing)
        return self._about(self.pick(_PLAIN), thing)

    def _about(self, frame: str, thing: int) -> Clause:
        return [(piece, thing) for piece in frame.split()]

    def _relation(self, thing: int, anchor: int, phrase: str) -> Clause:
        if self.rng.random() < 0.3:
            return [(phrase, anchor), ("*", anchor), (self.pick(("is", "there is")), thing), ("*", thing)]
        said = self.pick((f"is {phrase}", f"is {phrase}", f"stands {phrase}", phrase))
        return [("*", thing), (said, thing), ("*", anchor)]

    def _between(self, thing: int) -> Clause:
        order = self.view.order()
        rank = order.index(thing)
        if not 0 < rank < len(order) - 1:
            return []
        before, after = order[rank - 1], order[rank + 1]
        apart = min(self.view.across(thing, before), self.view.across(after, thing)) > MARGIN
        if not apart or before not in self.things or after not in self.things:
            return []
        if self.rng.random() < 0.5:
            before, after = after, before
        return [("*", thing), ("is between", thing), ("*", before), ("and", before), ("*", after)]

    def listing(self, table: Box) -> Words:
        """Things in random order, as a list: "an image of a table with A , B and C"."""
        count = int(self.rng.integers(1, min(len(self.things), 8) + 1))
        order = [int(i) for i in self.rng.permutation(self.things)[:count]]
        lead = self.pick(("an image of a table with", "a table with", "on a table there is", "i see", "here is", ""))
        on_table = "table" in lead
        words = [Word(w, table if on_table else self.view.items[order[0]].box, None, False) for w in lead.split()]
        if not on_table:
            words = [w._replace(thing=order[0]) for w in words]
        for position, thing in enumerate(order):
            if position:
                words.append(words[-1]._replace(text="and" if position == count - 1 else ",", named=False))
            words += self.written([("*", thing)])
        if not on_table and self.rng.random() < (0.2 if lead else 0.6):
            end = "on a table" if lead else "are on a table" if count > 1 else "is on a table"
            words += [Word(w, table, None, False) for w in end.split()]
        return words

    def written(self, clause: Clause) -> Words:
        words: Words = []
        alone = " ".join(piece for piece, _ in clause) in (*_PLAIN, "*")
        for piece, thing in clause:
            text, named = (self.call(thing, alone), True) if piece == "*" else (piece, False)
            words += [Word(w, self.view.items[thing].box, thing, named) for w in text.split()]
        return words


def _story(teller: _Teller, sentences: int) -> Words:
    words: Words = []
    told: set[int] = set()
    last: int | None = None
    for _ in range(sentences):
        clause = teller.written(teller.clause(last, told))
        # Without a verb a clause would run into the one before it.
        has_verb = any(w.text in _VERBS for w in clause)
        joint = teller.pick((",", ", and", "and", ".", ".") if has_verb else (",", ".")) if words else ""
        joint_words = [words[-1]._replace(text=w, named=False) for w in joint.split()]
        if len(words) + len(joint_words) + len(clause) > LONGEST:
            break
        words += joint_words + clause
        told |= {w.thing for w in clause if w.thing is not None and w.named}
        # "it" is what the clause was about: clear only where one thing was named.
        named = {w.thing for w in clause if w.named}
        last = named.pop() if len(named) == 1 else None
    return words


def traces(
    items: Sequence[Item], table: Box, width: int, height: int, rng: np.random.Generator, count: int = 4
) -> list[Words]:
    """``count`` texts in free order: one list of things, the others stories of one to six clauses. Empty where no thing
    can be named alone. Most end with a full stop, some do not, as people type."""
    teller = _Teller(View(tuple(items), width, height), rng)
    if not teller.things:
        return []
    out = []
    for number in range(count):
        words = teller.listing(table) if number == 0 else _story(teller, int(rng.integers(1, 7)))
        out.append([*words, words[-1]._replace(text=".", named=False)] if rng.random() < 0.75 else words)
    return out
