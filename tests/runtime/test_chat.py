"""Chats: what is said stays said, a turn that fails leaves no trace, one turn at a time."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import glamm_fakes as fakes
import numpy as np
import pytest
from test_glamm_tasks import prompt_ids

import deixis
from deixis.glamm.conversations import Chat
from deixis.glamm.pipeline import GlammPipeline
from deixis.masks import segment_mask
from deixis.scene import Scene

SAYS = {
    "two ducks": "<p> two ducks </p> [SEG] sit here.",
    "Segment": "Sure, it is [SEG]",
    "table": "<p> a mug </p> [SEG] on [SEG]",
}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return fakes.make_model(tmp_path, SAYS)[0].encode(fakes.pictures(1)[0])


def engine_of(scene: Scene) -> fakes.GlammEngine:
    engine = scene.model.pipeline.engine
    assert isinstance(engine, fakes.GlammEngine)
    return engine


def uncached(scene: Scene, turns: list[tuple[str, str | None]]) -> list[int]:
    """Ids of the last answer, every id by a run over the whole conversation from the start."""
    pipeline = scene.model.pipeline
    assert isinstance(pipeline, GlammPipeline)
    ids = prompt_ids(turns[0][0])
    for i, (question, answer) in enumerate(turns):
        if i:
            ids += fakes.ids_of(f"USER: {question} ASSISTANT:")
        if answer is not None:
            ids += [*fakes.ids_of(answer), fakes.END]
    said: list[int] = []
    while len(said) < 40:
        session = pipeline.session([scene.features], 1)  # type: ignore[list-item]
        top, _ = session.feed(np.array([ids + said]))
        said.append(int(top.ids[0, 0]))
        if said[-1] == fakes.END:
            return said[:-1]
    return said


def test_a_chat_is_an_uncached_run_over_the_same_ids(scene: Scene) -> None:
    with scene.chat() as chat:
        first = chat.ask("two ducks")
        second = chat.ask("What is it here")
        assert first.text == "two ducks sit here."
        assert list(first.ids) == uncached(scene, [("two ducks", None)])
        assert list(second.ids) == uncached(scene, [("two ducks", SAYS["two ducks"]), ("What is it here", None)])
        assert second.finished and second != scene.ask("What is it here")
        assert [turn.question for turn in chat.turns] == ["two ducks", "What is it here"]
        assert [turn.answer for turn in chat.turns] == [first, second]


def test_a_turn_costs_its_own_ids(scene: Scene) -> None:
    engine = engine_of(scene)
    with scene.chat() as chat:
        for question in ("two ducks", "Segment a mug"):
            engine.widths.clear()
            answer = chat.ask(question)
            follow_up = [fakes.END, *fakes.ids_of(f"USER: {question} ASSISTANT:")]
            new = len(follow_up) if len(chat.turns) > 1 else len(prompt_ids(question)) + fakes.TOKENS - 1
            assert engine.widths == [new] + [1] * len(answer.ids)
    assert engine.runs["global_encoder"] == 1 and engine.runs["grounding_encoder"] == 1


def test_masks_are_those_of_the_new_answer(scene: Scene) -> None:
    chat = scene.chat()
    chat.ask("two ducks")
    found = chat.ask("Segment two ducks here")
    assert len(found.masks) == 1 and found.phrases == ()
    # the state that predicts the last [SEG], in one pass over everything
    pipeline = scene.model.pipeline
    assert isinstance(pipeline, GlammPipeline)
    session = pipeline.session([scene.features], 1)  # type: ignore[list-item]
    said = [*prompt_ids("two ducks"), *fakes.ids_of(SAYS["two ducks"]), fakes.END]
    said += [*fakes.ids_of("USER: Segment two ducks here ASSISTANT:"), *found.ids]
    session.feed(np.array([said]))
    logits, _ = pipeline.masks(session.states[:, -2], [scene.features])  # type: ignore[list-item]
    assert found.masks[0] == deixis.Mask.from_array(segment_mask(logits[0], scene.geometry))


def test_a_stream_is_a_turn(scene: Scene) -> None:
    plain, streamed = scene.chat(), scene.chat()
    for question in ("two ducks", "What", "Segment it"):
        stream = streamed.stream(question)
        assert streamed.turns == plain.turns  # nothing has been said yet
        list(stream)
        assert stream.result == plain.ask(question)
    assert streamed.turns == plain.turns and len(plain.turns) == 3


def test_boxes_in_any_turn(scene: Scene) -> None:
    box = (1.0, 2.0, 30.0, 31.0)
    chat, other = scene.chat(), scene.chat()
    assert chat.ask("What is <bbox>", [box]) == scene.ask("What is <bbox>", [box])
    other.ask("What is <bbox>", [box])
    assert chat.ask("it <bbox>", [box]) != other.ask("it <bbox>", [(3, 4, 40, 39)])
    assert chat.turns[1].to_dict()["boxes"] == [list(box)]


def test_a_cut_answer_counts_and_gets_its_end(scene: Scene) -> None:
    chat = scene.chat()
    cut = chat.ask("two ducks", options=deixis.DecodeOptions(max_new_tokens=4))
    assert not cut.finished and len(cut.ids) == 4
    said = "<p> two ducks </p>"
    assert list(chat.ask("What").ids) == uncached(scene, [("two ducks", said), ("What", None)])


def test_an_answer_cut_at_a_region_mark_wants_no_box(tmp_path: Path) -> None:
    model, _ = fakes.make_model(tmp_path, {"two": [5, fakes.BBOX, fakes.END]})
    with model.encode(fakes.pictures(1)[0]).chat() as chat:
        chat.ask("two", options=deixis.DecodeOptions(max_new_tokens=2))
        assert chat.ask("What").finished is not None


FAILURES = ["error", "deadline", "cancelled", "stream closed", "stream lost", "masks", "too long"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("said", [0, 1, 2])
def test_a_turn_that_fails_leaves_no_trace(tmp_path: Path, failure: str, said: int) -> None:
    model, engine = fakes.make_model(tmp_path, SAYS)
    scene = model.encode(fakes.pictures(1)[0])
    chat, untroubled = scene.chat(), scene.chat()
    for question in ["two ducks", "What"][:said]:
        assert chat.ask(question) == untroubled.ask(question)
    before = chat.turns
    _fail(chat, engine, failure)
    assert chat.turns == before
    for question in ("Segment it", "What is it"):
        assert chat.ask(question) == untroubled.ask(question)


def _fail(chat: Chat, engine: fakes.GlammEngine, failure: str) -> None:
    cancel = threading.Event()
    if failure == "error":
        engine.fail_at = engine.runs.get("decoder_step", 0) + 4
        with pytest.raises(RuntimeError, match="broke"):
            chat.ask("table")
        engine.fail_at = None
    elif failure == "deadline":
        with pytest.raises(deixis.DeadlineError):
            chat.ask("table", options=deixis.DecodeOptions(deadline_ms=0))
    elif failure == "cancelled":
        stream = chat.stream("table", options=deixis.DecodeOptions(cancel=cancel))
        next(stream)
        cancel.set()
        with pytest.raises(deixis.CancelledError):
            list(stream)
    elif failure == "stream closed":
        with chat.stream("table") as stream:
            next(stream)
    elif failure == "stream lost":
        stream = chat.stream("table")
        next(stream)
        del stream
        gc.collect()
    elif failure == "masks":
        engine.pixel_decoder = _break  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="no masks"):
            chat.ask("table")
        del engine.pixel_decoder
    else:
        with pytest.raises(deixis.TextTooLongError, match="the question has"):
            chat.ask("two " * 70)


def _break(**_: object) -> None:
    raise RuntimeError("no masks")


def test_a_conversation_that_outgrows_the_cache(tmp_path: Path) -> None:
    model, _ = fakes.make_model(tmp_path, SAYS, capacity=100)
    chat = model.encode(fakes.pictures(1)[0]).chat()
    with pytest.raises(deixis.TextTooLongError) as refused:
        for _ in range(20):
            chat.ask("two ducks")
    assert "cache_capacity" in str(refused.value) and "\n" not in str(refused.value)
    said = chat.turns
    assert 1 < len(said) < 20
    with pytest.raises(deixis.TextTooLongError):
        chat.ask("two ducks")
    assert chat.turns == said


def test_one_turn_at_a_time(scene: Scene) -> None:
    chat = scene.chat()
    first, second = chat.stream("two ducks"), chat.stream("What")
    next(first)
    for attempt in (lambda: next(second), lambda: chat.ask("What")):
        with pytest.raises(deixis.PromptError, match="not finished"):
            attempt()
    list(first)
    assert chat.ask("What").finished and len(chat.turns) == 2


def test_chats_do_not_know_each_other(scene: Scene) -> None:
    chats = [scene.chat() for _ in range(3)]
    wanted = [scene.chat() for _ in range(3)]
    questions = ["two ducks", "What", "Segment it"]
    threads = [
        threading.Thread(target=lambda c=c, i=i: [c.ask(q) for q in questions[i:] + questions[:i]])
        for i, c in enumerate(chats)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, chat in enumerate(wanted):
        for question in questions[i:] + questions[:i]:
            chat.ask(question)
        assert chats[i].turns == chat.turns


def test_closed(scene: Scene) -> None:
    chat = scene.chat()
    chat.ask("two ducks")
    chat.close()
    chat.close()
    assert len(chat.turns) == 1
    with pytest.raises(deixis.ClosedError, match="chat was closed"):
        chat.ask("What")
    other = scene.chat()
    stream = other.stream("What")
    scene.model.close()
    with pytest.raises(deixis.ClosedError):
        next(stream)
    with pytest.raises(deixis.ClosedError):
        scene.chat()
    with pytest.raises(deixis.ClosedError):
        other.ask("What")


def test_questions_are_checked_at_once(scene: Scene) -> None:
    chat = scene.chat()
    with pytest.raises(deixis.PromptError, match="empty"):
        chat.stream(" ")
    with pytest.raises(deixis.PromptError, match="has no boxes"):
        chat.stream("What is <bbox>")
    with pytest.raises(deixis.PromptError, match="greedily"):
        chat.stream("What", options=deixis.DecodeOptions(beams=3))
