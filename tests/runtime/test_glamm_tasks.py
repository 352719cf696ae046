"""GLaMM's tasks on a fake model that says what it is told: phrases and masks, streams, batches, errors."""

from __future__ import annotations

import threading
from pathlib import Path

import glamm_fakes as fakes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deixis
from deixis.conversation import tag_phrases
from deixis.glamm.phrases import find_spans
from deixis.glamm.pipeline import GlammPipeline
from deixis.masks import segment_mask
from deixis.model import Model
from deixis.prompts import Question
from deixis.results import GroundedPhrase, GroundedText, Word
from deixis.scene import Scene

GOOD = "<p> a red mug </p> [SEG] on <p> the table </p> [SEG]."


def scene_that_says(folder: Path, answer: str | list[int], **more: object) -> tuple[Scene, fakes.GlammEngine]:
    """A scene whose grounded caption is `answer`."""
    model, engine = fakes.make_model(folder, {"Describe the table": answer}, **more)  # type: ignore[arg-type]
    return model.encode(fakes.pictures(1)[0]), engine


def check_whole(text: GroundedText) -> None:
    """What holds of every answer: phrases are slices of the text, in order, apart; masks and boxes fit."""
    end = 0
    for phrase in text.phrases:
        assert text.text[phrase.start : phrase.end] == phrase.text != "" and phrase.start >= end
        end = phrase.end
        if phrase.mask is None:
            assert phrase.box is None and phrase.score is None
        else:
            assert phrase.box == phrase.mask.box and phrase.score is not None


def expected_masks(scene: Scene, answer: list[int]) -> list[deixis.Mask]:
    """The masks of an answer's [SEG]s, from one pass over prompt and answer without any cached step."""
    pipeline, features = scene.model.pipeline, scene.features
    assert isinstance(pipeline, GlammPipeline)
    session = pipeline.session([features], 1)  # type: ignore[list-item]
    prompt = prompt_ids("Describe the table")
    session.feed(np.array([[*prompt, *answer]]))
    first = len(prompt) + fakes.TOKENS - 1
    states = [session.states[0, first + i - 1] for i, piece in enumerate(answer) if piece == fakes.SEG]
    logits, _ = pipeline.masks(np.array(states).reshape(len(states), -1), [features] * len(states))  # type: ignore[list-item]
    return [deixis.Mask.from_array(segment_mask(one, scene.geometry)) for one in logits]


def prompt_ids(question: str) -> list[int]:
    before, after = f"You see. USER: Look: <im_start>|<im_end> .\n{question} ASSISTANT:".split("|")
    return [1, *fakes.ids_of(before), -200, *fakes.ids_of(after)]


def test_phrases_and_masks_belong_together(tmp_path: Path) -> None:
    scene, engine = scene_that_says(tmp_path, GOOD)
    found = scene.grounded_caption()
    assert found.text == "a red mug on the table." and found.problems == () and found.masks == ()
    assert [p.text for p in found.phrases] == ["a red mug", "the table"]
    assert found.ids == tuple(fakes.ids_of(GOOD)) and found.finished
    check_whole(found)
    assert engine.runs["pixel_decoder"] == 1  # both at once
    assert [p.mask for p in found.phrases] == expected_masks(scene, list(found.ids))


@pytest.mark.parametrize(
    ("answer", "text", "phrases", "loose", "problem"),
    [
        ("Sure, it is [SEG]", "Sure, it is", [], 1, None),
        ("", "", [], 0, None),
        ("[SEG]", "", [], 1, None),
        ("<p> a mug </p> on the table", "a mug on the table", [("a mug", False)], 0, "no [SEG]"),
        ("<p> a mug </p> [SEG] [SEG] here", "a mug here", [("a mug", True)], 1, "belongs to no phrase"),
        ("<p> a mug on the table", "a mug on the table", [], 0, "not closed"),
        ("<p> a mug [SEG] here", "a mug here", [("a mug", True)], 0, "not closed before"),
        ("a mug </p> [SEG]", "a mug", [], 1, "without"),
        ("<p> two <p> ducks </p> [SEG]", "two ducks", [("ducks", True)], 0, "inside another"),
        ("<p> </p> [SEG] here", "here", [], 1, "empty phrase"),
        ("<p> a mug </p> <p> ducks </p> [SEG]", "a mug ducks", [("a mug", False), ("ducks", True)], 0, "no [SEG]"),
    ],
)
def test_malformed_answers_lose_nothing(
    tmp_path: Path, answer: str, text: str, phrases: list[tuple[str, bool]], loose: int, problem: str | None
) -> None:
    scene, _ = scene_that_says(tmp_path, answer)
    found = scene.grounded_caption()
    check_whole(found)
    assert found.text == text and len(found.masks) == loose
    assert [(p.text, p.mask is not None) for p in found.phrases] == phrases
    assert any(problem in told for told in found.problems) if problem else found.problems == ()


