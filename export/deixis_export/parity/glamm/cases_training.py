"""Comparisons of training: losses, masks and gradients of a batch. They are about PyTorch alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deixis_export.parity.glamm.backend import as_floats
from deixis_export.parity.glamm.context import GlammContext
from deixis_export.parity.report import CHAIN_TOLERANCE, EXACT, Absent, Array, GoldenFile, Report
from deixis_train.glamm.batches import GlammBatch, expand_rows
from deixis_train.glamm.forward import BCE_WEIGHT, CE_WEIGHT, DICE_WEIGHT, GlammOutcome, total_loss, training_outcome
from deixis_train.loaders.glamm_names import glamm_names
from deixis_train.losses.grounding import mask_bce, mask_dice, mask_losses

Case = Callable[[GlammContext, GoldenFile, Report], None]

FORWARD = "train_forward.npz"
NORM_TOLERANCE = 2e-3
NORM_FLOOR = 0.05  # smaller norms are sums in which nearly everything cancels


def train_forward(context: GlammContext, file: GoldenFile, report: Report) -> None:
    @lru_cache(maxsize=1)
    def outcome() -> GlammOutcome:
        with torch.no_grad():
            return training_outcome(context.model, grounded_batch(context, file))

    _check_losses(file, report, outcome)
    for name in sorted(file):
        if match := re.fullmatch(r"pred_masks(\d+)_stride(\d+)", name):
            picture, step = int(match[1]), int(match[2])
            masks = lambda p=picture, s=step: outcome().masks[p][:, ::s, ::s].numpy()  # noqa: E731
            report.check(file, name, masks, CHAIN_TOLERANCE)
        elif match := re.fullmatch(r"pred_counts(\d+)", name):
            report.check(file, name, lambda p=int(match[1]): np.array(outcome().masks[p].shape), EXACT)
        elif match := re.fullmatch(r"resize(\d+)", name):
            valid = lambda p=int(match[1]): np.array(context.nth(p).valid)  # noqa: E731
            report.check(file, name, context.torch_only(valid), EXACT)


def train_forward_region(context: GlammContext, file: GoldenFile, report: Report) -> None:
    @lru_cache(maxsize=1)
    def outcome() -> GlammOutcome:
        count = len(file["input_ids"])
        boxes = [as_floats(file[f"boxes{number}"]) for number in range(count)]
        with torch.no_grad():
            return training_outcome(context.model, _batch(context, file, list(range(count)), boxes))

    _check_losses(file, report, outcome)


def _check_losses(file: GoldenFile, report: Report, outcome: Callable[[], GlammOutcome]) -> None:
    """The file gives the terms with their weights; those of masks are 0 where no masks are learned."""

    def weighted(weight: float, term: Callable[[GlammOutcome], Tensor | None]) -> Callable[[], Array]:
        def run() -> Array:
            value = term(outcome())
            return np.float32(0.0 if value is None else weight * float(value))  # type: ignore[return-value]

        return run

    report.check(file, "loss_ce_loss", weighted(CE_WEIGHT, lambda o: o.ce))
    report.check(file, "loss_mask_bce_loss", weighted(BCE_WEIGHT, lambda o: o.bce))
    report.check(file, "loss_mask_dice_loss", weighted(DICE_WEIGHT, lambda o: o.dice))

    def masks(o: GlammOutcome) -> Tensor | None:
        return None if o.bce is None or o.dice is None else BCE_WEIGHT * o.bce + DICE_WEIGHT * o.dice

    report.check(file, "loss_mask_loss", weighted(1.0, masks))
    report.check(file, "loss_loss", weighted(1.0, total_loss))


def grounded_batch(context: GlammContext, file: GoldenFile) -> GlammBatch:
    """The batch of a file with masks: picture i owns the conversations from offset[i] on."""
    owners = np.repeat(np.arange(len(file["offset"]) - 1), np.diff(file["offset"]))
    batch = _batch(context, file, [int(i) for i in owners], None)
    pictures = [context.nth(number) for number in range(int(owners.max()) + 1)]
    batch.grounding_images = as_floats(np.stack([picture.image for picture in pictures]))
    batch.valid_hw = as_floats(np.array([picture.valid for picture in pictures]))
    batch.masks = [as_floats(file[f"gt_masks{number}"]) for number in range(len(pictures))]
    return batch


def _batch(
    context: GlammContext, file: GoldenFile, owners: Sequence[int], boxes: Sequence[Tensor] | None
) -> GlammBatch:
    """Conversations without their padding; `owners`: the picture of each."""
    valid = file["attention_mask"] > 0
    ids, labels = (
        [[int(i) for i in row[keep]] for row, keep in zip(file[name], valid, strict=True)]
        for name in ("input_ids", "labels")
    )
    count = max(owners) + 1
    images = [context.nth(number).global_image for number in range(count)]
    counts = [len(own) for own in boxes] if boxes is not None else [0] * len(ids)
    rows = expand_rows(ids, labels, owners, counts, context.model.config, count)
    places = [owner for owner, number in zip(owners, counts, strict=True) for _ in range(number)]
    return GlammBatch(
        rows,
        torch.tensor(list(owners)),
        global_images=as_floats(np.stack(images)),
        boxes=None if boxes is None else torch.cat(list(boxes)),
        box_picture=None if boxes is None else torch.tensor(places),
    )


def gradient_norms(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """CLIP and the grounding encoder are frozen, everything else learns."""

    @lru_cache(maxsize=1)
    def norms() -> dict[str, float]:
        model = context.model
        trained: list[tuple[str, Tensor]] = []
        published = glamm_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("clip.", "sam_encoder.")))
            trained.append((published.get(name, name), parameter))
        try:
            model.zero_grad(set_to_none=True)
            total_loss(training_outcome(model, grounded_batch(context, context.open(FORWARD)))).backward()
            return {name: float(p.grad.norm()) for name, p in trained if p.grad is not None}
        finally:
            model.zero_grad(set_to_none=True)
            model.requires_grad_(False)

    def norm(name: str) -> Array:
        found = norms()
        if name not in found:
            raise Absent("no gradient")
        return np.float64(found[name])  # type: ignore[return-value]

    for name in file:
        report.check(file, name, lambda n=name: norm(n), NORM_TOLERANCE, view=lambda value: value + NORM_FLOOR)


def masks(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """Helpers on logits of several masks: each is summed and divided by their number, as for one picture."""

    def mean(function: Callable[[Tensor, Tensor], Tensor]) -> Array:
        logits, target = as_floats(file["logits"]), as_floats(file["target"])
        return (function(logits, target) / (len(logits) + 1e-8)).numpy()

    def of_picture(index: int) -> Array:
        return mask_losses([as_floats(file["logits"])], [as_floats(file["target"])])[index].numpy()

    for number, (name, function) in enumerate((("bce", mask_bce), ("dice", mask_dice))):
        report.check(file, name, context.torch_only(lambda f=function: mean(f)))
        report.check(file, name, context.torch_only(lambda n=number: of_picture(n)), label=" (of a picture)")


CASES: dict[str, Case] = {
    FORWARD: train_forward,
    "train_forward_region.npz": train_forward_region,
    "train_grad_norms.json": gradient_norms,
    "mask_losses.npz": masks,
}
