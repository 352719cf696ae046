"""The training forward of GLaMM: losses, masks and gradients of the reference."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deixis_train.glamm.batches import GlammBatch, expand_rows
from deixis_train.glamm.forward import teacher_forced_masks, total_loss, training_outcome
from deixis_train.loaders.glamm_names import config_from_golden, glamm_names, load_glamm_state
from deixis_train.models.glamm.glamm import Glamm

GOLDEN = Path(__file__).parents[2] / "golden" / "glamm"


@lru_cache(maxsize=1)
def golden_model() -> Glamm:
    manifest = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
    model = Glamm(config_from_golden(manifest))
    with np.load(GOLDEN / "state_dict.npz") as stored:
        tensors = {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    load_glamm_state(model, tensors).raise_if_incomplete("golden")
    return model.eval()


def batch_of(name: str, pictures: list[int], rows_of: list[int], boxes: list[Tensor] | None = None) -> GlammBatch:
    """The batch of a golden file: `rows_of` are the pictures' places in the batch, row by row."""
    golden, pre = np.load(GOLDEN / name), np.load(GOLDEN / "preprocess.npz")
    config = golden_model().config
    valid = golden["attention_mask"] if "attention_mask" in golden else np.ones_like(golden["input_ids"], bool)
    ids = [list(map(int, row[keep])) for row, keep in zip(golden["input_ids"], valid, strict=True)]
    labels = (
        [list(map(int, row[keep])) for row, keep in zip(golden["labels"], valid, strict=True)]
        if ("labels" in golden)
        else ids
    )
    counts = [len(b) for b in boxes] if boxes else [0] * len(ids)
    rows = expand_rows(ids, labels, rows_of, counts, config, len(pictures))
    side = config.image_size
    grounding = np.zeros((len(pictures), side, side, 3), np.uint8)
    for place, picture in enumerate(pictures):
        resized = pre[f"sam{picture}_resized_uint8"]
        grounding[place, : resized.shape[0], : resized.shape[1]] = resized
    return GlammBatch(
        rows,
        torch.tensor(rows_of),
        global_images=torch.from_numpy(np.stack([pre[f"clip{i}_resized_cropped_uint8"] for i in pictures])),
        boxes=torch.cat(boxes) if boxes else None,
        box_picture=torch.tensor([p for p, b in zip(rows_of, boxes, strict=True) for _ in b]) if boxes else None,
        grounding_images=torch.from_numpy(grounding),
        valid_hw=torch.tensor(np.stack([pre[f"sam{i}_resize_hw"] for i in pictures])).float(),
    )


def close(ours: Tensor | None, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    assert ours is not None
    torch.testing.assert_close(ours.detach(), torch.from_numpy(np.asarray(theirs)), rtol=0, atol=tolerance)


def test_losses_masks_and_gradients_are_the_references() -> None:
    golden = np.load(GOLDEN / "train_forward.npz")
    model = golden_model().requires_grad_(True)
    model.clip.requires_grad_(False)
    model.sam_encoder.requires_grad_(False)
    batch = batch_of("train_forward.npz", [0, 1], [0, 0, 1])
    batch.masks = [torch.from_numpy(golden[f"gt_masks{i}"]) for i in range(2)]
    outcome = training_outcome(model, batch)
    close(outcome.ce, golden["loss_ce_loss"])
    assert outcome.bce is not None and outcome.dice is not None
    close(2.0 * outcome.bce, golden["loss_mask_bce_loss"])
    close(0.5 * outcome.dice, golden["loss_mask_dice_loss"])
    loss = total_loss(outcome)
    close(loss, golden["loss_loss"])
    for number, masks in enumerate(outcome.masks):
        assert list(masks.shape) == golden[f"pred_counts{number}"].tolist()
        close(masks[:, ::3, ::3], golden[f"pred_masks{number}_stride3"])
    model.zero_grad()
    loss.backward()
    norms = json.loads((GOLDEN / "train_grad_norms.json").read_text(encoding="utf-8"))
    ours = {theirs: model.get_parameter(name) for name, theirs in glamm_names(model).items() if theirs in norms}
    assert ours.keys() == norms.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=2e-3, abs=1e-4), name
    known = {id(parameter) for parameter in ours.values()}
    silent = [n for n, p in model.named_parameters() if id(p) not in known and p.grad is not None and p.grad.any()]
    assert not silent  # nothing else learns in a batch without boxes
    model.zero_grad(set_to_none=True)


def test_boxes_without_masks_give_the_references_cross_entropy() -> None:
    golden = np.load(GOLDEN / "train_forward_region.npz")
    boxes = [torch.from_numpy(golden[f"boxes{i}"]) for i in range(2)]
    with torch.no_grad():
        outcome = training_outcome(golden_model(), batch_of("train_forward_region.npz", [0, 1], [0, 1], boxes))
    close(outcome.ce, golden["loss_ce_loss"])
    assert outcome.bce is None
    close(total_loss(outcome), golden["loss_loss"])


def test_teacher_forced_masks_are_the_references() -> None:
    golden = np.load(GOLDEN / "res_teacher_forced.npz")
    theirs = golden["pred_masks"]
    with torch.no_grad():
        batch = batch_of("res_teacher_forced.npz", [1], [0])
        [masks] = teacher_forced_masks(golden_model(), batch, [theirs.shape[1:]])
    close(masks, theirs)