MARKS_AND_WORDS = st.lists(
    st.sampled_from([fakes.OPEN, fakes.CLOSE, fakes.SEG, fakes.BBOX, *range(3, 17), *range(30, 60)]), max_size=24
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=MARKS_AND_WORDS)
def test_whatever_is_said_the_stream_is_the_plain_answer(tmp_path: Path, ids: list[int]) -> None:
    scene, _ = scene_that_says(tmp_path, [*ids, fakes.END])
    plain = scene.grounded_caption()
    check_whole(plain)
    assert plain.ids == tuple(ids)
    assert len(plain.masks) + sum(p.mask is not None for p in plain.phrases) == ids.count(fakes.SEG)
    stream = scene.stream_grounded_caption()
    pieces = list(stream)
    assert stream.result == plain
    assert [p for p in pieces if isinstance(p, GroundedPhrase)] == list(plain.phrases)
    words = [p for p in pieces if isinstance(p, Word)]
    assert all(plain.text[w.start : w.end] == w.text for w in words)
    assert "".join(w.text for w in words) == "".join(plain.text.split())


def test_a_phrase_comes_as_soon_as_its_mask_is_there(tmp_path: Path) -> None:
    scene, engine = scene_that_says(tmp_path, GOOD)
    stream = scene.stream_grounded_caption()
    assert engine.runs.get("decoder_step") is None  # nothing runs before it is asked for
    pieces = [next(stream) for _ in range(4)]
    assert [p.text for p in pieces] == ["a", "red", "mug", "a red mug"] and isinstance(pieces[3], GroundedPhrase)
    # the prompt, <p> a red mug </p>; the step that consumes [SEG] has not run
    assert engine.runs["decoder_step"] == 6 and engine.runs["pixel_decoder"] == 1
    stream.close()
    with pytest.raises(ValueError, match="closed before its end"):
        _ = stream.result


def test_an_answer_that_is_cut(tmp_path: Path) -> None:
    scene, _ = scene_that_says(tmp_path, GOOD)
    cut = scene.grounded_caption(deixis.DecodeOptions(max_new_tokens=6))
    assert len(cut.ids) == 6 and not cut.finished and cut.ids[-1] == fakes.SEG
    assert cut.phrases[0].mask == scene.grounded_caption().phrases[0].mask  # [SEG] as the very last token
    stream = scene.stream_grounded_caption(deixis.DecodeOptions(max_new_tokens=6))
    assert stream.result == cut


@pytest.fixture
def model(tmp_path: Path) -> Model:
    says = {"Describe the table": GOOD, "Segment two ducks": "Sure , it is [SEG] [SEG]", "Segment the table": "ducks"}
    return fakes.make_model(tmp_path, says)[0]


def test_batches_equal_one_at_a_time(model: Model) -> None:
    scenes = model.encode(fakes.pictures(4))
    assert model.grounded_caption_batch(scenes) == [s.grounded_caption() for s in scenes]
    asked = [(scenes[i % 4], Question(text)) for i, text in enumerate(["What is it", "it", "two ducks", "here", "it"])]
    asked += [(scenes[1], Question("What <bbox>", [(3, 4, 20, 21)])), (scenes[2], Question("What", [(0, 0, 9, 9)]))]
    assert model.ask_batch(asked) == [scene.ask(q.text, q.boxes) for scene, q in asked]
    assert len({answer.ids for answer in model.ask_batch(asked)}) == len(asked)  # they do look at what they are asked
    named = [(scenes[0], "two ducks"), (scenes[1], "the table"), (scenes[2], "a red mug"), (scenes[3], "two ducks")]
    assert model.refer_batch(named) == [scene.refer(text) for scene, text in named]
    boxes = [(1.0, 2.0, 30.0, 31.0), None, (5.0, 6.0, 20.0, 40.0), (1.0, 2.0, 30.0, 31.5)]
    prompts = [(scenes[0], deixis.Prompt(box=box)) for box in boxes]
    captions = model.caption_batch(prompts)
    assert captions == [scenes[0].caption(box=box) for box in boxes]
    assert [c.box for c in captions] == boxes and len({c.ids for c in captions}) == 4


