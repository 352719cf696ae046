"""Items of GLaMM: what is asked and answered, and that boxes and masks are those of the marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deixis.bundle import ImageSpec
from deixis.conversation import IMAGE, MASK, REGION, published_gcg
from deixis.image import square
from deixis_train.data.preparation.geometry import decode_mask
from deixis_train.data.samples import Box, Instance, Phrase, Row, Sample
from deixis_train.glamm.items import Asking, Item, make_item
from deixis_train.glamm.pictures import global_input, grounding_input, seen_by_clip
from deixis_train.glamm.templates import QUESTIONS
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.tasks import glamm_tasks
from deixis_train.training.cells import cell_owners

GOLDEN = Path(__file__).parents[2] / "golden" / "glamm"
WIDTH, HEIGHT = 60, 40


def rle(x: int, width: int) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, x : x + width] = 1
    return coded(mask)


def coded(mask: np.ndarray) -> dict:
    counts: Any = coco_mask.encode(np.asfortranarray(mask))["counts"]
    return {"size": list(mask.shape), "counts": counts.decode("ascii")}


def box(x: int) -> Box:
    return (float(x), 0.0, float(x + 4), 40.0)


def item(task: str, *rows: Row, seed: int = 0, **more) -> Item:
    found = make_item(
        Sample(Path("a.jpg"), WIDTH, HEIGHT, rows),
        Asking(task, QUESTIONS[task], **more),
        np.random.default_rng(seed),
    )
    assert found is not None
    # The contract of every item: as many boxes and masks as there are marks.
    said = "".join(question + answer for question, answer in found.turns)
    assert said.count(REGION) == len(found.boxes)
    if found.masks is not None:
        assert said.count(MASK) == len(found.masks)
    return found


def test_captions_are_tagged_and_their_parts_joined() -> None:
    phrases = (Phrase(0, 5, (rle(0, 10), rle(5, 10))), Phrase(10, 15, (rle(30, 3),)), Phrase(16, 18))
    made = item("grounded_caption", Row("A man and a dog on a bench.", phrases=phrases))
    [(question, answer)] = made.turns
    assert question in QUESTIONS["grounded_caption"]
    assert answer == "<p> A man </p> [SEG] and <p> a dog </p> [SEG] on a bench."
    assert published_gcg(answer)[1] == ["A man", "a dog"]
    assert made.masks is not None and made.masks.max() == 1
    assert [int(mask.sum()) for mask in made.masks] == [15 * HEIGHT, 3 * HEIGHT]
    unmasked = item("grounded_caption", Row("A man and a dog on a bench.", phrases=phrases), masks=False)
    assert unmasked.turns[0][1].count(MASK) == 3 and unmasked.masks is None


def test_at_most_three_expressions_and_ten_regions() -> None:
    rows = [Row(f"The Thing {k}", box=box(k), mask=rle(k, 1)) for k in range(14)]
    asked = item("refer", *rows)
    assert asked.masks is not None and len(asked.turns) == 3
    for (question, _), mask in zip(asked.turns, asked.masks, strict=True):
        number = int(np.flatnonzero(mask[0])[0])
        assert f"the thing {number}" in question
    regions = item("region", *rows)
    assert len(regions.turns) == len(regions.boxes) == 10
    for number, ((question, answer), its) in enumerate(zip(regions.turns, regions.boxes, strict=True), start=1):
        assert f"region{number} <bbox>" in question
        assert answer == f"The Thing {its[0]:.0f}"
    introduced = item("region_introduced", *rows[:2])
    assert introduced.turns[0][0].startswith(IMAGE) and introduced.turns[1][0] == "region2 <bbox>"


def test_groups_of_regions_give_every_box_as_often_as_it_is_named() -> None:
    phrases = (Phrase(0, 5, box=box(3)), Phrase(10, 15, box=box(20)))
    made = item("region_group", Row("A man and a dog on a bench.", phrases=phrases))
    assert "region1 <bbox>,region2 <bbox>" in made.turns[0][0]
    assert [answer for _, answer in made.turns] == ["A man and a dog on a bench.", "A man", "a dog"]
    assert made.boxes == (box(3), box(20)) * 2


def test_parts_conversations_and_marks_in_texts() -> None:
    named = {item("classes", Row("dog", mask=rle(1, 2), part="ear"), seed=s).turns[0][0] for s in range(30)}
    assert any("dog ear" in q for q in named) and any("the ear of the dog" in q for q in named)
    talk = item("ask", Row("a cup", question="what <image> is it?"), Row("red", question="which color?"))
    assert talk.turns == ((f"{IMAGE}\nwhat   is it?", "a cup"), ("which color?", "red"))
    assert item("caption", Row("see [SEG] here")).turns[0][1] == "see   here"
    nothing = Sample(Path("a.jpg"), WIDTH, HEIGHT, (Row("no mask"),))
    assert make_item(nothing, Asking("refer", QUESTIONS["refer"]), np.random.default_rng(0)) is None


def test_what_inference_asks_is_trained() -> None:
    tasks = glamm_tasks(GLAMM_PRESETS["glamm-7b"])
    assert tasks["grounded_caption"].instruction == QUESTIONS["grounded_caption"][0]
    assert tasks["caption"].instruction == QUESTIONS["caption"][0]
    assert tasks["refer"].instruction == QUESTIONS["refer"][0]
    assert tasks["region_caption"].instruction == QUESTIONS["region"][0].replace("{region}", REGION)
    for questions in QUESTIONS.values():
        assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("number", [0, 1])
def test_both_inputs_are_the_references_to_the_byte(number: int) -> None:
    golden = np.load(GOLDEN / "preprocess.npz")
    image = golden[f"image{number}_uint8"]
    assert np.array_equal(global_input(image, 336), golden[f"clip{number}_resized_cropped_uint8"])
    padded, (height, width) = grounding_input(image, 128)
    assert [height, width] == golden[f"sam{number}_resize_hw"].tolist()
    assert np.array_equal(padded[:height, :width], golden[f"sam{number}_resized_uint8"])
    assert not padded[height:].any() and not padded[:, width:].any()


@pytest.mark.parametrize("shape", [(5, 5), (31, 77), (300, 40)])
@pytest.mark.parametrize("fit", ["center_crop", "stretch"])
def test_the_runtime_makes_the_same_input(shape: tuple[int, int], fit: Literal["center_crop", "stretch"]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    spec = ImageSpec(56, fit, "bicubic", antialias=True, pad="none")
    assert np.array_equal(global_input(picture, 56, fit), square(picture, spec))


def test_boxes_as_fractions_lie_on_the_cells_of_a_stretched_picture() -> None:
    """Of the demo: a box is read off the cells that show the thing, and the same cells belong to it."""
    config = GLAMM_PRESETS["tabletop-glamm"]
    size, grid = config.clip.image_size, config.clip.grid
    assert config.clip.fit == "stretch" and config.region is not None and config.region.frame == size
    wide, (left, top, right, bottom) = (288, 512), (64, 72, 96, 108)  # height and width of the picture, a thing in it
    picture, mask = np.zeros((*wide, 3), np.uint8), np.zeros(wide, np.uint8)
    picture[top:bottom, left:right], mask[top:bottom, left:right] = 255, 1
    bright = global_input(picture, size, "stretch").mean(-1).reshape(grid, 14, grid, 14).mean((1, 3)) > 128
    cells = {(int(y), int(x)) for y, x in np.argwhere(bright)}
    assert cells == {(4, 2), (5, 2)}
    fractions = np.array([left / 512, top / 288, right / 512, bottom / 288]) * grid
    assert np.allclose(fractions, (2, 4, 3, 6))
    sample = Sample(Path("a.jpg"), 512, 288, (), (Instance("cube", (left, top, right, bottom), coded(mask)),))
    seen = seen_by_clip(sample, size, "stretch")
    assert np.allclose(np.array(seen.instances[0].box) * grid / size, fractions)
    owners = cell_owners(seen, grid, size, (size, size))
    assert {(int(y), int(x)) for y, x in np.argwhere(owners == 0)} == cells


def test_things_are_where_clip_sees_them() -> None:
    things = (Instance("left", (0, 0, 10, 40), rle(0, 10)), Instance("middle", (20, 0, 40, 40), rle(20, 20)))
    seen = seen_by_clip(Sample(Path("a.jpg"), WIDTH, HEIGHT, (), things), 80)
    assert (seen.width, seen.height) == (80, 80)
    assert seen.instances[0].box == (0, 0, 0, 80)  # cut away
    assert seen.instances[1].box == (20, 0, 60, 80)
    mask = decode_mask(seen.instances[1].mask or {})
    assert mask[:, 21:59].all() and not mask[:, :19].any() and not mask[:, 61:].any()
