"""A run's curves: what is read of a log, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from deixis_train.training.curves import main, read_log


def write(path: Path, *records: dict) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_a_resumed_stage_counts_its_later_lines(tmp_path: Path) -> None:
    log = tmp_path / "text.log.jsonl"
    write(
        log,
        {"step": 25, "group": "train", "steps_per_s": 1.0, "loss": 3.0},
        {"step": 50, "group": "train", "steps_per_s": 1.0, "loss": 2.0},
        {"step": 50, "group": "train", "steps_per_s": 1.0, "loss": 2.5},
        {"step": 50, "group": "held_out", "steps_per_s": 1.0, "held_refer/P@0.5": 0.5, "broken": None},
    )
    assert read_log(log) == {
        ("train", "loss"): [(25, 3.0), (50, 2.5)],
        ("held_out", "held_refer/P@0.5"): [(50, 0.5)],
    }


def test_the_picture_has_a_row_for_every_stage(tmp_path: Path) -> None:
    heights = []
    for stages in (1, 2):
        for stage in range(stages):
            records = [
                {"step": step, "group": "train", "steps_per_s": 1.0, "loss": 3.0 / step, "refer/P@0.5": step / 100}
                for step in range(1, 60, 10)
            ]
            write(tmp_path / f"stage{stage}.log.jsonl", *records)
        picture = tmp_path / "curves.png"
        assert main([str(tmp_path), "--out", str(picture)]) == 0
        image = cv2.imread(str(picture))
        assert image is not None
        assert image.min() < 128  # something is drawn
        heights.append(image.shape[0])
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.log.jsonl").write_text('{"loss": 1}\n', encoding="utf-8")
    for folder, said in ((tmp_path, "text.log.jsonl:1: not a line"), (tmp_path / "none", "no *.log.jsonl")):
        with pytest.raises(SystemExit) as stop:
            main([str(folder), "--out", str(tmp_path / "curves.png")])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()