def test_captions_have_words_without_places(model: Model) -> None:
    scene = model.encode(fakes.pictures(1)[0])
    caption = scene.caption()
    assert [w.text for w in caption.words] and all(w.points is None and w.score is not None for w in caption.words)
    assert all(caption.text[w.start : w.end] == w.text for w in caption.words)
    stream = scene.stream_caption()
    assert tuple(stream) == caption.words and stream.caption == caption
    region = scene.stream_caption(box=(1, 2, 30, 31))
    assert region.caption == scene.caption(box=(1, 2, 30, 31)) != caption


def test_a_score_of_a_word_is_that_of_its_pieces(tmp_path: Path) -> None:
    scene, _ = scene_that_says(tmp_path, "a mugs here")
    words = [piece for piece in scene.stream_grounded_caption() if isinstance(piece, Word)]
    assert [w.text for w in words] == ["a", "mugs", "here"]
    assert all(w.score is not None and -1e-3 < w.score <= 0 for w in words)


def test_refer(model: Model) -> None:
    scene = model.encode(fakes.pictures(1)[0])
    found = scene.refer("two ducks")
    assert found.text == "two ducks" and found.mask is not None and found.box == found.mask.box
    bare = scene.refer("two ducks", mask=False)
    assert bare.box == found.box and bare.mask is None and bare.score is None
    nothing = scene.refer("the table")  # the answer shows nothing
    assert nothing.box is None and nothing.mask is None and nothing.to_dict()["box"] is None


def test_boxes_are_what_is_spliced_in(model: Model) -> None:
    scene = model.encode(fakes.pictures(1)[0])
    box, other = (1.0, 2.0, 30.0, 31.0), (5.0, 6.0, 20.0, 40.0)
    assert scene.ask("What is <bbox>", [box]) == scene.ask("What is", [box]) == scene.ask("What is", box)
    assert scene.ask("What is <bbox>", [box]) != scene.ask("What is <bbox>", [other])
    assert scene.ask("<bbox> on <bbox>", [box, other]) != scene.ask("<bbox> on <bbox>", [other, box])
    width = scene.size[1]
    over = scene.ask("What is", [(-5, 2, width + 7, 31)])
    assert over == scene.ask("What is", [(0, 2, width, 31)])


