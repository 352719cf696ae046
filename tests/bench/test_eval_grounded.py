"""Grounded captions and questions in `deixis eval`: judged by prepared answers, and asked of the tiny GLaMM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

import deixis
from deixis.errors import PromptError, TaskError
from deixis_bench.eval import cli
from deixis_bench.eval.bundle_predictor import BundlePredictor
from deixis_bench.eval.measure import answerable, make_tasks
from deixis_export.presets import random_parts
from deixis_train.checkpoint import save_checkpoint
from deixis_train.data.samples import Phrase, Row
from deixis_train.evaluation import grounded_task, masks
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.grounded_task import GroundedCaptions, Questions, kind_of_question, normalised
from deixis_train.evaluation.predictor import GroundedAnswer
from deixis_train.evaluation.similarity import word_overlap
from deixis_train.evaluation.tasks import Asked, Refer
from deixis_train.evaluation.torch_predictor import load_predictor
from make_tiny_bundle import SEED, TINY_BUNDLE, TINY_GLAMM

HEIGHT, WIDTH = 4, 12
CAPTION = "a red mug beside two balls"


def stripe(left: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, left:right] = True
    return mask


class Prepared:
    """A predictor that says what it was told to."""

    name = "bundle"
    abilities = frozenset({"grounded_caption", "ask", "refer"})

    def __init__(self, caption: GroundedAnswer | None = None, answers: dict[str, str] | None = None) -> None:
        self.caption, self.answers = caption, answers or {}

    def grounded_caption(self, picture: np.ndarray) -> GroundedAnswer:
        assert self.caption is not None
        return self.caption

    def answer(self, picture: np.ndarray, question: str) -> str:
        if question not in self.answers:
            raise PromptError("the model does not know it")
        return self.answers[question]

    def refer(self, picture: np.ndarray, texts: Sequence[str], masks: bool = True) -> Any:
        """Shows nothing."""
        return [None] * len(texts), [None] * len(texts) if masks else None


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(predicted: list[str], references: list[list[str]]) -> SimpleNamespace:
        return SimpleNamespace(meteor=0.25, cider=float(len(predicted)))

    monkeypatch.setattr(grounded_task, "caption_scores", scores)
    monkeypatch.setattr(grounded_task, "require_java", lambda: None)


def grounded_row() -> Row:
    """A mug, and two balls that one phrase names."""
    ball = CAPTION.index("two balls")
    phrases = (
        Phrase(0, 9, (masks.encode(stripe(0, 4)),)),
        Phrase(ball, ball + 9, (masks.encode(stripe(5, 7)), masks.encode(stripe(8, 10)))),
    )
    return Row(CAPTION, phrases=phrases)


def asked(*rows: Row, image: str = "0.png") -> Asked:
    return Asked(image, np.zeros((HEIGHT, WIDTH, 3), np.uint8), rows)


def test_grounded_captions_are_judged_with_masks_and_words(no_java: None) -> None:
    both = stripe(5, 7) | stripe(8, 10)
    said = GroundedAnswer(
        "a red mug beside two balls and a dog",
        (("a red mug", stripe(0, 4)), ("a dog", None), ("two balls", both)),
        (stripe(10, 12),),
    )
    task = GroundedCaptions(word_overlap, "words")
    [item] = task.ask(asked(grounded_row(), Row("not grounded")), Prepared(said))  # type: ignore[arg-type]
    assert item["truth"]["phrases"] == ["a red mug", "two balls"]
    # The mask of no phrase keeps its place, the phrase without a mask has none.
    assert item["predicted"]["phrases"] == ["a red mug", "two balls", "", "a dog"]
    assert len(item["predicted"]["masks"]) == 3
    assert item["scores"] == {"mIoU": 1.0, "found": 2, "phrases": 2}
    json.dumps(item)
    wrong = GroundedAnswer("a mug", (("a blue pot", stripe(0, 4)),), ())
    items = [item, *task.ask(asked(grounded_row(), image="1.png"), Prepared(wrong))]  # type: ignore[arg-type]
    assert items[1]["scores"] == {"mIoU": 1.0, "found": 0, "phrases": 2}
    values = task.metrics(items[::-1])
    assert values["grounded recall (words)"] == 0.5 and values["grounded mIoU"] == 1.0
    assert 0 < values["grounded AP50"] < 1
    assert (values["grounded CIDEr"], values["grounded METEOR"]) == (2, 0.25)
    assert task.ask(asked(Row("no masks", phrases=(Phrase(0, 2),))), Prepared(said)) == []  # type: ignore[arg-type]


def test_questions_are_judged_by_their_words() -> None:
    pairs = {"what color is the mug?": "red", "what is the red thing?": "a mug", "how many balls are there?": "two"}
    rows = [Row(answer, question=question) for question, answer in pairs.items()]
    said = {
        "what color is the mug?": "Red.",
        "what is the red thing?": "the  Mug",
        "how many balls are there?": "three",
    }
    task = Questions()
    items = task.ask(asked(*rows, Row("no question"), Row("yes", question="is there 漢?")), Prepared(answers=said))  # type: ignore[arg-type]
    assert [item["scores"]["right"] for item in items] == [True, True, False, False]
    assert items[3]["error"] == "the model does not know it"
    assert task.metrics(items) == {
        "answers right": 0.5,
        "answers right: colour": 1.0,
        "answers right: kind": 1.0,
        "answers right: count": 0.0,
        "answers right: existence": 0.0,
    }


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What colour is it?", "colour"),
        ("what kind of object is the red thing?", "kind"),
        ("where is the mug?", "place"),
        ("is there a blue pot?", "existence"),
        ("is the mug left of the pot?", "relation"),
        ("why?", "other"),
    ],
)
def test_kinds_of_questions(question: str, kind: str) -> None:
    assert kind_of_question(question) == kind
    assert normalised("The Red  mug, a big one.") == "red mug big one"


def test_expressions_that_get_no_mask_count_as_missed() -> None:
    row = Row("a mug", box=(0, 0, 4, 4), mask=masks.encode(stripe(0, 4)))
    task = Refer()
    items = task.ask(asked(row), Prepared())  # type: ignore[arg-type]
    assert items[0]["scores"]["IoU"] == 0 and items[0]["scores"]["mask IoU"] == 0
    assert task.metrics(items)["cIoU"] == 0


def test_tasks_that_a_model_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["trace", "questions"]
    tasks = make_tasks(names, names, "text", ("words", word_overlap))
    left = answerable(tasks, [Prepared()], ["all"])  # type: ignore[list-item]
    assert [task.name for task in left] == ["questions"]
    assert capsys.readouterr().err == "deixis eval: the bundle cannot do it; trace is left out\n"
    with pytest.raises(EvaluationError, match="trace: the bundle cannot do it"):
        answerable(tasks, [Prepared()], names)  # type: ignore[list-item]
    with pytest.raises(EvaluationError, match="none of the tasks"):
        answerable(tasks[:1], [Prepared()], ["all"])  # type: ignore[list-item]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = random_parts("glamm-tiny", SEED)
    folder = tmp_path_factory.mktemp("checkpoint") / "glamm-tiny"
    save_checkpoint(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def bundle_side() -> Iterator[BundlePredictor]:
    with deixis.load(TINY_GLAMM, device="cpu", threads=1) as model:
        yield BundlePredictor(model)


def test_a_checkpoint_answers_as_its_bundle(checkpoint: Path, bundle_side: BundlePredictor) -> None:
    ours, about = load_predictor(checkpoint, threads=1)
    assert about["name"] == "glamm-tiny" and ours.abilities >= {"grounded_caption", "ask", "region_caption", "refer"}
    picture = np.random.default_rng(3).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    said, wanted = ours.grounded_caption(picture), bundle_side.grounded_caption(picture)
    assert said.text == wanted.text and len(said.masks) == len(wanted.masks)
    assert [phrase for phrase, _ in said.phrases] == [phrase for phrase, _ in wanted.phrases]
    shown = [(a, b) for (_, a), (_, b) in zip(said.phrases, wanted.phrases, strict=True) if a is not None]
    shown += list(zip(said.masks, wanted.masks, strict=True))
    assert shown, "the random model shows something"
    for a, b in shown:
        assert b is not None and a.shape == b.shape == (120, 150) and (a != b).mean() < 0.01
    assert ours.caption(picture) == bundle_side.caption(picture)
    question = "what is in the image?"
    assert ours.answer(picture, question) == bundle_side.answer(picture, question)
    boxes = [(10.0, 20.0, 90.0, 110.0), (0.0, 0.0, 150.0, 60.0)]
    assert ours.region_captions(picture, boxes) == bundle_side.region_captions(picture, boxes)
    found, theirs = ours.refer(picture, ["image"]), bundle_side.refer(picture, ["image"])
    assert (found[0][0] is None) == (theirs[0][0] is None)
    assert found[0][0] is None or np.allclose(found[0][0], theirs[0][0], atol=2)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="cannot trace"):
        ours.trace(picture, "a mug")
    with pytest.raises(PromptError, match="control token"):
        ours.answer(picture, "what is [SEG]?")


def test_the_command_on_both_tasks(tmp_path: Path, no_java: None, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = tmp_path / "scenes"
    for name in ("images", "annotations"):
        (scenes / name).mkdir(parents=True)
    side = 64
    cv2.imwrite(str(scenes / "images" / "0.png"), np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))
    mask = np.zeros((side, side), bool)
    mask[:, :20] = True
    grounding = {"token_positives": [0, 5], "rle_masks": [masks.encode(mask)]}
    captions = [{"file_name": "0.png", "caption": "a mug here", "groundings": {"a mug": grounding}}]
    turns = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": "red"}]
    questions = [{"id": "0", "image": "0.png", "conversations": turns}]
    for name, content in (("grounded_captions", captions), ("questions", questions)):
        (scenes / "annotations" / f"{name}.json").write_text(json.dumps(content))
    report = tmp_path / "report.json"
    arguments = ["--data", str(scenes), "--threads", "1", "--device", "cpu", "--task", "grounded-captions", "questions"]
    assert cli.main([str(TINY_GLAMM), *arguments, "--json", str(report)]) == 0
    values = json.loads(report.read_text())
    assert values["data"] == {"folder": "scenes", "pictures": 1, "grounded-captions": 1, "questions": 1}
    assert set(values["metrics"]) == {
        "grounded AP50", "grounded mIoU", "grounded recall (words)", "grounded CIDEr", "grounded METEOR",
        "answers right", "answers right: colour",
    }  # fmt: skip
    capsys.readouterr()
    assert cli.main([str(TINY_BUNDLE), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("deixis eval: error: grounded-captions: the bundle cannot do it") and error.count("\n") == 1
    assert cli.main([str(TINY_GLAMM), *arguments, "--similarity", "bert"]) == 1
    assert "needs a folder with bert-base-uncased" in capsys.readouterr().err
