"""A checkpoint's tokenizer as requests need it: instructions, given texts, and which pieces make which word."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import Tokenizer

from deixis.bundle import TaskSpec
from deixis.errors import PromptError, TextTooLongError
from deixis_train.models.config import PixelLLMConfig


@dataclass(frozen=True)
class Pieces:
    """ids of a text without special ones, and the characters [start, end) of the text that each stands for."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def words(self) -> list[tuple[str, list[int]]]:
        """Words (what stands between white space) with the indices of the pieces that share a character with them.

        A piece that shares none, a lone mark of a word's beginning, belongs to the word that follows.
        """
        words = [match.span() for match in re.finditer(r"\S+", self.text)]
        owned: list[list[int]] = [[] for _ in words]
        for index, (start, end) in enumerate(self.spans):
            sharing = [n for n, (first, last) in enumerate(words) if start < end and start < last and first < end]
            if not sharing:
                sharing = [n for n, (first, _) in enumerate(words) if first >= end][:1]
            for n in sharing:
                owned[n].append(index)
        return [(self.text[start:end], own) for (start, end), own in zip(words, owned, strict=True)]


class TextEncoder:
    """Texts to ids and back."""

    def __init__(self, tokenizer_json: str, config: PixelLLMConfig) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._end = config.end_token_id
        self._refused = {config.begin_token_id, config.end_token_id, config.unknown_token_id, 0}

    def encode(self, text: str) -> Pieces:
        """Raises PromptError for a text that is empty or has characters that the model has no ids for."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        for piece, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if piece in self._refused:
                raise PromptError(f"the model does not know {text[start:end].strip()!r} (character {start})")
        if not encoding.ids or not text.strip():
            raise PromptError("the text is empty")
        return Pieces(text, tuple(encoding.ids), tuple(encoding.offsets))

    def given(self, text: str, task: TaskSpec) -> Pieces:
        """A text that the decoder is given. Raises PromptError, and TextTooLongError when it does not fit there or into
        the instruction."""
        pieces = self.encode(text)
        most = task.max_length - 2
        if "{text}" in task.instruction:
            around = task.instruction.replace("{text}", "").strip()
            most = min(most, task.instruction_tokens - 1 - (len(self.encode(around).ids) if around else 0))
        if len(pieces.ids) > most:
            raise TextTooLongError(f"the text has {len(pieces.ids)} tokens, the model takes at most {most}; shorten it")
        return pieces

    def context(self, task: TaskSpec, text: str) -> list[int]:
        """Ids of the instruction and EOS, cut at the task's limit."""
        if task.instruction_tokens == 0:
            return []
        instruction = task.instruction.replace("{text}", text)
        ids = self.encode(instruction).ids if instruction.strip() else ()
        return [*ids, self._end][: task.instruction_tokens]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True).rstrip()