@pytest.mark.parametrize(
    ("text", "boxes", "message"),
    [
        ("", None, "the question is empty"),
        ("  \n", None, "the question is empty"),
        (7, None, "must be a string"),
        ("What [SEG]", None, "holds [SEG], which is a control token"),
        ("<p> a", None, "holds <p>"),
        ("a <image>", None, "holds <image>"),
        ("What </s>", None, "control token"),
        ("What is <bbox>", None, "names 1 <bbox> but has no boxes"),
        ("<bbox> <bbox>", [(1, 2, 9, 9)], "names 2 <bbox> but has 1 box"),
        ("<bbox>", [(1, 2, 9, 9), (1, 2, 8, 8)], "names 1 <bbox> but has 2 boxes"),
        ("What", [(500, 500, 600, 600)], "lies outside the picture"),
        ("What", [(9, 9, 2, 2)], "has no area"),
        ("What", [(1, 2, float("nan"), 4)], "a box must be four numbers"),
        ("What", [(1, 2, 3)], "boxes must be a list"),
        ("What", "box", "boxes must be a list"),
        ("What", [(1, 2, 9, 9)] * 37, "at most 36"),
        ("What " + "it " * 60, None, "the question has"),
    ],
)
def test_questions_that_make_no_sense(model: Model, text: str, boxes: object, message: str) -> None:
    scene = model.encode(fakes.pictures(1)[0])
    with pytest.raises(deixis.PromptError) as refused:
        scene.ask(text, boxes)  # type: ignore[arg-type]
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_other_errors(tmp_path: Path, model: Model) -> None:
    scene = model.encode(fakes.pictures(1)[0])
    with pytest.raises(deixis.PromptError, match="not points"):
        scene.caption(points=[(3, 4)])
    with pytest.raises(deixis.PromptError, match="greedily"):
        scene.stream_grounded_caption(deixis.DecodeOptions(beams=2))
    with pytest.raises(deixis.PromptError, match="control token"):
        scene.refer("a [SEG]")
    with pytest.raises(deixis.TaskError, match="trace"):
        scene.trace("a mug")
    with pytest.raises(deixis.DeadlineError):
        scene.grounded_caption(deixis.DecodeOptions(deadline_ms=0))
    cancel = threading.Event()
    stream = scene.stream_grounded_caption(deixis.DecodeOptions(cancel=cancel))
    next(stream)
    cancel.set()
    with pytest.raises(deixis.CancelledError):
        list(stream)
    small, _ = fakes.make_model(tmp_path, capacity=20)
    with pytest.raises(deixis.TextTooLongError, match="cache_capacity"):
        small.encode(fakes.pictures(1)[0]).ask("What is it")
    blind, _ = fakes.make_model(tmp_path, graphs=fakes.without("region_encoder", "pixel_decoder"))
    scene = blind.encode(fakes.pictures(1)[0])
    with pytest.raises(deixis.TaskError, match="region_encoder"):
        scene.ask("What", [(1, 2, 9, 9)])
    with pytest.raises(deixis.TaskError, match="pixel_decoder"):
        scene.grounded_caption()


def test_an_answer_ends_where_the_cache_does(tmp_path: Path) -> None:
    whole, _ = scene_that_says(tmp_path, GOOD)
    room = len(prompt_ids("Describe the table")) + fakes.TOKENS - 1 + 4
    scene, _ = scene_that_says(tmp_path, GOOD, capacity=room)
    cut = scene.grounded_caption()
    assert not cut.finished and cut.ids == whole.grounded_caption().ids[:5]  # the last one need not be consumed


TEXT = "a red mug on the table, two ducks sit here."


def marking(folder: Path, answer: str) -> tuple[Scene, fakes.GlammEngine]:
    model, engine = fakes.make_model(folder, {"Describe the ducks": answer})
    return model.encode(fakes.pictures(1)[0]), engine


def test_given_phrases(tmp_path: Path) -> None:
    scene, engine = marking(tmp_path, "")
    found = scene.ground_phrases(TEXT, ["the table", "a red mug"])
    assert found.text == TEXT and [p.text for p in found.phrases] == ["a red mug", "the table"]
    assert engine.runs["decoder_step"] == 2  # one pass, in parts as wide as the bundle allows
    assert found == scene.ground_phrases(TEXT, [(12, 22), (0, 10)])  # white space at the ends does not count
    check_whole(found)
    # the same states as if the model had said it
    told, _ = fakes.make_model(tmp_path, {"Describe the ducks": tag_phrases(TEXT, [(0, 9), (13, 22)])}, tasks=_ask_as())
    assert told.encode(fakes.pictures(1)[0]).grounded_caption().phrases == found.phrases


def _ask_as() -> dict[str, object]:
    return {**fakes.TASKS, "grounded_caption": fakes.TASKS["ground_phrases"]}


@pytest.mark.parametrize(
    "spans", [[], [(0, 9)], [(0, 9), (13, 22)], [(2, 5), (6, 9), (24, 33)], [(0, len(TEXT))], [(13, 22), (24, 42)]]
)
def test_the_model_marks_what_it_would_have_marked(tmp_path: Path, spans: list[tuple[int, int]]) -> None:
    """Asked to mark the very text that it would say, it marks the phrases that it would say."""
    scene, engine = marking(tmp_path, tag_phrases(TEXT, spans))
    found = scene.ground_phrases(TEXT)
    assert [(p.start, p.end) for p in found.phrases] == spans and found.text == TEXT
    words = len(TEXT.replace(",", " ,").replace(".", " .").split())
    if spans:
        assert found == scene.ground_phrases(TEXT, spans)
    assert all(p.mask is not None for p in found.phrases)
    # the prompt, a run per word (2 letters of a word are no more), and a run per mark that is tried
    assert engine.runs["decoder_step"] <= 1 + words + 3 * len(spans) + 4


