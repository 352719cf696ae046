"""The demo's training: words and places of its rows, targets of the cells, losses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch import nn

from deixis_train.tabletop.cells import CellTargets, Names
from deixis_train.tabletop.losses import box_loss, iou
from deixis_train.tabletop.rows import CAPTION, REFER, REGION, Row, SceneData, SceneRows, decoder_arrays, scene_rows
from deixis_train.tabletop.scenes import cell_owners
from deixis_train.tabletop.tokenizer import END, PAD, SPACE, UNKNOWN, build_tokenizer, encode_words
from deixis_train.tabletop.train import Helpers, draw_batch, looking_loss
from deixis_train.tabletop.warmup import CellData

WORDS = [
    "a",
    "an",
    "and",
    "are",
    "ball",
    "image",
    "caption",
    "long",
    "mug",
    "object",
    "of",
    "on",
    "red",
    "table",
    "the",
]
WORDS += ["there", "where", "is", "blue"]
MARKS = list(",.;:?!")
TOKENIZER = build_tokenizer(WORDS, 128)
NAMES: Names = {"kinds": ["ball", "mug"], "colours": ["blue", "red"]}
SIZE, GRID = 128, 4
CELL = SIZE // GRID


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- tokenizer ----------------------------------------------------------------------------------------------


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def pieces(ids: list[int]) -> list[str]:
    return [TOKENIZER.id_to_token(i) for i in ids]


def test_special_ids_are_fixed() -> None:
    assert [TOKENIZER.token_to_id(piece) for piece in ("<pad>", "</s>", "<unk>")] == [PAD, END, UNKNOWN] == [0, 1, 2]


def test_a_known_word_is_one_token_and_an_unknown_word_is_spelt() -> None:
    assert all(pieces(ids_of(word)) == [SPACE + word] for word in WORDS)
    assert pieces(ids_of("The RED mug.")) == ["▁the", "▁red", "▁mug", "."]
    assert pieces(ids_of("cat")) == [SPACE, "c", "a", "t"]
    assert pieces(ids_of("mugs")) == ["▁mug", "s"]
    assert TOKENIZER.decode(ids_of("the red cat, on a table.")) == "the red cat, on a table."


def test_unknown_characters_are_unknown_and_nothing_else_is() -> None:
    assert pieces(ids_of("é")) == [SPACE, "<unk>"]
    assert pieces(ids_of("red é mug")) == ["▁red", SPACE, "<unk>", "▁mug"]
    assert pieces(ids_of("ｍｕｇ")) == ["▁mug"]  # NFKC makes wide letters plain


def test_words_that_do_not_fit_are_refused() -> None:
    fixed = build_tokenizer([], 1000).get_vocab_size()
    assert build_tokenizer(WORDS, fixed + len(WORDS)).get_vocab_size() == fixed + len(WORDS)
    with pytest.raises(ValueError, match=f"{fixed + len(WORDS)} pieces do not fit into a vocabulary"):
        build_tokenizer(WORDS, fixed + len(WORDS) - 1)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, *MARKS, "cat", "Mugs", "x9", "don't", "é", "naïve", "ｗide"]), min_size=1))
def test_every_token_knows_its_word(words: list[str]) -> None:
    ids, owner = encode_words(TOKENIZER, words)
    assert len(ids) == len(owner) and owner == sorted(owner) and set(owner) == set(range(len(words)))
    for i, word in enumerate(words):
        spelt = "".join(TOKENIZER.id_to_token(t) for t, o in zip(ids, owner, strict=True) if o == i).lstrip(SPACE)
        wanted = unicodedata.normalize("NFKC", word).lower()
        assert spelt == "".join(c if c.isascii() else "<unk>" for c in wanted)


# --- rows ---------------------------------------------------------------------------------------------------


def made_up_scene(width: int = 200, height: int = 100) -> dict[str, Any]:
    mug, ball = [20, 10, 60, 50], [100, 40, 150, 100]
    return {
        "width": width,
        "height": height,
        "objects": [
            {"kind": "mug", "color": "red", "box": mug},
            {"kind": "ball", "color": "blue", "box": ball},
        ],
        "captions": [
            {"words": ["a", "mug", ",", "a", "cat", "and", "ball", "."], "boxes": [mug] * 3 + [ball] * 3 + [None] * 2}
        ],
        "regions": [{"text": "a red mug", "object": 0}, {"text": "a blue ball", "object": 1}],
        "expressions": [{"text": "the ball", "object": 1}],
    }


def test_rows_point_where_their_words_do() -> None:
    rows = scene_rows(made_up_scene(), TOKENIZER)
    mug, ball = (0.1, 0.1, 0.3, 0.5), (0.5, 0.4, 0.75, 1.0)
    assert rows.boxes == [(20, 10, 60, 50), (100, 40, 150, 100)]
    caption = rows.captions[0]
    assert pieces(caption.ids) == ["▁a", "▁mug", ",", "▁a", SPACE, "c", "a", "t", "▁and", "▁ball", "."]
    assert caption.boxes == [mug] * 3 + [ball] * 6 + [None] * 2
    assert caption.things == [0] * 3 + [1] * 6 + [-1] * 2 and rows.refers[0].things == [1, 1]
    assert caption.thing == -1 and caption.context == [*ids_of(CAPTION), END]
    assert [(row.thing, pieces(row.ids)) for row in rows.regions] == [
        (0, ["▁a", "▁red", "▁mug"]),
        (1, ["▁a", "▁blue", "▁ball"]),
    ]
    assert [set(row.boxes) for row in rows.regions] == [{mug}, {ball}]
    assert all(row.context == [*ids_of(REGION), END] for row in rows.regions)
    refer = rows.refers[0]
    assert refer.context == [*ids_of(REFER.format(text="the ball")), END] and set(refer.boxes) == {ball}


def test_decoder_arrays_start_with_begin_and_end_with_end_and_padding() -> None:
    rows = scene_rows(made_up_scene(), TOKENIZER)
    chosen = [rows.refers[0], rows.captions[0]]
    ids, boxes, has_box = decoder_arrays(chosen)
    long = len(chosen[1].ids)
    assert ids.tolist() == [[PAD, *chosen[0].ids, END] + [PAD] * (long - 2), [PAD, *chosen[1].ids, END]]
    assert has_box.tolist() == [[0, 1, 1] + [0] * (long - 1), [0] + [1] * 9 + [0, 0, 0]]
    assert torch.equal(boxes[0, 1:3], torch.tensor([[0.5, 0.4, 0.75, 1.0]] * 2))
    assert not boxes[has_box == 0].any()


def write_scenes(folder: Path, scenes: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "scenes-0000.jsonl").write_text("".join(json.dumps(scene) + "\n" for scene in scenes), encoding="utf-8")
    return folder


def test_scene_data_of_two_scenes(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", [made_up_scene(), made_up_scene(100, 200)])
    with pytest.raises(ValueError, match="run the stages before"):
        SceneData(data, tmp_path, TOKENIZER, NAMES)
    random = np.random.default_rng(0)
    semantic, sam = (random.normal(size=(2, 4, 4, c)).astype(np.float16) for c in (3, 2))
    owner = np.full((2, 4, 4), -1, np.int16)
    owner[0, 1, 2], owner[1, 3, 0] = 1, 0
    for name, array in (("semantic", semantic), ("sam", sam), ("owner", owner)):
        np.save(tmp_path / f"scenes-0000.{name}.npy", array)
    scenes = SceneData(data, tmp_path, TOKENIZER, NAMES)
    assert len(scenes) == 2
    index = np.array([1, 0])
    assert scenes.whole(index).tolist() == [[0, 0, 100, 200], [0, 0, 200, 100]]
    features = scenes.features(index)
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features[..., :3], semantic[::-1])
    np.testing.assert_array_equal(features[..., 3:], sam[::-1])

    batch = draw_batch(scenes, index, np.random.default_rng(3), cell_px=50)
    assert [row.task for row in batch.rows] == ["caption", "refer", "region"] * 2
    # Whole pictures come first among the prompts, then the regions, one per picture.
    assert batch.prompt.tolist() == [0, 0, 2, 1, 1, 3] and batch.region_picture.tolist() == [0, 1]
    assert [row.thing >= 0 for row in batch.rows] == [False, True, True] * 2
    assert [row.context for row in batch.rows[:3]] == [r.context for r in _one_of_each(scenes.scenes[1])]
    np.testing.assert_array_equal(batch.occupied, owner[index] >= 0)


def _one_of_each(scene: SceneRows) -> list[Row]:
    return [scene.captions[0], scene.refers[0], scene.regions[0]]


@pytest.mark.parametrize("seed", range(8))
def test_regions_are_asked_for_with_a_place_on_them(seed: int, tmp_path: Path) -> None:
    scene = made_up_scene()
    data = write_scenes(tmp_path / "data", [scene])
    owner = np.full((1, 4, 4), -1, np.int16)  # cells of 50 px
    owner[0, 0, 1], owner[0, 1, 2] = 0, 1
    for name, array in (("semantic", owner[..., None]), ("sam", owner[..., None]), ("owner", owner)):
        np.save(tmp_path / f"scenes-0000.{name}.npy", array)
    scenes = SceneData(data, tmp_path, TOKENIZER, NAMES)
    batch = draw_batch(scenes, np.array([0]), np.random.default_rng(seed), cell_px=50)
    [row] = [row for row in batch.rows if row.task == "region"]
    box = np.array(scene["objects"][row.thing]["box"])
    points, labels = batch.region_points[0].numpy(), batch.region_labels[0].tolist()
    if labels == [1, -1]:  # a point, in a cell of the object and in its box
        cell = np.array([[50, 0, 100, 50], [100, 50, 150, 100]][row.thing])
        low, high = np.maximum(box, cell)[:2], np.minimum(box, cell)[2:]
        assert (points[0] >= low).all() and (points[0] <= high).all()
    else:
        assert labels == [2, 3, -2, -2, -2] and not points[2:].any()
        sides = np.tile(box[2:] - box[:2], 2)
        moved = points[:2].ravel()
        assert (np.abs(moved - box) <= 0.06 * sides + 1e-4).all()
        assert moved.min() >= 0 and (moved <= [200, 100, 200, 100]).all()


# --- cells --------------------------------------------------------------------------------------------------


def scene_of_masks(masks: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
    """A scene line of masks [n, H, W]; kinds and colours are drawn."""
    things = []
    for mask in masks:
        rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rows, columns = np.nonzero(mask)
        things.append(
            {
                "kind": str(random.choice(NAMES["kinds"])),
                "color": str(random.choice(NAMES["colours"])),
                "box": [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)],
                "rle": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return {"width": masks.shape[2], "height": masks.shape[1], "objects": things}


def visible_masks(random: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Visible parts of random rectangles, each hiding those before it: bool [n, H, W], none empty."""
    owner = np.full((height, width), -1)
    for index in range(count):
        x, y = random.integers(0, width - 10), random.integers(0, height - 10)
        w, h = random.integers(6, 60, 2)
        owner[y : y + h, x : x + w] = index
    return np.stack([owner == index for index in range(count) if (owner == index).any()])


