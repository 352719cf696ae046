"""Samples become examples: what is asked, written and pointed at, and where everything lies afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deixis_train.data.batches import Example, collate
from deixis_train.data.formats.errors import DataError
from deixis_train.data.formats.masks import run_lengths
from deixis_train.data.preparation.instructions import LONG_CAPTION, REFERRING, REGION, SHORT_CAPTION
from deixis_train.data.preparation.prepare import Preparation
from deixis_train.data.preparation.store import SampleStore
from deixis_train.data.samples import Instance, Row, Sample, Utterance

WIDTH, HEIGHT, SIZE = 80, 60, 48  # fits as 48 x 36: scale 0.6
WORDS: list[str] = ["a", "red", "mug", "and", "plate", "where", "is", "an", "object", "of", "photo"]
PREPARATION = Preparation(SIZE, text_length=8, context_length=6)
MUG, PLATE = (10.0, 20.0, 30.0, 40.0), (50.0, 10.0, 70.0, 30.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Whole words with ids from 2 on, in order of WORDS; everything else is id 2 + len(WORDS)."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), *[("▁" + word, -1.0) for word in WORDS], ("<unk>", -9.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=len(pieces) - 1, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def ids(text: str) -> list[int]:
    return [2 + WORDS.index(word) for word in text.split()]


def sample(*rows: Row, instances: tuple[Instance, ...] = ()) -> Sample:
    return Sample(Path("a.jpg"), WIDTH, HEIGHT, rows, instances, where="data.json:1")


def prepared(
    tokenizer: Tokenizer, what: Sample, training: bool = False, seed: int = 0, image: Any = None, **changes: Any
) -> Example:
    rng = np.random.default_rng(seed)
    return replace(PREPARATION, **changes).prepare(what, rng, image=image, tokenizer=tokenizer, training=training)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def test_an_evaluated_region(tokenizer: Tokenizer) -> None:
    rows = Row("a red mug", prompt=MUG, box=MUG), Row("plate", prompt=PLATE, box=PLATE)
    example = prepared(tokenizer, sample(*rows), image=picture(), instructions=REGION)
    assert example.valid_hw == (36, 48) and example.scale == pytest.approx((0.6, 0.6))
    assert example.text.tolist() == [[0, *ids("a red mug"), 1], [0, *ids("plate"), 1, 0, 0]]
    assert example.context.tolist() == [[*ids("an object of"), 1]] * 2
    np.testing.assert_allclose(example.prompts, np.multiply([MUG, PLATE], 0.6), rtol=1e-6)
    np.testing.assert_array_equal(example.boxes, example.prompts)
    assert not example.whole.any() and example.masks is None
    assert example.image is not None and example.image.shape == (SIZE, SIZE, 3)
    assert example.image[:36].all() and not example.image[36:].any()
    # every word points at the box, the start and the end nowhere
    np.testing.assert_array_equal(example.points[0, 1:4], example.boxes[[0, 0, 0]])
    assert not example.points[0, [0, 4]].any() and not example.points[1, 2:].any()


def test_special_ids_of_another_text_head(tokenizer: Tokenizer) -> None:
    """Where BOS is not PAD, it is no word either, neither for a box nor for a narration's utterances."""
    said = Utterance("red mug", (0.3, 0.3), (0.1, 0.1, 0.5, 0.5))
    box, spoken = Row("red mug", box=MUG), Row("red mug", utterances=(said,))
    context = {"instructions": ("photo",), "begin_id": 51, "end_id": 52}
    example = prepared(tokenizer, sample(box, spoken), **context)
    assert example.text.tolist() == [[51, *ids("red mug"), 52]] * 2
    assert example.context.tolist() == [[*ids("photo"), 52]] * 2
    plain = prepared(tokenizer, sample(box, spoken))
    np.testing.assert_array_equal(example.points, plain.points)
    assert example.points[:, 1:3].any(-1).all() and not example.points[:, [0, 3]].any()


def test_a_referring_expression_is_asked_for_and_given(tokenizer: Tokenizer) -> None:
    example = prepared(tokenizer, sample(Row("red mug", box=MUG)), referring=REFERRING, instructions=("photo",))
    assert example.context.tolist() == [[*ids("where is red mug"), 1]]
    assert example.text.tolist() == [[0, *ids("red mug"), 1]]
    assert example.whole.all() and example.prompts.tolist() == [[0, 0, 48, 36]]


def test_texts_and_contexts_too_long_are_cut_without_an_end(tokenizer: Tokenizer) -> None:
    example = prepared(tokenizer, sample(Row("a " * 9, context="red " * 9), Row("mug", context="red " * 5)))
    assert example.text[0].tolist() == [0, *ids("a " * 7)]
    assert example.context.tolist() == [ids("red " * 6), [*ids("red " * 5), 1]]