class Undecided(fakes.GlammEngine):
    """Before "ducks" a phrase is likelier than the word, but with another word in it; inside, closing is likeliest
    before "here", and behind the mask comes a new phrase.
    """

    def _logits(self, seen: np.ndarray) -> np.ndarray:
        last = int(seen[-1])
        word = {w: 3 + fakes.WORDS.index(w) for w in ("two", "ducks", "sit", "here")}
        chances = {
            word["two"]: {fakes.OPEN: 0.6, word["ducks"]: 0.3},
            fakes.OPEN: {word["ducks"]: 0.1, word["sit"]: 0.5, word["here"]: 0.4},
            word["ducks"]: {fakes.OPEN: 0.7, word["sit"]: 0.3},
            word["sit"]: {fakes.CLOSE: 0.6, word["here"]: 0.2},
            fakes.SEG: {fakes.OPEN: 0.9, word["here"]: 0.1},
        }.get(last, {})
        logits = np.full(fakes.VOCABULARY, -30.0)
        logits[word["two"]] = np.log(max(1 - sum(chances.values()), 1e-9))
        for piece, chance in chances.items():
            logits[piece] = np.log(chance)
        return logits


def test_a_mark_is_made_where_it_is_likeliest_with_the_word_behind_it(tmp_path: Path) -> None:
    """0.6 * 0.1 < 0.3: no phrase begins with ducks. 0.7 * 0.5 > 0.3: one begins with sit. 0.6 * 0.9 * 0.4 > 0.2: it is
    closed before here, where another one begins.
    """
    fakes.TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    engine = Undecided()
    model = Model(GlammPipeline(fakes.Bundle(tmp_path, fakes.make_manifest()), engine))
    found = model.encode(fakes.pictures(1)[0]).ground_phrases("two ducks sit here")
    assert [p.text for p in found.phrases] == ["sit", "here"]
    check_whole(found)
    # the prompt; two; <p> in vain, ducks; <p>, sit; </p> [SEG], <p>, here; </p> [SEG]
    assert engine.widths == [37, 1, 1, 1, 1, 1, 2, 1, 1, 2]


def test_text_with_signs_and_spaces(tmp_path: Path) -> None:
    text = '  a "red" mug;  it\'s a well-made mug\n'
    scene, _ = marking(tmp_path, "")
    found = scene.ground_phrases(text)
    assert found.text == text
    check_whole(found)
    assert find_spans("ducks duck", ["duck"]) == [(6, 10)]
    assert find_spans("a mug and a mug", ["a mug", "a mug"]) == [(0, 5), (10, 15)]


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ("a red mug", "must be a list"),
        ([], "no phrases are given"),
        (["cat"], "'cat' does not stand in the text"),
        (["duck"], "as whole words"),
        ([" "], "a phrase is empty"),
        (["a red", "red mug"], "where another phrase does"),
        ([(0, 5), (2, 9)], "overlap at 'red'"),
        (["here", "here"], "where another phrase does"),
        ([(3, 99)], "lies outside the text"),
        ([(5, 5)], "is empty"),
        ([(1, 2)], "only white space"),
        ([3], "substring or (start, end)"),
    ],
)
def test_phrases_that_make_no_sense(tmp_path: Path, phrases: object, message: str) -> None:
    scene, engine = marking(tmp_path, "")
    with pytest.raises(deixis.PromptError) as refused:
        scene.ground_phrases(TEXT, phrases)  # type: ignore[arg-type]
    assert message in str(refused.value) and "decoder_step" not in engine.runs


def test_a_text_that_is_too_long_or_no_text(tmp_path: Path) -> None:
    scene, engine = marking(tmp_path, "")
    for phrases in (None, ["two"]):
        with pytest.raises(deixis.TextTooLongError):
            scene.ground_phrases("two " + "ducks " * 500, phrases)
    with pytest.raises(deixis.PromptError, match="control token"):
        scene.ground_phrases("a <p> mug")
    with pytest.raises(deixis.PromptError, match="empty"):
        scene.ground_phrases(" ")
    assert "decoder_step" not in engine.runs
