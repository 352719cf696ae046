"""The measurement of batched captions: what it compares, what it writes, and that it fails when texts differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deixis
from deixis_bench import dense_batch

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"
QUICK = (str(TINY), "--boxes", "3", "--repeats", "1", "--device", "cpu", "--threads", "1")


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 60))
def test_boxes_lie_in_the_picture_and_differ(height: int, width: int, count: int) -> None:
    boxes = dense_batch.spread_boxes((height, width), count)
    assert len(set(boxes)) == count
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width * (1 + 1e-9) and 0 <= top < bottom <= height * (1 + 1e-9)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dense_batch.main([*QUICK, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    metrics = report["metrics"]
    assert metrics["captions_equal"] is True
    assert metrics["ratio"] == pytest.approx(metrics["batch_s"] / metrics["one_by_one_s"])
    assert report["data"] == {"boxes": 3, "repeats": 1, "threads": 1, "picture": "coloured blocks"}
    assert "ratio" in capsys.readouterr().out


def test_captions_that_differ_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = deixis.Model.caption_batch

    def spoilt(self: deixis.Model, items: list, options: deixis.DecodeOptions | None = None) -> list[deixis.Caption]:
        found = real(self, items, options)
        return found if len(items) == 1 else [dataclasses.replace(caption, ids=(7, 7, 7)) for caption in found]

    monkeypatch.setattr(deixis.Model, "caption_batch", spoilt)
    assert dense_batch.main(list(QUICK)) == 1
    assert "captions_equal               False" in capsys.readouterr().out


def test_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dense_batch.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("dense_batch: error: no bundle at")
    with pytest.raises(SystemExit):
        dense_batch.main([str(TINY), "--boxes", "0"])