@pytest.mark.parametrize("seed", range(6))
def test_cells_belong_to_the_object_that_covers_most_of_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = [(128, 128), (96, 128), (128, 90)][seed % 3]
    masks = visible_masks(random, 6, height, width)
    scene = scene_of_masks(masks, random)
    wanted = np.full((GRID, GRID), -1)
    for row in range(GRID):
        for column in range(GRID):
            pixels = [
                m[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL].sum() for m in masks
            ]  # a cell over padding keeps its whole area
            if max(pixels) > 0.2 * CELL**2:
                wanted[row, column] = int(np.argmax(pixels))
    owners = cell_owners(scene, GRID, SIZE)
    np.testing.assert_array_equal(owners, wanted)

    other = scene_of_masks(visible_masks(random, 3, 128, 128), random)
    both = np.stack([cell_owners(other, GRID, SIZE), owners])
    occupied, targets = CellTargets([other, scene], both, NAMES)[np.array([1, 0, 1])]
    np.testing.assert_array_equal(occupied[0], wanted >= 0)
    np.testing.assert_array_equal(occupied[1], both[0] >= 0)
    for row, column in np.argwhere(wanted >= 0):
        thing = scene["objects"][wanted[row, column]]
        box = np.array(thing["box"]) / [width, height, width, height]
        kind, colour, *place = targets[2, row, column]
        assert NAMES["kinds"][int(kind)] == thing["kind"] and NAMES["colours"][int(colour)] == thing["color"]
        np.testing.assert_allclose(place, box, atol=1e-6)
    assert not targets[0][wanted < 0].any()


