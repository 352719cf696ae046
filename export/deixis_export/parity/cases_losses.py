"""Comparisons of the training losses. They run in PyTorch only: no graph holds one."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch

from deixis_export.parity.context import Context, as_floats, as_ids
from deixis_export.parity.report import MODULE_TOLERANCE, Array, GoldenFile, Report
from deixis_train.losses.detection import CenterNetTargets, centernet_losses, centernet_targets, flatten_levels
from deixis_train.losses.mask import MaskLosses, mask_loss
from deixis_train.losses.point import PointLoss, point_loss
from deixis_train.losses.text import text_loss

DETECTOR = "box_decoder.npz"  # heatmaps and regressions that the detection losses are of


def losses(context: Context, file: GoldenFile, report: Report) -> None:
    def check(name: str, compute: Callable[[], Array | torch.Tensor]) -> None:
        report.check(file, name, context.torch_only(lambda: torch.as_tensor(compute()).numpy()), MODULE_TOLERANCE)

    def text(with_mask: bool) -> torch.Tensor:
        valid = as_ids(file["text_mask"]) if with_mask else None
        return text_loss(as_floats(file["text_logits"]), as_ids(file["text_gt"]), valid=valid)

    check("text_loss", lambda: text(True))
    check("text_loss_nomask", lambda: text(False))

    def points(kind: PointLoss) -> torch.Tensor:
        pred, truth = as_floats(file["point_pred"]), as_floats(file["point_gt"])
        return point_loss(pred, truth, as_ids(file["point_pred_valid"]), as_ids(file["point_gt_valid"]), kind)

    for kind in get_args(PointLoss):
        check(f"point_{kind}", lambda kind=kind: points(kind))

    check("out_mask_focal_loss", lambda: _mask_losses(file).focal)
    check("out_mask_dice_loss", lambda: _mask_losses(file).dice)
    check("out_mask_iou_pred_loss", lambda: _mask_losses(file).iou)
    check("out_mask_loss", lambda: _mask_losses(file).total)

    def detection() -> dict[str, torch.Tensor]:
        heatmap, regression = (_levels(context, name) for name in ("heatmap", "box_reg"))
        found = centernet_losses(heatmap[..., 0], regression, _targets(context, file))
        return {
            "cn_reg_loss": found.regression,
            "cn_reg_norm": found.regression_norm,
            "cn_pos_loss": found.positive,
            "cn_neg_loss": found.negative,
            "cn_hm_norm": found.heatmap_norm,
        }

    check("cn_gt_heatmap", lambda: _targets(context, file).heatmap[..., None])
    check("cn_gt_reg", lambda: _targets(context, file).regression)
    for name in ("cn_reg_loss", "cn_reg_norm", "cn_pos_loss", "cn_neg_loss", "cn_hm_norm"):
        check(name, lambda name=name: detection()[name])


def _mask_losses(file: GoldenFile) -> MaskLosses:
    """Rows of all pictures together; the file has one padding mask per picture."""
    logits, valid = as_floats(file["mask_pred"]), as_floats(file["mask_gt_valid"])
    real = as_ids(file["mask_padding"])[:, None].expand(*valid.shape, -1, -1)
    return mask_loss(
        logits.flatten(0, 1),
        as_floats(file["mask_iou_pred"]).flatten(0, 1),
        as_ids(file["mask_gt"])[..., 0].flatten(0, 1),
        valid.flatten(),
        real.flatten(0, 1),
    )


def _maps(context: Context, name: str) -> list[torch.Tensor]:
    """The levels of `name` in the detector's file, [B, C, h, w]."""
    file = context.open(DETECTOR)
    names = [f"{name}{level}" for level in range(len(context.values["box_decoder"]["strides"]))]
    return [as_floats(file[level]).permute(0, 3, 1, 2) for level in names]


def _levels(context: Context, name: str) -> torch.Tensor:
    return flatten_levels(_maps(context, name))


def _targets(context: Context, file: GoldenFile) -> CenterNetTargets:
    sizes = [(int(level.shape[-2]), int(level.shape[-1])) for level in _maps(context, "heatmap")]
    settings = context.values["box_decoder"]
    return centernet_targets(
        as_floats(file["cn_gt_boxes"]), sizes, strides=settings["strides"], ranges=settings["fpn_range"]
    )


CASES: dict[str, Callable[[Context, GoldenFile, Report], None]] = {"losses.npz": losses}
