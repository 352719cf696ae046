"""Attention that is led: which positions, which cells, and that watching changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deixis.conversation import IGNORED, IMAGE_ID
from deixis_train.data.samples import Sample
from deixis_train.glamm.batches import expand_rows
from deixis_train.glamm.items import Item
from deixis_train.glamm.looking import find_looks, looking_loss, watched
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.glamm import Glamm

TINY = GLAMM_PRESETS["glamm-tiny"]
SAMPLE = Sample(Path("a.jpg"), 112, 112, ())
TURN = (("?", "!"),)


def test_words_of_phrases_and_regions_look_at_their_cells() -> None:
    ids, tokens, grid = TINY.ids, TINY.clip.tokens, TINY.clip.grid
    masks = np.zeros((2, 112, 112), np.uint8)
    masks[0, :28, :14] = 1  # two cells, one below the other
    masks[1, 111, 111] = 1  # less than a cell
    grounded = [1, IMAGE_ID, 5, ids.phrase_start, 9, 9, ids.phrase_end, ids.mask, 6, ids.mask, 2]
    region = [1, IMAGE_ID, ids.region, 5, 7, 8, 2]
    answers = [[*[IGNORED] * 3, *grounded[3:]], [*[IGNORED] * 4, 7, 8, 2]]
    rows = expand_rows([grounded, region], answers, [0, 1], [0, 1], TINY, 2)
    items = [[Item(SAMPLE, TURN, masks=masks)], [Item(SAMPLE, TURN, ((14.0, 0.0, 28.0, 14.0),))]]
    look = find_looks(items, rows, TINY)
    assert look is not None
    told = tokens - 1  # positions behind the picture move by this
    assert look.row.tolist() == [0] * 5 + [1] * 2
    assert look.position.tolist() == [told + k for k in (3, 4, 5, 6, 8, 3, 4)]
    assert look.first.tolist() == [1] * 7
    seen = [cells.nonzero()[:, 0].tolist() for cells in look.cells]
    assert seen == [[0, grid]] * 4 + [[tokens - 1]] + [[1]] * 2
    # A thing that CLIP does not see leads nobody.
    wide = Sample(Path("a.jpg"), 336, 112, ())
    outside = np.zeros((1, 112, 336), np.uint8)
    outside[0, :, :50] = 1
    alone = expand_rows([[1, IMAGE_ID, 5, ids.mask]], [[IGNORED] * 4], [0], [0], TINY, 1)
    assert find_looks([[Item(wide, TURN, masks=outside)]], alone, TINY) is None


def test_watching_changes_no_state_and_attention_learns() -> None:
    torch.manual_seed(0)
    llama = Glamm(TINY).llama.requires_grad_(True)
    tokens = TINY.clip.tokens
    masks = np.zeros((1, 112, 112), np.uint8)
    masks[0, 28:56, 28:56] = 1
    rows = expand_rows([[1, IMAGE_ID, 5, TINY.ids.mask]] * 2, [[IGNORED] * 4] * 2, [0, 1], [0, 0], TINY, 2)
    look = find_looks([[Item(SAMPLE, TURN, masks=masks)]] * 2, rows, TINY)
    assert look is not None
    embeds = torch.randn(2, tokens + 3, TINY.llama.emb)
    plain = llama(embeds, rows.valid)
    optimizer = torch.optim.Adam(llama.layers.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        with watched(llama, look) as kept:
            states = llama(embeds, rows.valid)
        if step == 0:
            torch.testing.assert_close(states, plain)
            even = int(look.cells[0].sum()) / (tokens + 2)  # random attention is about even
            assert abs(float(kept[0].detach().mean()) - even) < 0.5 * even
        loss = looking_loss(kept)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert "forward" not in vars(llama.layers[1].self_attn)
