"""Tokenizers of small models: whole words of the data, and single characters for everything else."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers

PAD, END, UNKNOWN = 0, 1, 2  # the start token is PAD, as in T5
SPACE = "▁"
MARKS = ",.:;?!'\"-"
WORD_SCORE = -2.0


class CachedTokenizer:
    """A tokenizer that remembers what it has encoded: the texts of training come again every epoch."""

    def __init__(self, tokenizer: Tokenizer, size: int = 200_000) -> None:
        @lru_cache(maxsize=size)
        def encode(text: str, special: bool) -> Encoding:
            return tokenizer.encode(text, add_special_tokens=special)

        self._encode = encode

    def encode(self, sequence: str, add_special_tokens: bool = True) -> Encoding:
        return self._encode(sequence, add_special_tokens)


def words_of(texts: Iterable[str]) -> set[str]:
    """Words of letters alone, lower case, without the marks around them; rarer things are spelled by characters."""
    words: set[str] = set()
    for text in texts:
        for mark in MARKS:
            text = text.replace(mark, " ")
        words.update(word for word in text.lower().split() if word.isalpha() and word.isascii())
    return words


def build_tokenizer(words: Iterable[str], size: int) -> Tokenizer:
    """A Unigram tokenizer (NFKC, lower case, Metaspace) whose pieces are `words`, punctuation and characters.

    Scores make a whole word win over its characters. Raises ValueError when the pieces do not fit into `size`.
    """
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(SPACE + word, WORD_SCORE) for word in sorted(set(words))]
    pieces += [(mark, -3.0) for mark in MARKS]
    pieces += [(SPACE, -5.0)]
    pieces += [(character, -8.0) for character in string.ascii_lowercase + string.digits]
    if len(pieces) > size:
        raise ValueError(
            f"{len(pieces)} pieces do not fit into a vocabulary of {size}; raise model.vocab in the recipe"
        )
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return tokenizer


def extend_tokenizer(tokenizer_json: str, words: Iterable[str], size: int) -> tuple[str, int]:
    """A Unigram tokenizer with the words that it lacks put behind its pieces, whose ids stay.

    Returns:
        Its JSON and the number of pieces it had.

    Raises:
        ValueError: no Unigram model, or the words do not fit into `size`.
    """
    values: dict[str, Any] = json.loads(tokenizer_json)
    model = values.get("model", {})
    if model.get("type") != "Unigram":
        raise ValueError("only a Unigram tokenizer can be extended by words; name another one in init.tokenizer")
    known = {piece for piece, _ in model["vocab"]}
    new = [SPACE + word for word in sorted(set(words)) if SPACE + word not in known]
    had = len(model["vocab"])
    if had + len(new) > size:
        raise ValueError(
            f"{had} pieces and {len(new)} new words do not fit into a vocabulary of {size}; raise model.vocab"
        )
    model["vocab"] += [[piece, WORD_SCORE] for piece in new]
    return json.dumps(values, ensure_ascii=False, indent=1), had
