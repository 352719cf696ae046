"""Which utterance of a narration each token or word belongs to, and so which box (section 14.1, online part)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis_train.data.samples import Utterance

# "rank": by place in the sequence, as the reference does it; knows nothing of the words. "text": by the words
# themselves, where the utterances spell the caption.
Alignment = Literal["rank", "text"]

PRESENT = 1e-5  # centres up to here mean that there is no trace
PAD, EOS = 0, 1  # BOS = PAD

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def valid_utterances(utterances: Sequence[Utterance]) -> NDArray[np.bool_]:
    """[U]: which utterances have words and a place."""
    return np.array([bool(u.text.strip()) and min(u.center) > PRESENT for u in utterances], bool)


def align_by_rank(count: int, valid: ArrayLike) -> Ints:
    """Utterance of each of `count` words, by rank (section 14.1).

    Words and valid utterances are laid out evenly over the same stretch; each word takes the nearest utterance, the
    earlier of two equally near ones.

    Args:
        count: number of words (or tokens that are words).
        valid: [U], which utterances count.

    Returns:
        [count] indices into the utterances, not decreasing; -1 throughout when no utterance is valid.
    """
    valid = np.asarray(valid, bool)
    known = np.flatnonzero(valid)
    if count == 0 or not len(known):
        return np.full(count, -1)
    ranks = np.arange(1, len(known) + 1, dtype=np.float32) / np.float32(len(known))
    words = np.arange(1, count + 1, dtype=np.float32) / np.float32(count)
    words = ranks[0] + words * (ranks[-1] - ranks[0])
    return known[np.abs(words[:, None] - ranks).argmin(1)]


def align_by_text(text: str, ends: Sequence[int], utterances: Sequence[Utterance]) -> Ints | None:
    """Utterance of each piece of a text, by the characters it is made of.

    Args:
        text: the caption.
        ends: [N], for each piece the offset behind its last character.

    Returns:
        [N] indices into the utterances, -1 for pieces of an utterance without a place; None when the utterances, one
        after the other, are not found in the text. What stands between two utterances belongs to the earlier one, save
        that a piece that ends in white space belongs to what comes after.
    """
    valid = valid_utterances(utterances)
    lower = text.lower()
    starts: list[int] = []
    owners: list[int] = []
    cursor = 0
    for index, utterance in enumerate(utterances):
        words = utterance.text.strip().lower()
        if not words:
            continue
        found = lower.find(words, cursor)
        if found < 0:
            return None
        starts.append(found)
        owners.append(index)
        cursor = found + len(words)
    if not owners:
        return None
    last = np.array([end if text[end - 1 : end].isspace() else end - 1 for end in ends], np.int64)
    pieces = np.asarray(owners)[np.maximum(np.searchsorted(starts, last, side="right") - 1, 0)]
    return np.where(valid[pieces], pieces, -1)


def points_of_tokens(
    tokens: ArrayLike,
    owners: ArrayLike,
    utterances: Sequence[Utterance],
    width: int,
    height: int,
    special: Sequence[int] = (PAD, EOS),
) -> Floats:
    """Corners that each position points at (section 14.1).

    Args:
        tokens: [L] ids.
        owners: [n] utterance of each token that is a word, -1 for none, in order.
        width, height: px of the stored picture.
        special: ids that are no words.

    Returns:
        float32 [L, 4]: the utterance's box XYXY in whole px of the stored picture, clipped to it; zeros at positions
        that are no words, or whose word has no utterance.
    """
    ids = np.asarray(tokens)
    owners = np.asarray(owners, np.int64)
    points = np.zeros((len(ids), 4), np.float32)
    words = np.flatnonzero(~np.isin(ids, special))
    placed = owners >= 0
    if placed.any():
        boxes = np.array([u.box for u in utterances], np.float32)[owners[placed]]
        side = np.array([width, height, width, height], np.float32)
        points[words[placed]] = np.rint(np.clip(boxes, 0, 1) * side)
    return points


def boxes_of_words(
    words: Sequence[str], utterances: Sequence[Utterance], alignment: Alignment = "rank"
) -> NDArray[np.float64]:
    """The ground-truth trace of a narration with one box per word, which is what LBM compares (section 15).

    Returns:
        float64 [W, 4] XYXY as fractions of the picture, clipped to 0..1; all zeros for a word without a place: with
        alignment "rank" that is every word or none.
    """
    owners = None
    if alignment == "text":
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        owners = align_by_text(" ".join(words), ends.tolist(), utterances)
    if owners is None:
        owners = align_by_rank(len(words), valid_utterances(utterances))
    boxes = np.zeros((len(words), 4))
    placed = owners >= 0
    if placed.any():
        boxes[placed] = np.clip(np.array([u.box for u in utterances])[owners[placed]], 0, 1)
    return boxes
