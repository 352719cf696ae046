"""SentencePiece as tokenizer.json: the ids of the goldens, and of the library itself on any text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as model_format
from tokenizers import Tokenizer

from deixis import conversation
from deixis.bundle import ConversationSpec
from deixis_export.sentencepiece import tokenizer_json_from_sentencepiece

FOLDER = Path(__file__).parents[1] / "golden" / "glamm"
MODEL = FOLDER / "tokenizer.model"
GOLDEN = json.loads((FOLDER / "text.json").read_text(encoding="utf-8"))
ADDED = GOLDEN["special_ids"]
SPEC = ConversationSpec(
    system=conversation.SYSTEM,
    image_sentence=conversation.IMAGE_SENTENCE,
    image_tokens=576,
    begin_id=1,
    end_id=2,
    image_start_id=ADDED["<im_start>"],
    image_end_id=ADDED["<im_end>"],
    mask_id=ADDED["[SEG]"],
    phrase_start_id=ADDED["<p>"],
    phrase_end_id=ADDED["</p>"],
    region_id=ADDED["<bbox>"],
)
TOKENIZER = Tokenizer.from_str(tokenizer_json_from_sentencepiece(MODEL, ADDED))
LIBRARY = SentencePieceProcessor(model_file=str(MODEL))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def slow(text: str) -> list[int]:
    """Section 5.3: cut at added tokens, strip beside those given as strings, every piece to the library."""
    controls = {"<unk>": 0, "<s>": 1, "</s>": 2}
    marks = "|".join(re.escape(mark) for mark in [*ADDED, *controls])
    pieces = re.split(f"({marks})", text)
    for place in range(1, len(pieces), 2):
        if pieces[place] in ADDED:
            pieces[place - 1] = pieces[place - 1].rstrip()
            pieces[place + 1] = pieces[place + 1].lstrip()
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        ids += [{**ADDED, **controls}[piece]] if place % 2 else LIBRARY.encode(piece)
    return ids


def turns_of(text: str) -> list[conversation.Turn]:
    """A golden conversation as turns; the image sentence stays in the first question."""
    rounds = [own for own in text.split("USER: ")[1:] if own]
    return [tuple(own.removesuffix("</s>").split(" ASSISTANT: ")) for own in rounds]  # type: ignore[misc]


@pytest.mark.parametrize("kind", sorted(GOLDEN["collate"]))
def test_ids_and_labels_of_the_golden_conversations(kind: str) -> None:
    case = GOLDEN["collate"][kind]
    for member, ids, labels, attention in zip(
        case["members"], case["input_ids"], case["labels"], case["attention"], strict=True
    ):
        length = sum(attention)
        got = conversation.label_mask(SPEC, turns_of(GOLDEN["conversations"][member]), encode)
        assert got == (ids[:length], labels[:length])


def test_ids_of_the_golden_prompt() -> None:
    assert conversation.prompt_ids(GOLDEN["infer_prompt"], encode, SPEC) == GOLDEN["infer_ids"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=range(len(GOLDEN["decode"])))
def test_text_of_the_golden_answers(case: dict) -> None:
    ids = [i for i in case["ids"] if i != conversation.IMAGE_ID]
    text = conversation.clean_answer(TOKENIZER.decode(ids, skip_special_tokens=False))
    assert text == case["text_output"]
    read = conversation.parse_answer_ids(ids[len(GOLDEN["infer_ids"]) - 1 :], TOKENIZER.decode, SPEC)
    assert [phrase.text for phrase in read.phrases] == case["phrases"]


def test_marks_of_the_vocabulary_are_decoded_and_control_tokens_need_not_be() -> None:
    ids = [1, *encode("<p> a dog </p> [SEG] runs."), 2]
    assert TOKENIZER.decode(ids) == "<p> a dog </p> [SEG] runs."


letters = st.text(st.sampled_from("abcdehinorst  .,-'\n\t1é世"), max_size=30)
parts = st.one_of(letters, st.text(max_size=8), st.sampled_from([*ADDED, "</s>", "<s>", "▁", "<0x0A>"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(parts, max_size=8).map("".join))
@example("-----  - --------- ")
@example(" [SEG]  </p>\n\n<p>x")
def test_ids_of_any_text(text: str) -> None:
    # What counts as white space beside a token differs for four control characters that no text holds.
    text = re.sub("[\x1c-\x1f]", "", text)
    assert encode(text) == slow(text)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40))
def test_text_comes_back(text: str) -> None:
    ids = encode(text)
    if not set(ids) & {0, 1, 2, *ADDED.values()}:
        assert TOKENIZER.decode(ids) == text


def test_a_follow_up_has_the_ids_of_training() -> None:
    first, second = turns_of(GOLDEN["conversations"]["res_two_turns"])
    ids, _ = conversation.label_mask(SPEC, [first], encode)
    more = conversation.follow_up_ids(SPEC, second[0], encode)
    whole = conversation.prompt_ids(conversation.render(SPEC, [first, (second[0], None)]), encode, SPEC)
    assert ids + more == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", model_format.TrainerSpec.UNIGRAM), "BPE"),
        (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "byte fallback"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "repeated spaces"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), "identity"),
        (lambda m: setattr(m.pieces[300], "type", 4), "user-defined"),
    ],
)
def test_models_of_another_kind_are_refused(change, reason: str, tmp_path: Path) -> None:
    model = model_format.ModelProto()
    model.ParseFromString(MODEL.read_bytes())
    change(model)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=reason):
        tokenizer_json_from_sentencepiece(path, ADDED)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match="no such file"):
        tokenizer_json_from_sentencepiece(path, ADDED)
    path.write_bytes(b"\xff\xffnothing")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_json_from_sentencepiece(path, ADDED)
    with pytest.raises(ValueError, match="without gaps"):
        tokenizer_json_from_sentencepiece(MODEL, {**ADDED, "[SEG]": 700})
