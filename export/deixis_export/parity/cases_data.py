"""Comparisons of data preparation. They say nothing about a backend; the reference ran it with TensorFlow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deixis_export.parity.context import Context
from deixis_export.parity.report import EXACT, MODULE_TOLERANCE, Array, GoldenFile, Report
from deixis_train.data.preparation.alignment import align_by_rank, points_of_tokens, valid_utterances
from deixis_train.data.preparation.geometry import Placement, fit_long, fit_short, has_area, resize_bilinear
from deixis_train.data.samples import Utterance

FITTED = (384, 300)  # long sides of the table of sizes, in the order of its columns; then the shorter side is 384


def preparation(context: Context, file: GoldenFile, report: Report) -> None:
    def check(name: str, compute: Callable[[], Array], tolerance: float = MODULE_TOLERANCE) -> None:
        report.check(file, name, context.torch_only(compute), tolerance)

    for case in sorted({name.split("/")[0] for name in file if name.startswith("case")}):
        check(f"{case}/out_points", lambda case=case: _narration(file, case), EXACT)

    def sizes() -> Array:
        table = file["geometry/hw_long384_long300_short384"]
        originals = [(int(height), int(width)) for height, width in table[:, :2]]
        fitted = [[fit_long(size, side) for size in originals] for side in FITTED]
        columns = [originals, *fitted, [fit_short(size, FITTED[0]) for size in originals]]
        return np.concatenate([np.array(column) for column in columns], axis=1)

    check("geometry/hw_long384_long300_short384", sizes, EXACT)

    def resized() -> Placement:
        original, size = file["resize/in"].shape[:2], file["resize/out"].shape[:2]
        return Placement((original[0], original[1]), (size[0], size[1]), (0, 0), (size[0], size[1]))

    def cut() -> Placement:
        top, left, height, width = (int(v) for v in file["crop/region_ijhw"])
        whole = resized()
        return Placement(whole.original, whole.resized, (top, left), (height, width))

    check("resize/out", lambda: resize_bilinear(file["resize/in"].astype(np.float32), resized().resized))
    check("resize/out_size", lambda: np.array(fit_short(resized().original, min(resized().resized))), EXACT)
    for step, placement in (("resize", resized), ("crop", cut)):
        check(f"{step}/out_boxes", lambda place=placement: place().place_boxes(file["resize/in_boxes"]))
        check(f"{step}/out_points", lambda place=placement: place().place_points(file["resize/in_points"]))
    check("crop/out_labels", lambda: has_area(cut().place_boxes(file["resize/in_boxes"])).astype(np.int32), EXACT)


def _narration(file: GoldenFile, case: str) -> Array:
    """Two points per token [1, L, 2, 2] of one narration."""
    tokens = file[f"{case}/tokens"][0]
    height, width = (int(v) for v in file[f"{case}/image_hw"])
    columns = (file[f"{case}/{name}"].tolist() for name in ("utterance_nonempty", "center", "bbox"))
    utterances = [
        Utterance("words" if spoken else "", (center[0], center[1]), (box[0], box[1], box[2], box[3]))
        for spoken, center, box in zip(*columns, strict=True)
    ]
    owners = align_by_rank(int((tokens > 1).sum()), valid_utterances(utterances))
    return points_of_tokens(tokens, owners, utterances, width, height).reshape(1, -1, 2, 2)


CASES: dict[str, Callable[[Context, GoldenFile, Report], None]] = {"data_prep.npz": preparation}
