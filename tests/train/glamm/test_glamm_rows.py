"""Rows of several conversations about a picture: what is learned from them, and where the things are that they mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_data import make_data  # pyright: ignore[reportMissingImports]

from deixis.conversation import IGNORED, IMAGE_ID
from deixis_train.data.samples import Sample
from deixis_train.glamm.batches import GlammBatch, Rows, expand_rows, share_beginning
from deixis_train.glamm.family import GlammRun
from deixis_train.glamm.forward import mask_states, training_outcome
from deixis_train.glamm.items import Item, join_items
from deixis_train.glamm.mixture import ItemFeed
from deixis_train.glamm.pointing import box_and_place, find_pointed, place_loss, told_boxes
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.training.corpus import Corpus
from deixis_train.training.recipe import load_recipe

TINY = GLAMM_PRESETS["glamm-tiny"]
SEG = TINY.ids.mask
BEGIN = [1, 9, IMAGE_ID]
TOLD = [[*BEGIN, 5, 6, SEG, 2], [*BEGIN, 7, 2], [*BEGIN, 8, SEG, 11, SEG, 2, 5, 12, 2]]
WANTED = [[IGNORED] * 4 + ids[4:] for ids in TOLD]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def batch_of(rows: Rows, picture: list[int], images: torch.Tensor) -> GlammBatch:
    return GlammBatch(rows, torch.tensor(picture), global_images=images)


def test_a_shared_beginning_changes_no_state_and_no_gradient() -> None:
    torch.manual_seed(0)
    model = Glamm(TINY)
    images = torch.rand(1, 112, 112, 3) * 255
    apart = expand_rows(TOLD, WANTED, [0, 0, 0], [0, 0, 0], TINY, 1)
    ids, labels, ways = share_beginning(TOLD, WANTED)
    whole = expand_rows([ids], [labels], [0], [0], TINY, 1, [ways])
    assert whole.ids.shape[1] < apart.ids.numel() / 2
    found = []
    for rows, picture in ((apart, [0, 0, 0]), (whole, [0])):
        model.zero_grad()
        outcome = training_outcome(model, batch_of(rows, picture, images))
        outcome.ce.backward()
        assert outcome.states is not None
        chosen, _ = mask_states(rows, outcome.states, SEG)
        gradients = [p.grad.clone() for p in model.llama.parameters() if p.grad is not None]
        found.append([outcome.ce.detach(), outcome.logits, chosen.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_what_begins_alike_can_share() -> None:
    for other in ([1, 8, IMAGE_ID, 5], [1, 9, 5]):
        with pytest.raises(ValueError, match="beginning with the picture"):
            share_beginning([TOLD[0], other], [WANTED[0], [IGNORED] * len(other)])


def begun(name: str, folder: Path) -> GlammRun:
    """A run of one stage of the demo, at the size of tests."""
    recipe = load_recipe("tabletop-glamm")
    [stage] = [stage for stage in recipe.stages if stage.name == name]
    stage = replace(stage, precision="fp32", cache=(), masks_per_picture=0)
    init = replace(recipe.init, mobile_sam=None, pixelllm=None)
    recipe = replace(recipe, preset="glamm-tiny", init=init, stages=(stage,))
    make_data(folder / "data", recipe)
    (folder / "run").mkdir()
    return GlammRun(recipe, Corpus(folder / "data", folder / "features", lambda line: None), folder / "run")


def test_masks_that_are_not_drawn_are_not_decoded(tmp_path: Path) -> None:
    run = begun("masks", tmp_path)
    run.model.eval()
    [stage], found = run.recipe.stages, []
    for most in (0, 1):
        [feed] = run.feeds(replace(stage, masks_per_picture=most), stage.sources, 0, writer=True)
        assert isinstance(feed, ItemFeed)
        batch = feed.make(0, 2).batch
        with torch.no_grad():
            found.append((batch, training_outcome(run.model, batch).masks))
    (whole, every), (part, some) = found
    assert part.decoded is not None and len(part.decoded) == 2 and whole.masks is not None and part.masks is not None
    counts = [len(masks) for masks in whole.masks]
    assert max(counts) > 1
    for picture, number in enumerate((int(part.decoded[0]), int(part.decoded[1]) - counts[0])):
        assert torch.equal(part.masks[picture][0], whole.masks[picture][number])
        torch.testing.assert_close(some[picture][0], every[picture][number], rtol=1e-4, atol=1e-4)


def test_a_picture_is_asked_everything_once_an_epoch(tmp_path: Path) -> None:
    run = begun("language", tmp_path)
    recipe = run.recipe
    assert run.model.config.system == recipe.conversation.system  # so the checkpoint, and the bundle, say it
    [stage] = recipe.stages
    [feed] = run.feeds(stage, stage.sources, 0, writer=True)
    assert isinstance(feed, ItemFeed)
    rows = feed.choose_rows(0, len(feed))
    pictures = [[item.sample.key for _, item in row] for row in rows]
    assert len({row[0] for row in pictures}) == len(feed) and all(len(set(row)) == 1 for row in pictures)
    asked = {source.spec.name for row in rows for source, _ in row}
    assert asked == {source.name for source in stage.sources}
    micro = feed.make(0, 2)
    batch = micro.batch
    assert batch.rows.branch is not None and int(batch.rows.branch.max()) >= 3
    assert batch.pointed is not None and batch.look is not None
    assert len(batch.pointed.row) == int((batch.rows.ids == SEG).sum())
    terms = run.objective(stage)(micro).terms
    assert set(terms) == {"text", "look", "box", "place"}
    # Box, place and what they are about line up: the ids behind those states are the mask tokens.
    behind = batch.rows.ids[batch.pointed.row, batch.pointed.position + 1]
    assert (behind == SEG).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(8, 40), st.integers(8, 40))
def test_the_place_lies_in_the_mask_and_the_box_around_it(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    centre = (int(rng.integers(width)), int(rng.integers(height)))
    cv2.ellipse(mask, centre, (int(rng.integers(1, 12)), int(rng.integers(1, 12))), 0, 0, 300, 1, -1)
    box, (x, y) = box_and_place(mask)
    assert mask[int(y * height), int(x * width)] == 1
    left, top, right, bottom = (round(v * side) for v, side in zip(box, (width, height) * 2, strict=True))
    inside = mask[top:bottom, left:right]
    assert inside.sum() == mask.sum()
    assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_states_learn_boxes_and_clicks() -> None:
    torch.manual_seed(0)
    model = Glamm(TINY)
    masks = np.zeros((2, 56, 112), np.uint8)
    masks[0, 10:20, 30:50] = masks[1, 40:, 80:] = 1
    sample = Sample(Path("a.jpg"), 112, 56, ())
    items = [Item(sample, (("?", "!"),), masks=masks[:1]), Item(sample, (("?", "!"),), masks=masks[1:])]
    joined = join_items(items)
    assert joined.masks is not None and np.array_equal(joined.masks, masks) and len(joined.turns) == 2
    rows = expand_rows([[*BEGIN, SEG, 6, SEG, 2]], [[IGNORED] * 7], [0], [0], TINY, 1)
    pointed = find_pointed([items], rows, TINY)
    assert pointed is not None
    assert torch.allclose(pointed.boxes[0], torch.tensor([30 / 112, 10 / 56, 50 / 112, 20 / 56]))
    x, y = pointed.places[1] * 112 / 128  # of the grounding input, whose longer side is 128, to the stored picture
    assert 80 <= x <= 112 and 40 <= y <= 56
    head = torch.nn.Linear(TINY.llama.emb, 4)
    states = torch.randn(2, TINY.llama.emb)
    optimizer = torch.optim.Adam([*head.parameters(), *model.mask_projection.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        box, _ = told_boxes(head(states), pointed)
        place = place_loss(model, states, pointed)
        optimizer.zero_grad()
        (box + place).backward()
        optimizer.step()
        losses.append((box.item(), place.item()))
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < 0.2 * losses[0][1]
    assert all(p.grad is None for p in model.prompt_encoder.parameters())
