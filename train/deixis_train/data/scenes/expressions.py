"""Referring expressions: each fits exactly one object of its scene, by attributes, by place among its like, or by its
relation to others. Whatever is within the margin of a doubt is not said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deixis_train.data.scenes.language import MARGIN, PHRASES, RELATIONS, Item, Noun, View, nouns

VAGUE = 0.3  # people seldom say "the red object" of what they can call a mug
SYNONYMS = {"large": "big", "small": "little", "object": "thing"}


def vary(text: str, rng: np.random.Generator, share: float = 0.25) -> str:
    """``text`` with a share of its words replaced by words that mean the same."""
    return " ".join(SYNONYMS[w] if w in SYNONYMS and rng.random() < share else w for w in text.split())


def superlatives(view: View, noun: Noun, index: int) -> list[str]:
    """Noun phrases (without article) that single ``index`` out by its place among the objects that ``noun`` fits."""
    others = [o for o in noun.fits if o != index]
    if not others:
        return []
    across = [view.across(o, index) for o in others]
    along = [view.along(o, index) for o in others]
    out = []
    if min(across) > MARGIN:
        out += [f"leftmost {noun.text}", f"{noun.text} on the far left"]
        out += [f"left {noun.text}"] * (len(others) == 1)
    if max(across) < -MARGIN:
        out += [f"rightmost {noun.text}", f"{noun.text} on the far right"]
        out += [f"right {noun.text}"] * (len(others) == 1)
    if max(along) < -MARGIN:
        out.append(f"{noun.text} at the front")
    if min(along) > MARGIN:
        out.append(f"{noun.text} at the back")
    if len(others) == 2 and min(across) < -MARGIN and max(across) > MARGIN:
        out.append(f"middle {noun.text}")
    for place, third in view.thirds(index).items():
        if third > MARGIN / 2 and all(view.thirds(o)[place] < -MARGIN / 2 for o in others):
            out += [f"{noun.text} {way}" for way in PHRASES[place]]
    return out


def unique_names(items: Sequence[Item], index: int) -> list[str]:
    """Noun phrases that fit ``index`` alone, without article, the shortest first; empty where another object shares
    kind, colour and size."""
    return [n.text for n in nouns(items, index) if n.fits == {index}]


def _relations(view: View, noun: Noun, index: int, names: list[list[str]]) -> list[str]:
    """Relations to objects that can be named alone, which ``index`` and no other object of ``noun`` has."""
    out = []
    for anchor, called in enumerate(names):
        others = [i for i in noun.fits if i not in (index, anchor)]
        if anchor == index or not called or not others:
            continue
        for relation, score in RELATIONS.items():
            if score(view, index, anchor) > MARGIN and all(score(view, i, anchor) < -MARGIN for i in others):
                out += [f"{noun.text} {phrase} the {called[0]}" for phrase in PHRASES[relation]]
    order = view.order()
    rank = order.index(index)
    if 0 < rank < len(order) - 1:
        # Only `index` lies between its neighbours, so this is unique for every noun.
        before, after = order[rank - 1], order[rank + 1]
        apart = view.across(index, before) > MARGIN and view.across(after, index) > MARGIN
        if apart and names[before] and names[after]:
            out.append(f"{noun.text} between the {names[before][0]} and the {names[after][0]}")
    return out


def expressions(
    items: Sequence[Item], width: int, height: int, rng: np.random.Generator, per_object: int = 3
) -> list[tuple[str, int]]:
    """Referring expressions as (text, index of the one object that it fits), up to ``per_object`` different ones for
    each object: by attributes where they suffice, by place among its like, by relation to others."""
    view = View(tuple(items), width, height)
    names = [unique_names(items, i) for i in range(len(items))]
    out = []
    for index in range(len(items)):
        shared = [n for n in nouns(items, index) if len(n.fits) > 1]
        groups = [
            list(names[index]),
            [text for n in shared for text in superlatives(view, n, index)],
            [text for n in shared for text in _relations(view, n, index, names)],
        ]
        for _ in range(per_object):
            weights = np.array([share * bool(group) for share, group in zip((0.5, 0.25, 0.25), groups, strict=True)])
            if not weights.any():
                break
            group = groups[int(rng.choice(3, p=weights / weights.sum()))]
            likely = np.array([VAGUE if "object" in text.split() else 1.0 for text in group])
            text = vary(group.pop(int(rng.choice(len(group), p=likely / likely.sum()))), rng)
            # People who search often leave the article out.
            out.append((text if rng.random() < 0.15 else f"the {text}", index))
    return out