def test_mirrored_boxes_cover_mirrored_cells(tmp_path: Path) -> None:
    # Objects of whole cells: a box is right when it spans just the cells of its object.
    random = np.random.default_rng(0)
    scenes, owners, small = [], [], []
    for index in range(12):
        height, width = (SIZE, SIZE) if index % 3 else (SIZE, SIZE - CELL)
        masks = np.zeros((1, height, width), bool)
        row, column = random.integers(0, 3, 2)
        masks[0, row * CELL : (row + 2) * CELL, column * CELL : (column + 1) * CELL] = True
        scenes.append(scene_of_masks(masks, random))
        owners.append(cell_owners(scenes[-1], GRID, SIZE))
        small.append(np.repeat(owners[-1][..., None] + 2 + 10 * np.arange(GRID)[:, None], 3, axis=-1).astype(np.uint8))
    data = write_scenes(tmp_path / "data", scenes)
    np.save(tmp_path / "scenes-0000.owner.npy", np.stack(owners))
    np.save(tmp_path / "scenes-0000.small.npy", np.stack(small))
    cells = CellData(data, tmp_path, NAMES)
    before = cells.small.copy(), cells.targets.owner.copy(), cells.targets.objects.copy()
    mirrored = 0
    for seed in range(3):
        index = np.random.default_rng(seed).permutation(12)
        pictures, occupied, targets = (x.numpy() for x in cells.batch(index, np.random.default_rng(seed)))
        for picture, found, target, i in zip(pictures, occupied, targets, index, strict=True):
            flipped = not np.array_equal(picture, small[i])
            mirrored += flipped
            assert not (flipped and scenes[i]["width"] < SIZE), "padding would move"
            np.testing.assert_array_equal(picture, small[i][:, ::-1] if flipped else small[i])
            np.testing.assert_array_equal(found, (owners[i][:, ::-1] if flipped else owners[i]) >= 0)
            rows, columns = np.nonzero(found)
            span = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * CELL
            frame = np.array([scenes[i]["width"], scenes[i]["height"]] * 2)
            np.testing.assert_allclose(target[found][:, 2:] * frame, np.tile(span, (len(rows), 1)), atol=1e-4)
    assert 4 < mirrored < 20  # of 24 that may be
    for old, now in zip(before, (cells.small, cells.targets.owner, cells.targets.objects), strict=True):
        np.testing.assert_array_equal(old, now)