def test_texts_have_full_length_only_for_the_mask_adapter(tokenizer: Tokenizer) -> None:
    mask = run_lengths([[10, 20, 30, 20, 30, 40, 10, 40]], WIDTH, HEIGHT)
    what = sample(Row("mug", box=MUG, mask=mask), Row("plate", box=PLATE))
    assert prepared(tokenizer, what).text.shape == (2, 3)
    example = prepared(tokenizer, what, masks=True)
    assert example.text.shape == (2, 8) and example.masks is not None
    assert example.masks.shape == (2, SIZE, SIZE) and not example.masks[1].any()
    assert example.masks[0, 12:24, 6:18].all() and example.masks[0].sum() == 144
    without = prepared(tokenizer, sample(Row("plate", box=PLATE)), image=picture(), masks=True)
    batch = collate([replace(example, image=without.image), without], "mine", frozenset({"mask"}))
    assert batch.masks is not None and batch.masks.shape == (3, SIZE, SIZE)
    assert batch.masks.flatten(1).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize(("alignment", "owners"), [("rank", [0, 0, 1, 1]), ("text", [0, 0, 0, 1])])
def test_words_of_a_narration_point_at_their_utterances(
    tokenizer: Tokenizer, alignment: str, owners: list[int]
) -> None:
    spoken = (
        Utterance("a red mug", (0.2, 0.4), (0.1, 0.301, 0.4, 0.7)),
        Utterance("plate", (0.8, 0.3), (0.6, -0.2, 1.1, 0.5)),
    )
    example = prepared(tokenizer, sample(Row("a red mug plate", utterances=spoken)), alignment=alignment)
    boxes = np.array([[8, 18, 32, 42], [48, 0, 80, 30]]) * 0.6  # whole px of the stored picture
    np.testing.assert_allclose(example.points[0, 1:5], boxes[owners], rtol=1e-6)
    assert not example.points[0, [0, 5]].any() and not example.boxes.any()


def test_a_narration_cut_in_the_middle(tokenizer: Tokenizer) -> None:
    spoken = tuple(Utterance(word, (0.5, 0.5), (0.1 * n, 0.2, 0.9, 0.8)) for n, word in enumerate(["a"] * 9))
    for alignment in ("rank", "text"):
        example = prepared(tokenizer, sample(Row("a " * 9, utterances=spoken)), alignment=alignment)
        assert example.points[0, 1:].any(-1).all() and example.points.shape == (1, 8, 4)


def test_a_prefix_is_given_and_the_rest_written(tokenizer: Tokenizer) -> None:
    what = sample(Row("a red mug and plate"))
    splits = set()
    for seed in range(40):
        example = prepared(tokenizer, what, training=True, seed=seed, prefix_split=True)
        context = [i for i in example.context[0].tolist() if i > 1]
        written = [i for i in example.text[0].tolist() if i > 1]
        assert context + written == ids("a red mug and plate") and written
        splits.add(len(context))
    assert splits == {0, 1, 2, 3, 4}
    whole = prepared(tokenizer, what, prefix_split=True)
    assert whole.text[0].tolist() == [0, *ids("a red mug and plate"), 1] and whole.context.shape == (1, 0)


def test_instructions_are_drawn_in_training_and_the_first_otherwise(tokenizer: Tokenizer) -> None:
    what, asked = sample(Row("mug")), {"instructions": ("photo", "object", "a red")}
    drawn = {tuple(prepared(tokenizer, what, True, seed, **asked).context[0]) for seed in range(30)}
    assert drawn == {(*ids("photo"), 1), (*ids("object"), 1), (*ids("a red"), 1)}
    assert {tuple(prepared(tokenizer, what, False, s, **asked).context[0]) for s in range(5)} == {(*ids("photo"), 1)}
    assert (len(SHORT_CAPTION), len(LONG_CAPTION)) == (13, 11) == (len(set(SHORT_CAPTION)), len(set(LONG_CAPTION)))
    assert (SHORT_CAPTION[0], LONG_CAPTION[0]) == ("A photo of ", "A long image caption: ")


