"""Dense captioning in the parity command: every array of its golden files is compared, and damage is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import golden_copies
import numpy as np
import pytest
from golden_copies import edit, silent

from deixis_export.parity import __main__ as parity
from deixis_export.parity.cases_boxes import CASES, in_order_of
from deixis_export.parity.registry import matching
from deixis_export.parity.report import Report

GOLDEN = golden_copies.GOLDEN / "pixelllm"
ARRAYS = {
    "box_decoder.npz": 29,
    "e2e_densecap_greedy.npz": 13,
    "e2e_densecap_greedy_mult.npz": 13,
    "e2e_densecap_beam_mult.npz": 10,
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A golden directory of the files of dense captioning alone."""
    shared = ("config.json", "params.npz", "preprocess.npz")
    for name in (*shared, *ARRAYS):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def compare(directory: Path) -> Report:
    return parity.compare(directory, emit=silent)


def test_every_array_agrees(copy: Path) -> None:
    lines = [line for line in compare(copy).lines if matching(line.file, CASES)]
    for file, count in ARRAYS.items():
        of_file = [line for line in lines if line.file == file]
        assert [str(line) for line in of_file if line.status != "ok"] == []
        assert len(of_file) == count, file


@pytest.mark.parametrize(
    ("parameter", "file", "array"),
    [
        ("box_decoder/fpn/simfp_3.0/kernel", "box_decoder.npz", "fpn0"),
        ("box_decoder/fpn/top_block/p7/bias", "box_decoder.npz", "fpn4"),
        ("box_decoder/proposal_generator/scales.2/scale", "box_decoder.npz", "box_reg2"),
        ("box_decoder/proposal_generator/bbox_tower/10/scale", "box_decoder.npz", "heatmap1"),
        ("box_decoder/roi_heads/box_head.0/fc1/kernel", "box_decoder.npz", "roi_class_logits"),
        ("box_decoder/roi_heads/box_head.0/fc2/kernel", "e2e_densecap_greedy.npz", "out_detection_boxes"),
        ("box_decoder/roi_heads/box_head.0/cls_score/bias", "e2e_densecap_beam_mult.npz", "out_detection_scores"),
    ],
)
def test_a_changed_parameter_fails(copy: Path, parameter: str, file: str, array: str) -> None:
    edit(copy / "params.npz", lambda arrays: arrays.update({parameter: arrays[parameter] * 1.5}))
    failed = {(line.file, line.name) for line in compare(copy).failed}
    assert (file, array) in failed


def test_peaks_may_swap_but_not_differ(copy: Path) -> None:
    def swap(arrays: dict[str, np.ndarray]) -> None:
        arrays["peak_boxes"][0, [3, 4]] = arrays["peak_boxes"][0, [4, 3]]

    edit(copy / "box_decoder.npz", swap)
    failed = {line.name for line in compare(copy).failed}
    assert "peak_boxes" not in failed

    edit(copy / "box_decoder.npz", lambda arrays: arrays["peak_boxes"].__setitem__((0, 3, 0), 500.0))
    assert "peak_boxes" in {line.name for line in compare(copy).failed}


def test_order_of_a_reference() -> None:
    boxes = np.arange(12.0).reshape(1, 3, 4)
    near = boxes[:, [2, 0, 1]] + 0.01
    np.testing.assert_array_equal(in_order_of(boxes, near), boxes[:, [2, 0, 1]])
    twice = boxes[:, [0, 0, 1]]
    np.testing.assert_array_equal(in_order_of(boxes, twice), boxes)


def test_without_a_detector_it_is_absent(copy: Path) -> None:
    def drop(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.startswith("box_decoder/")]:
            del arrays[name]

    edit(copy / "params.npz", drop)
    lines = [line for line in compare(copy).lines if matching(line.file, CASES)]
    assert {line.status for line in lines} <= {"absent", "ok", "not compared"}
    assert all(line.status == "absent" for line in lines if line.name == "out_detection_boxes")