# --- losses -------------------------------------------------------------------------------------------------


def painted(box: list[int]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_iou_and_giou_against_counted_pixels() -> None:
    random = np.random.default_rng(0)
    low = random.integers(0, 12, (60, 2, 2))
    a, b = np.concatenate([low, low + random.integers(1, 9, (60, 2, 2))], axis=-1).transpose(1, 0, 2)
    swapped = a[:, [2, 1, 0, 3]]  # corners of a prediction may come in any order
    ratio, giou = iou(torch.tensor(swapped / 20).float(), torch.tensor(b / 20).float())
    for k in range(60):
        first, second = painted(list(a[k])), painted(list(b[k]))
        rows, columns = np.nonzero(first | second)
        hull = (rows.max() + 1 - rows.min()) * (columns.max() + 1 - columns.min())
        union = (first | second).sum()
        wanted = (first & second).sum() / union
        assert ratio[k].item() == pytest.approx(wanted, abs=1e-5)
        assert giou[k].item() == pytest.approx(wanted - (hull - union) / hull, abs=1e-5)


def test_box_loss() -> None:
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.3, 0.3, 0.4, 0.9]])
    weight = torch.tensor([1.0, 0.2, 3.0])
    assert box_loss(boxes, boxes, weight).item() == pytest.approx(0, abs=1e-6)
    moved = (boxes + 0.1).requires_grad_()
    nothing = box_loss(moved, boxes, torch.zeros(3))
    nothing.backward()
    assert nothing.item() == 0 and moved.grad is not None and not moved.grad.any()
    each = [box_loss(moved[k : k + 1], boxes[k : k + 1], torch.ones(1)).item() for k in range(3)]
    giou = iou(moved, boxes)[1].tolist()
    assert each == pytest.approx([5 * 0.1 + 1 - g for g in giou], abs=1e-5)
    assert box_loss(moved, boxes, weight).item() == pytest.approx(np.average(each, weights=weight), abs=1e-5)


