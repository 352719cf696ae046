"""Losses against what the reference computed."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from deixis_train.losses.detection import centernet_losses, centernet_targets, flatten_levels
from deixis_train.losses.mask import mask_loss
from deixis_train.losses.point import PointLoss, point_loss
from deixis_train.losses.text import text_loss

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "pixelllm"


def read(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return read("losses.npz")


def test_text(golden: dict[str, Tensor]) -> None:
    logits, ids = golden["text_logits"], golden["text_gt"]
    torch.testing.assert_close(text_loss(logits, ids, valid=golden["text_mask"]), golden["text_loss"])
    torch.testing.assert_close(text_loss(logits, ids), golden["text_loss_nomask"])
    rows = text_loss(logits.flatten(0, 1), ids.flatten(0, 1), valid=golden["text_mask"].flatten())
    torch.testing.assert_close(rows, golden["text_loss"])


@pytest.mark.parametrize("kind", get_args(PointLoss))
def test_points(golden: dict[str, Tensor], kind: PointLoss) -> None:
    loss = point_loss(
        golden["point_pred"], golden["point_gt"], golden["point_pred_valid"], golden["point_gt_valid"], kind
    )
    torch.testing.assert_close(loss, golden[f"point_{kind}"])


def test_masks(golden: dict[str, Tensor]) -> None:
    valid = golden["mask_gt_valid"]
    real = golden["mask_padding"][:, None].expand(*valid.shape, -1, -1)
    losses = mask_loss(
        golden["mask_pred"].flatten(0, 1),
        golden["mask_iou_pred"].flatten(0, 1),
        golden["mask_gt"][..., 0].flatten(0, 1),
        valid.flatten(),
        real.flatten(0, 1),
    )
    torch.testing.assert_close(losses.focal, golden["out_mask_focal_loss"])
    torch.testing.assert_close(losses.dice, golden["out_mask_dice_loss"])
    torch.testing.assert_close(losses.iou, golden["out_mask_iou_pred_loss"])
    torch.testing.assert_close(losses.total, golden["out_mask_loss"])


def test_centernet(golden: dict[str, Tensor]) -> None:
    maps = read("box_decoder.npz")
    sizes = [(maps[f"heatmap{level}"].shape[1], maps[f"heatmap{level}"].shape[2]) for level in range(5)]
    targets = centernet_targets(golden["cn_gt_boxes"], sizes)
    torch.testing.assert_close(targets.heatmap, golden["cn_gt_heatmap"][..., 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.regression, golden["cn_gt_reg"])

    heatmap, regression = (
        flatten_levels([maps[f"{name}{level}"].permute(0, 3, 1, 2) for level in range(5)])
        for name in ("heatmap", "box_reg")
    )
    losses = centernet_losses(heatmap[..., 0], regression, targets)
    torch.testing.assert_close(losses.regression, golden["cn_reg_loss"])
    torch.testing.assert_close(losses.regression_norm, golden["cn_reg_norm"])
    torch.testing.assert_close(losses.positive, golden["cn_pos_loss"])
    torch.testing.assert_close(losses.negative, golden["cn_neg_loss"])
    torch.testing.assert_close(losses.heatmap_norm, golden["cn_hm_norm"])
    expected = 0.5 * (golden["cn_pos_loss"] + golden["cn_neg_loss"]) + golden["cn_reg_loss"]
    torch.testing.assert_close(losses.total, expected)
