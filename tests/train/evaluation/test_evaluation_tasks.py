"""What tasks ask and how they judge, by a predictor with prepared answers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from deixis.errors import PromptError, TextTooLongError
from deixis_train.data.samples import Instance, Row, Utterance
from deixis_train.evaluation import dense_task, masks, tasks
from deixis_train.evaluation.dense_task import DenseCaptions
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.predictor import Box, Described, Image, Masks, PlacedWord
from deixis_train.evaluation.tasks import Asked, Boxes, Captions, Refer, Regions, Trace, truth_of_words

HEIGHT, WIDTH = 4, 10
PIXELS = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def mask_of(left: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, left:right] = True
    return mask


class Prepared:
    """A predictor that says what it was told to."""

    name = "bundle"
    abilities = frozenset({"refer", "trace", "caption", "region_caption", "dense_captions", "segment"})

    def __init__(self, **answers: dict) -> None:
        self.answers = answers
        self.asked: list[object] = []

    def refer(self, picture: Image, texts: Sequence[str], masks: bool = True) -> tuple[list[Box], Masks | None]:
        self.asked.append(list(texts))
        found = [self.answers["refer"][text] for text in texts]
        if "unknown" in found:
            raise PromptError("the model does not know it")
        return [box for box, _ in found], [mask for _, mask in found] if masks else None

    def trace(self, picture: Image, text: str) -> list[PlacedWord]:
        self.asked.append(text)
        words = text.split()
        if len(words) > self.answers["trace"]["most"]:
            raise TextTooLongError("too long")
        return [PlacedWord(word, self.answers["trace"]["box"]) for word in words]

    def caption(self, picture: Image) -> str:
        return self.answers["caption"]["text"]

    def region_captions(self, picture: Image, boxes: Sequence[Box]) -> list[str]:
        return [self.answers["regions"][box] for box in boxes]

    def dense_captions(self, picture: Image) -> list[Described]:
        return self.answers["dense"]["found"]

    def segment(self, picture: Image, boxes: Sequence[Box]) -> Masks:
        return [self.answers["segment"][box] for box in boxes]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stands for METEOR and CIDEr: notes what is judged."""
    judged: list = []

    def scores(predicted: list[str], references: list[list[str]]) -> SimpleNamespace:
        judged.extend(zip(predicted, references, strict=True))
        n = np.zeros(len(predicted))
        return SimpleNamespace(meteor=0.5, cider=1.25, meteors=n, ciders=n + 1)

    monkeypatch.setattr(tasks, "caption_scores", scores)
    return judged


def test_refer_judges_boxes_and_masks() -> None:
    rows = tuple(
        Row(text, box=(left, 0.0, right, 4.0), mask=masks.encode(mask_of(left, right)))
        for text, left, right in (("right", 0, 4), ("half", 6, 8), ("unknown", 0, 4))
    )
    predictor = Prepared(
        refer={
            "right": ((0.0, 0.0, 4.0, 4.0), mask_of(0, 4)),
            "half": ((6.0, 0.0, 10.0, 4.0), mask_of(7, 10)),
            "unknown": "unknown",
        }
    )
    task = Refer()
    items = task.ask(Asked("a.png", PIXELS, rows), predictor)
    assert predictor.asked == [["right", "half", "unknown"], ["right"], ["half"], ["unknown"]]
    assert [item["text"] for item in items] == ["right", "half", "unknown"]
    assert "does not know" in items[2]["error"] and items[2]["predicted"]["box"] is None
    metrics = task.metrics(items)
    assert metrics["P@0.5"] == pytest.approx(1 / 3) and metrics["mean box IoU"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["cIoU"] == pytest.approx((16 + 4) / (16 + 16 + 16), abs=1e-5)
    assert metrics["gIoU"] == pytest.approx((1 + 1 / 4) / 3, abs=1e-5)
    assert metrics["mask box P@0.5"] == pytest.approx(1 / 3)
    assert set(Refer(with_masks=False).metrics(items)) == {"P@0.5", "mean box IoU"}


def test_expressions_without_masks_count_for_boxes_only() -> None:
    row = Row("right", box=(0.0, 0.0, 4.0, 4.0))
    predictor = Prepared(refer={"right": ((0.0, 0.0, 4.0, 4.0), mask_of(0, 4))})
    items = Refer().ask(Asked("a.png", PIXELS, (row,)), predictor)
    with pytest.raises(EvaluationError, match="none of the expressions in the data has a mask"):
        Refer().metrics(items)
    assert Refer(with_boxes=False).ask(Asked("a.png", PIXELS, (row,)), predictor) == []


def utterance(text: str, box: Box) -> Utterance:
    return Utterance(text, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), box)


MUG, BALL = (0.1, 0.2, 0.3, 0.4), (0.5, 0.2, 0.9, 0.6)


def test_words_have_the_boxes_of_what_they_are_spelt_by() -> None:
    utterances = [utterance("a", MUG), utterance("mug", MUG), utterance(",", BALL), utterance("a ball", BALL)]
    words = ["A", "mug,", "a", "ball"]
    both = [0.1, 0.2, 0.9, 0.6]
    np.testing.assert_allclose(truth_of_words(words, utterances, "text"), [MUG, both, BALL, BALL])
    # Where the utterances do not spell the text, rank decides.
    other = ["one", "two", "three", "four"]
    np.testing.assert_allclose(truth_of_words(other, utterances, "text"), truth_of_words(other, utterances, "rank"))
    lost = [utterance("a", MUG), Utterance("mug", (0.0, 0.0), MUG)]  # no trace at all
    np.testing.assert_allclose(truth_of_words(["a", "mug"], lost, "text"), [MUG, [0, 0, 0, 0]])


