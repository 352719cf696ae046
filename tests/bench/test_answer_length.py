"""What an answer costs against its length: what is measured and compared, what is written, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deixis
from deixis_bench import answer_length, answer_length_curve
from deixis_bench.answer_length import Asked, Round, figures, spread_points
from deixis_bench.dense_batch import coloured_blocks

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "tiny_glamm"
QUICK = (str(TINY), "--tokens", "9", "3", "--rounds", "1", "--device", "cpu", "--threads", "1")


@given(st.integers(1, 600), st.one_of(st.none(), st.integers(2, 700)))
def test_points_go_from_the_first_token_to_the_last(most: int, count: int | None) -> None:
    points = spread_points(most, count)
    assert points[0] == 0 and points[-1] == most - 1
    assert len(set(points)) == len(points) == min(most, count or most)
    assert np.ptp(np.diff(points)) <= 1 if len(points) > 1 else most == 1


def test_figures_are_medians_of_cumulated_seconds() -> None:
    def made(cached: float, uncached: float) -> Round:
        each = np.array([1.0, 0.5])  # on the clock, of the processor
        return Round(np.full((4, 2), cached) * each, np.full((4, 2), uncached) * each, 3 * each, 4, 4, 0.0)

    found = figures([made(1, 8), made(1, 2), made(2, 6)], 3)
    assert found["new_tokens"] == 3
    clock, processor = found["clock"], found["processor"]
    assert (clock["cached_s"], clock["cached_s_least"], clock["cached_s_most"]) == (3, 3, 6)
    assert (clock["uncached_s"], clock["uncached_s_least"], clock["uncached_s_most"]) == (18, 6, 24)
    assert (clock["ratio"], clock["ratio_least"], clock["ratio_most"]) == (3, 2, 8)
    assert clock["ratio_with_masks"] == pytest.approx((18 + 3) / (6 + 3))
    assert processor["cached_s"] == 1.5 and processor["ratio"] == 3


def test_report_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert answer_length.main([*QUICK, "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    metrics, data = report["metrics"], report["data"]
    assert [row["new_tokens"] for row in metrics["lengths"]] == [3, 9]
    assert metrics["ids_equal"] is True and metrics["states_equal"] is True
    assert metrics["ids_compared"] == 9
    assert (metrics["uncached_tokens_run"], metrics["uncached_tokens_interpolated"]) == (9, 0)
    assert metrics["curve"]["new_tokens"] == list(range(1, 10))
    assert metrics["curve"]["uncached_s"][-1] == pytest.approx(metrics["lengths"][1]["processor"]["uncached_s"])
    assert (data["image_tokens"], data["regions"], data["rounds"], data["threads"]) == (64, 1, 1, 1)
    assert "all tokens were run" in capsys.readouterr().out
    picture = tmp_path / "curve.png"
    assert answer_length_curve.main([str(path), str(path), "--out", str(picture)]) == 0
    assert deixis.load_image(picture).shape == (304, 800, 3)


def test_interpolation_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    assert answer_length.main([*QUICK, "--points", "4", "--rounds", "2", "--json", str(path)]) == 0
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    assert (metrics["uncached_tokens_run"], metrics["uncached_tokens_interpolated"]) == (4, 5)
    assert metrics["ids_compared"] == 2 * 4
    assert "4 of 9 tokens were run, the others are interpolated" in capsys.readouterr().out


def test_both_ways_do_the_work_they_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    with deixis.load(TINY, device="cpu", threads=1) as model:
        asked = Asked(model, coloured_blocks())
        looks, read = [], []
        real_look, real_read = Asked.look, Asked.read
        monkeypatch.setattr(Asked, "look", lambda self: looks.append(1) or real_look(self))
        monkeypatch.setattr(Asked, "read", lambda self, ids: read.append(len(ids)) or real_read(self, ids))
        found = answer_length.answer_once(asked, 20, [0, 10, 19])
        assert len(looks) == 4 and read == [0, 0, 10, 19]  # once for the cached answer, and for each uncached token
        assert found.compared == found.equal == 3
        seconds = found.uncached[:, 1]
        assert seconds[5] == pytest.approx((seconds[0] + seconds[10]) / 2)


@pytest.mark.parametrize("spoilt", ["state", "id"])
def test_ways_that_differ_are_a_failure(
    spoilt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Asked.read, itertools.count()

    def read(self: Asked, answer: list[int]) -> tuple:
        session, logits, state = real(self, answer)
        if answer and next(calls):
            logits, state = (-logits, state) if spoilt == "id" else (logits, state * np.float32(1.01))
        return session, logits, state

    monkeypatch.setattr(Asked, "read", read)
    assert answer_length.main(list(QUICK)) == 1
    assert ("ids: NOT the same" if spoilt == "id" else "apart, NOT the same") in capsys.readouterr().out


def test_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert answer_length.main([*arguments, "--device", "cpu"]) == 1
        return capsys.readouterr().err

    assert refused(str(tmp_path / "none")).startswith("answer_length: error: no bundle at")
    assert "family 'pixelllm', not glamm" in refused(str(GOLDEN / "tiny_bundle"))
    assert "choose --tokens up to" in refused(str(TINY), "--tokens", "9999")
    for arguments in (["--tokens", "0"], ["--rounds", "0"], ["--points", "1"]):
        with pytest.raises(SystemExit):
            answer_length.main([str(TINY), *arguments])
    (tmp_path / "other.json").write_text('{"metrics": {}}', encoding="utf-8")
    out = ["--out", str(tmp_path / "curve.png")]
    assert answer_length_curve.main([str(tmp_path / "other.json"), *out]) == 1
    assert "other.json: not a report of answer_length" in capsys.readouterr().err
