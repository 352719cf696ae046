"""Text to ids and back, and which characters each piece stands for."""

from __future__ import annotations

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from tokenizers import Tokenizer

from deixis.bundle import TokenizerSpec
from deixis.errors import BundleFormatError, PromptError

Span = tuple[int, int]

_WORD = re.compile(r"\S+")
_end = itemgetter(1)


@dataclass(frozen=True)
class Encoded:
    """ids of the pieces of a text (no special ids), and the characters [start, end) of the text each stands for."""

    ids: tuple[int, ...]
    spans: tuple[Span, ...]


class TextTokenizer:
    """A `tokenizer.json` with the special ids of the manifest."""

    def __init__(self, path: str | os.PathLike[str], spec: TokenizerSpec) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise BundleFormatError(f"{path}: not a tokenizer.json that this version reads: {reason}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.spec = spec

    def encode(self, text: str, what: str = "text") -> Encoded:
        """Pieces of `text`.

        Raises PromptError when it is no text, is empty, or has characters that the model has no ids for.
        """
        if not isinstance(text, str):
            raise PromptError(f"{what} must be a string, not {type(text).__name__}")
        if not text.strip():
            raise PromptError(f"{what} is empty")
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise PromptError(f"{what} is not valid Unicode: {error}") from None
        special = {self.spec.begin_id, self.spec.end_id, self.spec.pad_id}
        for piece, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if piece == self.spec.unknown_id:
                raise PromptError(f"{what}: the model does not know {text[start:end].strip()!r} (character {start})")
            if piece in special:
                raise PromptError(f"{what}: {text[start:end].strip()!r} (character {start}) is a control token")
        if not encoding.ids:
            raise PromptError(f"{what} is empty")
        return Encoded(tuple(encoding.ids), tuple(encoding.offsets))

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        """Text of ids; special ones give nothing."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass
class Spelling:
    """A text that grows by ids: `text` so far, and for every id the characters [start, end) it added."""

    tokenizer: TextTokenizer
    ids: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    text: str = ""

    def add(self, piece: int) -> None:
        before = len(self.text)
        self.ids.append(int(piece))
        self.text = self.tokenizer.decode(self.ids)
        self.spans.append((min(before, len(self.text)), len(self.text)))


@dataclass(frozen=True)
class WordPieces:
    """Characters [start, end) of one word, and the indices of its pieces."""

    start: int
    end: int
    pieces: tuple[int, ...]


def words_of(text: str, spans: Sequence[Span], begin: int = 0) -> list[WordPieces]:
    """Words of a text and the pieces they are made of. A word is what stands between white space, punctuation included.
    `begin`: only words from that character on, which no word has before and behind it.

    A piece belongs to the words it shares a character with. One that shares none (a lone word-boundary mark) belongs to
    the word that follows.
    """
    words = [match.span() for match in _WORD.finditer(text, begin)]
    starts, ends = [start for start, _ in words], [end for _, end in words]
    pieces: list[list[int]] = [[] for _ in words]
    earliest = bisect_right(spans, begin, key=_end)
    while earliest and spans[earliest - 1][0] >= begin:  # without characters
        earliest -= 1
    for index in range(earliest, len(spans)):
        start, end = spans[index]
        # words first .. behind - 1 share a character
        first, behind = bisect_right(ends, start), bisect_left(starts, end)
        if start == end or first >= behind:
            first, behind = bisect_left(starts, end), bisect_left(starts, end) + 1
        for own in pieces[first:behind]:
            own.append(index)
    return [WordPieces(start, end, tuple(own)) for (start, end), own in zip(words, pieces, strict=True)]