def test_trace_compares_a_box_per_word_and_cuts_what_is_too_long() -> None:
    row = Row("a mug a ball", utterances=(utterance("a mug", MUG), utterance("a ball", BALL)))
    predictor = Prepared(trace={"most": 3, "box": (1.0, 0.8, 3.0, 1.6)})  # MUG, in px of the picture
    task = Trace("trace", "free-order ", "text")
    [item] = task.ask(Asked("a.png", PIXELS, (row,)), predictor)
    assert predictor.asked == ["a mug a ball", "a mug a"] and item["cut"]
    off = np.abs(np.array(MUG) - BALL).mean() / 3
    assert task.metrics([item])["free-order LBM k=0"] == pytest.approx(off)
    assert set(task.metrics([item])) == {f"free-order {n}" for n in ("LBM k=0", "LBM k=1", "LBM k=2", "point L1")}


def test_a_trace_that_nobody_could_make_is_an_error() -> None:
    row = Row("a mug", utterances=(utterance("a mug", MUG),))
    task = Trace()
    items = task.ask(Asked("a.png", PIXELS, (row,)), Prepared(trace={"most": 0, "box": None}))
    with pytest.raises(EvaluationError, match="none of 1 texts could be measured: too long"):
        task.metrics(items)


def test_captions_against_references_and_things(no_java: list) -> None:
    things = tuple(
        Instance(kind, (0.0, 0.0, 1.0, 1.0), attributes={"color": color})
        for color, kind in (("red", "mug"), ("blue", "ball"))
    )
    asked = Asked("a.png", PIXELS, (Row("a mug"), Row("a red mug")), things)
    task = Captions()
    items = task.ask(asked, Prepared(caption={"text": "a red mug, a red mug and a red ball"}))
    metrics = task.metrics(items)
    assert no_java == [("a red mug, a red mug and a red ball", ["a mug", "a red mug"])]
    # A second red mug is not there.
    assert metrics == {
        "caption CIDEr": 1.25,
        "caption METEOR": 0.5,
        "caption recall": 1 / 2,
        "caption precision": pytest.approx(1 / 3),
    }
    assert items[0]["scores"]["CIDEr"] == 1
    plain = task.ask(Asked("a.png", PIXELS, (Row("a mug"),)), Prepared(caption={"text": "a mug"}))
    assert set(task.metrics(plain)) == {"caption CIDEr", "caption METEOR"}


def test_regions_join_descriptions_and_know_their_things(no_java: list) -> None:
    first, second = (0.0, 0.0, 4.0, 4.0), (6.0, 0.0, 8.0, 4.0)
    things = (
        Instance("mug", first, attributes={"color": "red"}),
        Instance("ball", (6.0, 0.0, 8.0, 3.9), attributes={"color": "blue"}),
    )
    rows = (Row("a mug", box=first), Row("a ball", box=second), Row("a red mug", box=first))
    task = Regions()
    predictor = Prepared(regions={first: "a large red mug", second: "a red ball"})
    items = task.ask(Asked("a.png", PIXELS, rows, things), predictor)
    metrics = task.metrics(items)
    assert no_java == [("a large red mug", ["a mug", "a red mug"]), ("a red ball", ["a ball"])]
    assert metrics["region right"] == 1 / 2


def test_boxes_are_judged_by_masks() -> None:
    box = (0.0, 0.0, 4.0, 4.0)
    known = Instance("mug", box, masks.encode(mask_of(0, 4)))
    predictor = Prepared(segment={box: mask_of(0, 2)})
    items = Boxes().ask(Asked("a.png", PIXELS, (), (known, Instance("ball", box))), predictor)
    assert Boxes().metrics(items) == {"box-to-mask IoU": 0.5, "box-to-mask median IoU": 0.5}


def test_dense_captions_of_several_pictures_are_one_set(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list = []

    def meteor(captions: list[str], references: list[list[str]]) -> list[float]:
        judged.append(list(zip(captions, references, strict=True)))
        return [1.0] * len(captions)

    monkeypatch.setattr(dense_task, "meteor_scores", meteor)
    left, right = (0.0, 0.0, 4.0, 4.0), (5.0, 0.0, 10.0, 4.0)
    found = [Described(left, "a mug", 0.9), Described((0.0, 0.0, 9.0, 1.0), "a table", 0.5)]
    task = DenseCaptions()
    items = [
        *task.ask(
            Asked("a.png", PIXELS, (Row("mug", box=left), Row("cup", box=right))), Prepared(dense={"found": found})
        ),
        *task.ask(Asked("b.png", PIXELS, (Row("cup", box=left),)), Prepared(dense={"found": []})),
        *task.ask(Asked("c.png", PIXELS, ()), Prepared(dense={"found": found})),
    ]
    assert [item["image"] for item in items] == ["a.png", "b.png"], "nobody has described the third"
    assert [item["scores"] for item in items] == [
        {"regions": 2, "detections": 2, "found": 1}, {"regions": 1, "detections": 0, "found": 0}
    ]  # fmt: skip
    metrics = task.metrics(items)
    assert judged == [[("a mug", ["mug"])]], "the table is near nothing, so nobody asks what it is called"
    for name in ("mAP", "mAP_detection"):
        assert metrics[name] == pytest.approx(34 / 100)  # recalls 0 to 0.33, rightly
    assert metrics["detection recall"] == pytest.approx(1 / 3) and metrics["detection precision"] == 0.5
    assert metrics["detections per picture"] == 1
