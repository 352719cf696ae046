"""Conversations: their text, ids and labels against the goldens, and answers of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis import conversation
from deixis.bundle import ConversationSpec
from deixis.conversation import END, IGNORED, IMAGE, IMAGE_ID, MASK, PHRASE_END, PHRASE_START

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glamm" / "text.json").read_text(encoding="utf-8"))
SPEC = ConversationSpec(
    system=conversation.SYSTEM,
    image_sentence=conversation.IMAGE_SENTENCE,
    image_tokens=576,
    begin_id=1,
    end_id=2,
    image_start_id=600,
    image_end_id=601,
    mask_id=604,
    phrase_start_id=605,
    phrase_end_id=606,
    region_id=602,
)
MARK_IDS = {
    "<im_start>": 600,
    "<im_end>": 601,
    "<bbox>": 602,
    "[SEG]": 604,
    "<p>": 605,
    "</p>": 606,
    "</s>": 2,
}


def by_character(text: str) -> list[int]:
    """A tokenizer of marks and characters: character c is 1000 + c."""
    ids: list[int] = []
    while text:
        mark = next((mark for mark in MARK_IDS if text.startswith(mark)), None)
        ids.append(MARK_IDS[mark] if mark else 1000 + ord(text[0]))
        text = text[len(mark or " ") :]
    return ids


def spelled(ids: list[int]) -> str:
    return "".join(chr(i - 1000) for i in ids)


def test_the_published_prompt_to_the_letter() -> None:
    question = (
        "Could you please give me a detailed description of the image? Please respond with interleaved     "
        "segmentation masks for the corresponding parts of the answer."
    )
    assert conversation.render(SPEC, [(question, None)]) == GOLDEN["infer_prompt"]


def test_the_published_conversations_to_the_letter() -> None:
    texts = GOLDEN["conversations"]
    two = [
        ("Can you segment the man in red in this image?", "Sure, it is [SEG]."),
        ("Please segment left dog in this image.", "[SEG]."),
    ]
    assert conversation.render(SPEC, two) == texts["res_two_turns"].replace(IMAGE, f"<im_start>{IMAGE}<im_end>")
    names_the_image = texts["refcoco_region"].split("USER: ")[1].split(" ASSISTANT: ")[0]
    assert conversation.render(SPEC, [(names_the_image, "left man")]) == texts["refcoco_region"].replace(
        IMAGE, f"<im_start>{IMAGE}<im_end>"
    )


def test_without_a_picture_there_is_no_image_sentence() -> None:
    assert conversation.render(SPEC, [("Why?", "So.")], image=False) == f"{SPEC.system} USER: Why? ASSISTANT: So.</s>"


@pytest.mark.parametrize(
    ("turns", "image", "reason"),
    [
        ([], True, "needs a turn"),
        ([("a", None), ("b", None)], True, "turn 1 has no answer"),
        ([("a", "b"), (f"{IMAGE}?", None)], True, "later question"),
        ([("a", f"{IMAGE}")], True, "answer of turn 1"),
        ([(f"{IMAGE}?", None)], False, "without a picture"),
    ],
)
def test_conversations_that_cannot_be(turns: list[conversation.Turn], image: bool, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        conversation.render(SPEC, turns, image=image)


def test_one_picture_per_conversation() -> None:
    with pytest.raises(ValueError, match="2 times"):
        conversation.prompt_ids(f"{IMAGE} and {IMAGE}", by_character, SPEC)


def test_the_ids_hold_the_picture_once_between_its_marks() -> None:
    ids = conversation.prompt_ids(conversation.render(SPEC, [("What is it?", None)]), by_character, SPEC)
    place = ids.index(IMAGE_ID)
    assert ids[0] == SPEC.begin_id
    assert (ids[place - 1], ids[place + 1]) == (SPEC.image_start_id, SPEC.image_end_id)
    assert ids.count(IMAGE_ID) == ids.count(SPEC.begin_id) == 1


def test_a_follow_up_appended_gives_the_ids_of_the_whole_conversation() -> None:
    first, second = ("What is it?", "a dog"), ("What colour?", None)
    opened = conversation.prompt_ids(conversation.render(SPEC, [(first[0], None)]), by_character, SPEC)
    answered = opened + by_character(" a dog") + [SPEC.end_id]
    whole = conversation.prompt_ids(conversation.render(SPEC, [first, second]), by_character, SPEC)
    assert answered + conversation.follow_up_ids(SPEC, second[0], by_character) == whole


plain = st.text(st.characters(codec="utf-8", exclude_characters="<[\x00"), max_size=12)


@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=3), st.booleans())
def test_labels_are_the_answers_and_their_ends(turns: list[conversation.Turn], image: bool) -> None:
    ids, labels = conversation.label_mask(SPEC, turns, by_character, image=image)
    assert ids == conversation.prompt_ids(conversation.render(SPEC, turns, image=image), by_character, SPEC)
    assert all(label in (IGNORED, number) for label, number in zip(labels, ids, strict=True))
    learned = [label for label in labels if label != IGNORED]
    assert learned == [i for _, answer in turns for i in [*by_character(f" {answer}"), SPEC.end_id]]


def test_nothing_to_learn_from_an_open_answer() -> None:
    with pytest.raises(ValueError, match="turn 2 has no answer"):
        conversation.label_mask(SPEC, [("a", "b"), ("c", None)], by_character)


def test_tagging_as_published() -> None:
    case = GOLDEN["tagged_caption"]
    assert conversation.tag_phrases(case["caption"], case["tokens_positive"]) == case["tagged"]
    for spans in ([(0, 5), (4, 8)], [(3, 3)], [(0, 999)]):
        with pytest.raises(ValueError, match="phrase"):
            conversation.tag_phrases(case["caption"], spans)


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=range(len(GOLDEN["decode"])))
def test_published_post_processing(case: dict) -> None:
    cleaned = conversation.clean_answer(f"{conversation.SYSTEM} USER: x ASSISTANT: {case['text_output']}")
    assert cleaned == case["text_output"]
    assert conversation.published_gcg(cleaned) == (case["cleaned"], case["phrases"])


def test_cleaning_as_published() -> None:
    assert conversation.clean_answer("USER: ASSISTANT: no ASSISTANT: a\n b  c   d</s>") == "a b c  d</s>"
    assert conversation.clean_answer("USER: why ASSISTANT:") == "USER: why ASSISTANT:"


def test_an_answer_read() -> None:
    case = GOLDEN["tagged_caption"]
    for text in (case["tagged"], GOLDEN["decode"][0]["text_output"]):
        answer = conversation.parse_answer(text)
        assert answer.text == case["caption"]
        assert [[p.start, p.end] for p in answer.phrases] == case["tokens_positive"]
        assert [p.mask_index for p in answer.phrases] == [0, 1, 2, 3]
        assert (answer.loose_masks, answer.problems) == ((), ())


@pytest.mark.parametrize(
    ("text", "clean", "phrases", "loose", "problems"),
    [
        ("Sure, it is [SEG].</s>", "Sure, it is.", [], (0,), []),
        ("<p> a dog </p> runs [SEG]", "a dog runs", [("a dog", 0)], (), []),
        ("<p> a </p> [SEG] [SEG] <p> b </p>", "a b", [("a", 0), ("b", None)], (1,), ["'b'", "number 2"]),
        ("<p> a dog", "a dog", [], (), ["not closed: 'a dog'"]),
        ("<p> a dog [SEG] runs", "a dog runs", [("a dog", 0)], (), ["not closed before"]),
        ("<p> a <p> b </p> [SEG] </p>", "a b", [("b", 0)], (), ["inside another: 'a'", "without"]),
        ("<p> </p> [SEG]", "", [], (0,), ["empty"]),
        ("a</s>b", "a b", [], (), ["words follow"]),
        ("a <bbox> b <im_end>", "a b", [], (), ["<bbox>", "<im_end>"]),
        ("(<p> two </p>[SEG])<p>men</p>[SEG] 's", "(two) men's", [("two", 0), ("men", 1)], (), []),
        ("- <p> a </p> [SEG]\n  - <p> b\t c </p> [SEG]", "- a\n- b c", [("a", 0), ("b c", 1)], (), []),
    ],
)
def test_marks_that_are_not_in_order(
    text: str, clean: str, phrases: list, loose: tuple[int, ...], problems: list[str]
) -> None:
    answer = conversation.parse_answer(text)
    assert answer.text == clean
    assert [(p.text, p.mask_index) for p in answer.phrases] == phrases
    assert answer.loose_masks == loose
    assert len(answer.problems) == len(problems)
    for problem, part in zip(answer.problems, problems, strict=True):
        assert part in problem and "\n" not in problem


def check(answer: conversation.ParsedAnswer, masks: int) -> None:
    """What holds of every answer."""
    behind = 0
    for phrase in answer.phrases:
        assert behind <= phrase.start < phrase.end <= len(answer.text)
        assert phrase.text == answer.text[phrase.start : phrase.end] == phrase.text.strip()
        behind = phrase.end
    used = [p.mask_index for p in answer.phrases if p.mask_index is not None] + list(answer.loose_masks)
    assert sorted(used) == list(range(masks))
    taken = [p.mask_index for p in answer.phrases if p.mask_index is not None]
    assert taken == sorted(taken)
    assert all("\n" not in problem for problem in answer.problems)


pieces = st.one_of(st.sampled_from([*conversation.MARKS, " ", "\n", "a dog", ".", "(", "'s"]), st.text(max_size=4))


@settings(max_examples=300)
@given(st.lists(pieces, max_size=20).map("".join))
def test_any_text_can_be_read(text: str) -> None:
    check(conversation.parse_answer(text), text.count(MASK))


@given(st.lists(st.one_of(st.integers(590, 610), st.integers(-201, 2200)), max_size=30))
def test_any_ids_can_be_read(ids: list[int]) -> None:
    answer = conversation.parse_answer_ids(ids, lambda own: "".join(chr(max(i, 0)) for i in own), SPEC)
    check(answer, ids.count(SPEC.mask_id))


def test_only_ids_are_marks() -> None:
    ids = [*(1000 + ord(c) for c in "say [SEG] "), *by_character("<p>a dog</p>[SEG]</s>")]
    answer = conversation.parse_answer_ids(ids, spelled, SPEC)
    assert answer.text == "say [SEG] a dog"
    assert [(p.text, p.mask_index) for p in answer.phrases] == [("a dog", 0)]


words = st.lists(st.text("abcdefgh-é9", min_size=1, max_size=5), min_size=1, max_size=8)


@given(st.data(), words)
def test_well_formed_answers_come_back(data: st.DataObject, parts: list[str]) -> None:
    text = " ".join(parts)
    starts = [sum(len(p) + 1 for p in parts[:i]) for i in range(len(parts) + 1)]
    cuts = data.draw(st.lists(st.integers(0, len(parts)), unique=True).map(sorted))
    spans = [(starts[a], starts[b] - 1) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    text += "."
    tagged = conversation.tag_phrases(text, spans)
    assert tagged.count(PHRASE_START) == tagged.count(PHRASE_END) == len(spans)
    for form in (tagged + END, tagged.replace(f" {PHRASE_END} ", PHRASE_END)):
        answer = conversation.parse_answer(form)
        assert answer.text == text
        assert [(p.start, p.end, p.mask_index) for p in answer.phrases] == [(*s, i) for i, s in enumerate(spans)]
        assert answer.problems == ()
    by_ids = conversation.parse_answer_ids(by_character(tagged), spelled, SPEC)
    assert by_ids == conversation.parse_answer(tagged)
