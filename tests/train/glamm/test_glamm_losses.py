"""Losses of GLaMM: golden values of the reference, and what the sums mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deixis.conversation import IGNORED, IMAGE_ID
from deixis_train.glamm.batches import expand_rows
from deixis_train.losses.grounding import mask_bce, mask_dice, mask_losses, predicting
from deixis_train.models.glamm.config import GLAMM_PRESETS

GOLDEN = Path(__file__).parents[2] / "golden" / "glamm"
TINY = GLAMM_PRESETS["glamm-tiny"]


def test_mask_losses_are_the_references() -> None:
    golden = np.load(GOLDEN / "mask_losses.npz")
    logits, target = (torch.from_numpy(golden[name]) for name in ("logits", "target"))
    masks = len(logits)
    assert mask_bce(logits, target).item() / masks == pytest.approx(float(golden["bce"]), abs=1e-6)
    assert mask_dice(logits, target).item() / masks == pytest.approx(float(golden["dice"]), abs=1e-6)


def test_masks_of_a_batch_weigh_the_same_whatever_picture_they_are_of() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator)
    target = (torch.rand(4, 6, 5, generator=generator) > 0.5).float()
    together = mask_losses([logits, logits[:0]], [target, target])
    apart = mask_losses([logits[:2], logits[2:]], [target[:2], target[2:]])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    nothing = mask_losses([logits[:0]], [target])
    assert [value.item() for value in nothing] == [0, 0]
    with pytest.raises(ValueError, match=r"picture 0: 3 \[SEG\]s in the text, but only 2 masks"):
        mask_losses([logits], [target[:2]])


def test_rows_take_their_own_picture_and_boxes() -> None:
    region, tokens = TINY.ids.region, TINY.clip.tokens
    ids = [[1, IMAGE_ID, region, 9], [1, 7], [1, IMAGE_ID, region, region, 5, 6]]
    labels = [[IGNORED, IGNORED, IGNORED, 9], [IGNORED, 7], [IGNORED] * 5 + [6]]
    rows = expand_rows(ids, labels, [0, 0, 1], [2, 0, 2], TINY, 2)
    assert rows.ids.shape == (3, tokens + 5)
    assert rows.valid.sum(1).tolist() == [tokens + 3, 2, tokens + 5]
    index = rows.embed_index
    assert index[0, 1 : 1 + tokens].tolist() == list(range(tokens))
    assert index[0, 1 + tokens] == 2 * tokens  # the second box of the row is not named
    assert index[1].eq(-1).all()
    assert index[2, 1 : 1 + tokens].tolist() == list(range(tokens, 2 * tokens))
    assert index[2, 1 + tokens : 3 + tokens].tolist() == [2 * tokens + 2, 2 * tokens + 3]
    assert predicting(rows.labels).nonzero().tolist() == [[0, tokens + 1], [1, 0], [2, tokens + 3]]
    with pytest.raises(ValueError, match="row 0 names 2 regions, but has 1 boxes"):
        expand_rows([[1, IMAGE_ID, region, region]], [[IGNORED] * 4], [0], [1], TINY, 1)
    with pytest.raises(ValueError, match="row 0 names the picture 2 times"):
        expand_rows([[IMAGE_ID, IMAGE_ID]], [[IGNORED] * 2], [0], [0], TINY, 1)