def test_a_folded_projection_takes_raw_features() -> None:
    generator = torch.Generator().manual_seed(0)
    channels = torch.logspace(-2, 1, 9, dtype=torch.float64)
    features = torch.randn(3, 4, 4, 9, generator=generator, dtype=torch.float64) * channels + 3 * channels
    features[..., 4] = 0.5  # a channel that never changes must not blow up
    # In double precision: a channel that hardly varies makes the folded sum cancel.
    helpers, projection = Helpers(6, 9, NAMES).double(), nn.Linear(9, 5).double()
    helpers.measure(features)
    standard = helpers.standardize(features)
    assert standard.mean(dim=(0, 1, 2)).abs().max() < 1e-9
    varying = torch.arange(9) != 4
    torch.testing.assert_close(standard.std(dim=(0, 1, 2))[varying], torch.ones(8).double())
    wanted = projection(standard)
    helpers.fold_scale(projection)
    torch.testing.assert_close(projection(features), wanted, rtol=0, atol=1e-9)


def test_looking_at_the_right_cells_costs_nothing() -> None:
    row = replace(
        scene_rows(made_up_scene(), TOKENIZER).refers[0], things=[1, -1]
    )  # "the ball", its second word nowhere
    owner = torch.tensor([[-1, 0, 1, 1]])
    batch: Any = SimpleNamespace(rows=[row], row_owner=owner)
    weight = torch.ones(1, 4)
    right, wrong = torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 6)  # four cells, then two words of the instruction
    right[:, :, 1, 2:4] = 0.5
    wrong[:, 0, 1, 2], wrong[:, 1, 1, 0] = 0.5, 1.0  # the heads together give the thing a quarter
    assert looking_loss([wrong, right], batch, weight).item() == pytest.approx(0, abs=1e-4)  # the first layer is free
    assert looking_loss([right, wrong], batch, weight).item() == pytest.approx(np.log(4), abs=1e-4)
    assert looking_loss([right, wrong, right], batch, weight).item() == pytest.approx(np.log(4) / 2, abs=1e-4)
    assert looking_loss([right, wrong], batch, torch.zeros(1, 4)).item() == 0
