"""Comparisons of text: conversations, ids and labels, and what answers say. Runtime, training and export share it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from deixis import conversation
from deixis.bundle import ConversationSpec
from deixis_export.parity.glamm.context import GlammContext
from deixis_export.parity.report import EXACT, Absent, Array, GoldenFile, Line, Report
from deixis_export.sentencepiece import tokenizer_json_from_sentencepiece

TOKENIZER = "tokenizer.model"
PADDING = 0


class Words:
    """The file's own tokenizer with the tokens added behind it, and how its model is spoken to."""

    def __init__(self, context: GlammContext, added: dict[str, int]) -> None:
        path = context.directory / TOKENIZER
        if not path.is_file():
            raise Absent(f"no file {TOKENIZER}")
        self.tokenizer = Tokenizer.from_str(tokenizer_json_from_sentencepiece(path, added))
        self.spec = ConversationSpec(
            system=conversation.SYSTEM,
            image_sentence=conversation.IMAGE_SENTENCE,
            image_tokens=context.config.clip.tokens,
            begin_id=self.id_of(conversation.BEGIN),
            end_id=self.id_of(conversation.END),
            image_start_id=self.id_of(conversation.IMAGE_START),
            image_end_id=self.id_of(conversation.IMAGE_END),
            mask_id=self.id_of(conversation.MASK),
            phrase_start_id=self.id_of(conversation.PHRASE_START),
            phrase_end_id=self.id_of(conversation.PHRASE_END),
            region_id=self.id_of(conversation.REGION),
        )

    def id_of(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise Absent(f"the tokenizer has no {token}")
        return found

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """With special tokens."""
        return self.tokenizer.decode([i for i in ids if i != conversation.IMAGE_ID], skip_special_tokens=False)


def text(context: GlammContext, file: GoldenFile, report: Report) -> None:
    def check(name: str, compute: Callable[[], Any]) -> None:
        report.check(file, name, lambda: _array(compute()), EXACT)

    added: dict[str, int] = file.tree("special_ids")
    try:
        words = Words(context, added)
    except Absent as reason:
        report.add(Line(file.name, "*", "absent", note=f"({reason})"))
        return
    except ValueError as error:
        report.add(Line(file.name, "*", "FAIL", float("nan"), note=f"({error})"))
        return
    for token in added:
        check(f"special_ids/{token}", lambda t=token: words.id_of(t))
    check("vocab_len", lambda: words.tokenizer.get_vocab_size(with_added_tokens=True))
    _tagged(check, file)
    _conversations(check, file, words)
    _collated(check, file, words)
    _answers(check, file, words)


def _array(value: Any) -> Array:
    """As the file's leaves are: no entries have no type."""
    return np.asarray(value) if not isinstance(value, list) or value else np.zeros(0)


def _tagged(check: Callable[..., None], file: GoldenFile) -> None:
    case = file.tree("tagged_caption")
    spans = [tuple(span) for span in case["tokens_positive"]]
    check("tagged_caption/tagged", lambda: conversation.tag_phrases(case["caption"], spans))


def _turns(text: str, spec: ConversationSpec) -> list[conversation.Turn]:
    """The questions and answers of a rendered conversation, without what rendering puts before the first one."""
    rounds = text.split("USER: ")[1:]
    turns: list[conversation.Turn] = []
    for number, own in enumerate(rounds):
        question, found, answer = own.removesuffix(conversation.END).partition(" ASSISTANT: ")
        if not found:
            question = question.removesuffix(" ASSISTANT:")
        if number == 0:
            question = question.removeprefix(f"{spec.image_sentence}\n")
        turns.append((question, answer if found else None))
    return turns


def _conversations(check: Callable[..., None], file: GoldenFile, words: Words) -> None:
    marked = conversation.IMAGE_START + conversation.IMAGE + conversation.IMAGE_END
    for name, wanted in file.tree("conversations").items():
        # The file's texts still have the bare <image>.
        turns = _turns(wanted, words.spec)
        check(
            f"conversations/{name}",
            lambda t=turns: conversation.render(words.spec, t).replace(marked, conversation.IMAGE),
        )
    prompt = file.tree("infer_prompt")
    marks = (conversation.IMAGE_START, conversation.IMAGE_END)
    asked = _turns(prompt.replace(marks[0], "").replace(marks[1], ""), words.spec)
    check("infer_prompt", lambda: conversation.render(words.spec, asked))
    check("infer_ids", lambda: conversation.prompt_ids(prompt, words.encode, words.spec))


def _collated(check: Callable[..., None], file: GoldenFile, words: Words) -> None:
    texts = file.tree("conversations")
    for kind, case in file.tree("collate").items():
        members = case["members"]

        @lru_cache(maxsize=1)
        def rows(members: tuple[str, ...] = tuple(members)) -> list[tuple[list[int], list[int]]]:
            turns = [_turns(texts[member], words.spec) for member in members]
            return [conversation.label_mask(words.spec, own, words.encode) for own in turns]

        def padded(part: int, filler: int, rows: Callable[[], Any] = rows) -> list[list[int]]:
            longest = max(len(row[part]) for row in rows())
            return [row[part] + [filler] * (longest - len(row[part])) for row in rows()]

        def attention(padded: Callable[[int, int], Any] = padded) -> Array:
            return (np.array(padded(0, -1)) != -1).astype(int)

        check(f"collate/{kind}/input_ids", lambda p=padded: p(0, PADDING))
        check(f"collate/{kind}/labels", lambda p=padded: p(1, conversation.IGNORED))
        check(f"collate/{kind}/attention", attention)
        check(f"collate/{kind}/offset", lambda m=members: list(range(len(m) + 1)))


def _answers(check: Callable[..., None], file: GoldenFile, words: Words) -> None:
    prompt = file.tree("infer_prompt").replace(conversation.IMAGE_START, "").replace(conversation.IMAGE_END, "")
    [(question, _)] = _turns(prompt, words.spec)
    for number, case in enumerate(file.tree("decode")):
        at = f"decode/{number}"
        turns = [(question, case["response"])]
        check(f"{at}/ids", lambda t=turns: conversation.label_mask(words.spec, t, words.encode)[0])
        check(f"{at}/text_output", lambda c=case: conversation.clean_answer(words.decode(c["ids"])))
        check(f"{at}/cleaned", lambda c=case: conversation.published_gcg(c["text_output"])[0])
        check(f"{at}/phrases", lambda c=case: conversation.published_gcg(c["text_output"])[1])


CASES: dict[str, Callable[[GlammContext, GoldenFile, Report], None]] = {"text.json": text}