def test_rows_are_sampled_in_training_only(tokenizer: Tokenizer) -> None:
    what = sample(*[Row(word) for word in WORDS])
    assert len(prepared(tokenizer, what, max_rows=3).text) == len(WORDS)
    seen = set()
    for seed in range(30):
        example = prepared(tokenizer, what, True, seed, max_rows=3)
        assert [row.text for row in example.sample.rows] == [WORDS[i - 2] for i in example.text[:, 1]]
        assert len(set(example.text[:, 1].tolist())) == 3
        seen |= set(example.text[:, 1].tolist())
    assert len(seen) == len(WORDS)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_random_cut_keeps_rows_and_boxes_consistent(tokenizer: Tokenizer, seed: int) -> None:
    rows = Row("mug", prompt=MUG, box=MUG), Row("plate", prompt=PLATE, box=PLATE), Row("and")
    things = Instance("mug", MUG), Instance("plate", PLATE)
    changes: dict[str, Any] = {"scale": (0.1, 2.5), "flip": 0.5, "image": picture(), "prompt_jitter": 0.2}
    example = prepared(tokenizer, sample(*rows, instances=things), True, seed, **changes)
    again = prepared(tokenizer, sample(*rows, instances=things), True, seed, **changes)
    height, width = example.valid_hw
    assert example.image is not None and again.image is not None
    np.testing.assert_array_equal(example.image, again.image)
    np.testing.assert_array_equal(example.prompts, again.prompts)
    assert example.image[:height, :width].all() and example.image.sum() == example.image[:height, :width].sum()
    texts = [row.text for row in example.sample.rows]
    assert "and" in texts and example.instances.shape == (2, 4)
    for k, row in enumerate(example.sample.rows):
        x0, y0, x1, y1 = example.prompts[k]
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert example.whole[k] == (row.prompt is None)
        if row.box is not None:
            n = 0 if row.text == "mug" else 1
            np.testing.assert_array_equal(example.boxes[k], example.instances[n])
            np.testing.assert_array_equal(example.points[k, 1], example.boxes[k])
    for n, name in enumerate(("mug", "plate")):
        assert example.instances[n].any() == (name in texts)


def test_when_the_cut_loses_every_row_the_whole_picture_is_taken(tokenizer: Tokenizer) -> None:
    what = sample(Row("mug", box=(0.0, 0.0, 2.0, 2.0)))
    scales = set()
    for seed in range(30):
        example = prepared(tokenizer, what, True, seed, scale=(3.0, 3.0), image=picture())
        assert example.boxes.any() and example.points[0, 1].any()
        scales.add(round(example.scale[0], 1))
    assert scales == {0.6, 1.8}


def test_the_centre_of_a_picture(tokenizer: Tokenizer) -> None:
    example = prepared(tokenizer, sample(Row("mug")), image=picture(), center_crop=True)
    assert example.valid_hw == (48, 48) and example.prompts.tolist() == [[0, 0, 48, 48]]


def test_examples_make_a_batch(tokenizer: Tokenizer) -> None:
    examples = [prepared(tokenizer, sample(Row("mug")), image=picture())]
    examples += [prepared(tokenizer, sample(Row("a red mug"), Row("plate")), image=picture(), instructions=REGION)]
    batch = collate(examples, "mine", frozenset({"text"}))
    assert batch.text.shape == (3, 5) and batch.context.shape == (3, 4) and batch.picture.tolist() == [0, 1, 1]


def test_a_picture_of_another_size_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.json:1: a\.jpg has the shape \[9, 80, 3\], not \[60, 80, 3\]"):
        prepared(tokenizer, sample(Row("mug")), image=picture()[:9])
    with pytest.raises(ValueError, match="cached features"):
        prepared(tokenizer, sample(Row("mug")), training=True, flip=0.5)
    for wrong in ({"scale": (0.0, 1.0)}, {"flip": 2.0}, {"max_rows": 0}, {"text_length": 1}, {"prompt_jitter": 0.5}):
        with pytest.raises(ValueError):
            replace(PREPARATION, **wrong)


class Listed:
    """A source of samples that are there already."""

    name, losses, skipped = "mine", frozenset({"text"}), 2

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def test_the_store_gives_samples_back() -> None:
    a = sample(Row("mug é", "asked", MUG, PLATE, {"size": [1, 1], "counts": "0"}), instances=(Instance("mug", MUG),))
    b = replace(a, rows=(Row("x", utterances=(Utterance("x", (0.1, 1 / 3), (0.1, 0.2, 0.3, 1e-17)),)),), where="f:2")
    other = replace(a, image=Path("b.jpg"))
    store = SampleStore(Listed(a, other, b))  # pyright: ignore[reportArgumentType]
    assert [store[i] for i in range(len(store))] == [a, other, b]
    assert store.keys == ["a.jpg", "b.jpg"] and store.skipped == 2
    with pytest.raises(IndexError):
        store[3]
    twin = replace(a, image=Path("folder/a.jpg"))
    with pytest.raises(DataError, match=r"two pictures are called a\.jpg, in \. and folder"):
        SampleStore(Listed(a, twin))  # pyright: ignore[reportArgumentType]
