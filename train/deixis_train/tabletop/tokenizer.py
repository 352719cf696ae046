"""The demo's vocabulary: whole words of the scene language, and single characters for everything else."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

PAD, END, UNKNOWN = 0, 1, 2  # the start token is PAD, as in T5
SPACE = "▁"


def build_tokenizer(words: Iterable[str], size: int) -> Tokenizer:
    """A Unigram tokenizer (NFKC, lower case, Metaspace) whose pieces are `words`, punctuation and characters.

    Scores make a whole word win over its characters. Raises ValueError when the pieces do not fit into `size`.
    """
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(SPACE + word, -2.0) for word in sorted(set(words))]
    pieces += [(mark, -3.0) for mark in ",.:;?!'\"-"]
    pieces += [(SPACE, -5.0)]
    pieces += [(character, -8.0) for character in string.ascii_lowercase + string.digits]
    if len(pieces) > size:
        raise ValueError(f"{len(pieces)} pieces do not fit into a vocabulary of {size}")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return tokenizer


def join_words(words: list[str]) -> tuple[str, list[int]]:
    """Words as written (punctuation glued to the word before it) and, for each character, the index of its word."""
    text, owner = "", []
    for index, word in enumerate(words):
        glued = word if not text or word in ",.;:?!" else " " + word
        text += glued
        owner += [index] * len(glued)
    return text, owner


def encode_words(tokenizer: Tokenizer, words: list[str]) -> tuple[list[int], list[int]]:
    """Token ids of a list of words, and the word each token came from."""
    text, owner = join_words(words)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return encoding.ids, [owner[max(start, end - 1)] for start, end in encoding.offsets]
