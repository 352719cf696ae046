"""The report that every measurement writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import deixis
from deixis_bench.report import finish

MODEL = SimpleNamespace(info=SimpleNamespace(name="tiny", device="cpu", bundle=Path("/some/where/tiny_bundle")))


def test_a_report_is_json_of_four_parts_and_leaves_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    out.write_text("an older report", encoding="utf-8")
    finish({"P@0.5": 0.25}, {"scenes": 3}, MODEL, out)  # type: ignore[arg-type]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert list(report) == ["metrics", "data", "bundle", "machine"]
    assert report["metrics"] == {"P@0.5": 0.25} and report["data"] == {"scenes": 3}
    assert report["bundle"] == {"name": "tiny", "device": "cpu", "path": "tiny_bundle"}
    assert report["machine"]["deixis"] == deixis.__version__ and report["machine"]["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert printed == [["P@0.5", "0.2500"], ["scenes", "3"]]


def test_an_interrupted_report_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.json"
    out.write_text("an older report", encoding="utf-8")

    def stopped(_self: Path, _target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        finish({"P@0.5": 0.25}, {}, MODEL, out)  # type: ignore[arg-type]
    assert out.read_text(encoding="utf-8") == "an older report"


def test_a_report_may_stay_unwritten(capsys: pytest.CaptureFixture[str]) -> None:
    finish({"mean IoU": 1.0}, {}, MODEL, None)  # type: ignore[arg-type]
    assert capsys.readouterr().out.split() == ["mean", "IoU", "1.0000"]
