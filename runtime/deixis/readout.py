"""From locations to words and boxes in pixels of the user's picture (section 8)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import TokenizerSpec
from deixis.geometry import Geometry
from deixis.results import Point, Word
from deixis.tokenizer import WordPieces

Floats = NDArray[np.floating]


def valid_positions(ids: NDArray[np.int64], rule: str, spec: TokenizerSpec) -> NDArray[np.bool_]:
    """Which positions' points count: ids [..., L] with zeros behind EOS -> bool [..., L].

    rule: comma list of what does not count: pad, begin, end, end-1 (the next id is EOS), text (all others); a leading ^
    turns the whole round. Raises ValueError on an unknown word in it.
    """
    pad, begin, end = ids == spec.pad_id, ids == spec.begin_id, ids == spec.end_id
    before_end = np.zeros_like(end)
    before_end[..., :-1] = end[..., 1:]
    drops = {"pad": pad, "begin": begin, "end": end, "end-1": before_end, "text": ~(pad | begin | end)}
    dropped = np.zeros_like(pad)
    for word in filter(None, rule.removeprefix("^").split(",")):
        if word not in drops:
            raise ValueError(f"points_at {rule!r}: unknown {word!r}; known are {', '.join(drops)}")
        dropped |= drops[word]
    return dropped if rule.startswith("^") else ~dropped


def box_of_points(points: Floats, valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Bounds (x0, y0, x1, y1) of the points [L, P, 2] at the valid positions [L].

    Raises ValueError when none is valid.
    """
    chosen = np.asarray(points, np.float64)[valid].reshape(-1, 2)
    if not len(chosen):
        raise ValueError("no position counts")
    return np.concatenate([chosen.min(axis=0), chosen.max(axis=0)])


def make_words(
    text: str,
    words: list[WordPieces],
    locations: Floats,
    valid: NDArray[np.bool_],
    log_probs: Floats | None,
    geometry: Geometry,
) -> tuple[Word, ...]:
    """Words with places, from n pieces.

    Locations [n, P, 2] relative to the valid picture (P = 0 gives words no places), valid [n], log_probs [n] or None.
    """
    pixels = geometry.relative_to_original(locations)
    return tuple(_make_word(text, word, pixels, valid, log_probs) for word in words)


def _make_word(text: str, word: WordPieces, pixels: Floats, valid: NDArray[np.bool_], log_probs: Floats | None) -> Word:
    pieces = list(word.pieces)
    counting = [piece for piece in pieces if valid[piece]] if pixels.shape[1] else []
    points: tuple[Point, Point] | None = None
    if counting:
        x0, y0, x1, y1 = (float(v) for v in box_of_points(pixels[counting], np.ones(len(counting), bool)))
        points = ((x0, y0), (x1, y1))
    score = float(np.mean(log_probs[pieces])) if log_probs is not None and pieces else None
    return Word(text[word.start : word.end], word.start, word.end, points, score)
