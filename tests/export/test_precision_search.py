"""The search for precisions: what it chooses for given measurements, and one small search from end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deixis.bundle import open_bundle
from deixis.errors import ExportError
from deixis_export import cli, precision_search, quality
from deixis_export.precision_search import SearchSettings, search_precisions
from deixis_export.quality import Judge, lost, points
from deixis_export.variants import interleaved

# By graph: what each precision drifts, and its time relative to fp32.
DRIFT = {
    "sam_encoder": {"int8": 0.04, "fp16": 1e-3},
    "text_encoder": {"int8": 0.3, "w8": 0.02, "w4": 0.2, "fp16": 1e-3},
    "decoder_step": {"int8": 0.03, "w8": 0.01, "w4": 0.1, "fp16": 1e-3},
}
TIME = {
    "sam_encoder": {"int8": 0.4, "fp16": 1.0},
    "text_encoder": {"int8": 0.5, "w8": 1.1, "w4": 0.8, "fp16": 1.0},
    "decoder_step": {"int8": 0.5, "w8": 0.4, "w4": 0.3, "fp16": 1.0},
}


class _Variants:
    """Measurements instead of graphs; `bundle` gives the choice in place of a bundle."""

    def __init__(self, model: object, folder: Path, seed: int) -> None:
        self.specs = dict.fromkeys(DRIFT)

    def __enter__(self) -> _Variants:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def companions(self, role: str) -> set[str]:
        return {"text_encoder", "decoder_step"} if role in ("text_encoder", "decoder_step") else {role}

    def get(self, role: str, precision: str) -> SimpleNamespace:
        return SimpleNamespace(drift=DRIFT[role][precision])

    def times(self, role: str, precisions: list[str], rounds: int, threads: int) -> dict[str, float]:
        return {name: TIME[role][name] for name in precisions}

    @contextmanager
    def bundle(self, chosen: Mapping[str, str], tokenizer_json: str, overrides: Any) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(path=dict(chosen), manifest=None)


@dataclasses.dataclass(frozen=True)
class _Judge:
    """A model that loses so many points for each lowered graph."""

    harm: Mapping[tuple[str, str], float]
    start: float = 0.80

    def __str__(self) -> str:
        return "9 pictures of test"

    def measure(self, chosen: Mapping[str, str], manifest: object) -> dict[str, float]:
        return {"P@0.5": self.start - sum(self.harm.get(item, 0.0) for item in chosen.items()) / 100}


def _search(monkeypatch: pytest.MonkeyPatch, judge: object = None, fixed: Any = None, four_bits: bool = False) -> Any:
    monkeypatch.setattr(precision_search, "Variants", _Variants)
    return search_precisions(
        None,  # type: ignore[arg-type]
        Path(),
        tokenizer_json="",
        options=precision_search.ExportOptions("fp16", precision_of=fixed or {}),
        tasks={},
        settings=SearchSettings(judge, four_bits),  # type: ignore[arg-type]
    )


def test_without_data_the_fastest_that_hardly_drifts_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, evidence = _search(monkeypatch)
    assert chosen == {"sam_encoder": "int8", "text_encoder": "fp16", "decoder_step": "w8"}
    verdicts = {trial.precision: trial.verdict for trial in evidence.trials["text_encoder"]}
    assert verdicts == {"int8": "drifts by more than 0.05", "w8": "not faster than fp32 or fp16", "fp16": "chosen"}
    assert evidence.judged_by == "drift" and not evidence.fp32


def test_a_graph_without_matrices_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRIFT, "sam_encoder", {"int8": 1e-3, "fp16": 1e-3})
    chosen, evidence = _search(monkeypatch)
    assert chosen["sam_encoder"] == "fp16"
    assert evidence.trials["sam_encoder"][0].verdict == "has no matrices to lower"


def test_runs_are_timed_in_turns() -> None:
    order: list[str] = []
    ratios = interleaved({name: partial(order.append, name) for name in ("fp32", "int8", "fp16")}, rounds=2)
    assert set(ratios) == {"int8", "fp16"} and all(value > 0 for value in ratios.values())
    assert order[:3] == ["fp32", "int8", "fp16"] and order[3] == "int8"


def test_four_bits_are_tried_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = _Judge({})
    assert _search(monkeypatch, judge)[0]["decoder_step"] == "w8"
    assert _search(monkeypatch, judge, four_bits=True)[0]["decoder_step"] == "w4"


def test_what_loses_points_alone_is_replaced_by_the_next_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, evidence = _search(monkeypatch, _Judge({("decoder_step", "w8"): 0.7, ("decoder_step", "int8"): 0.2}))
    assert chosen["decoder_step"] == "int8"
    trials = {trial.precision: trial for trial in evidence.trials["decoder_step"]}
    assert trials["w8"].verdict == "alone it loses 0.7 points of P@0.5" and trials["w8"].points == {"P@0.5": -0.7}
    assert trials["int8"].verdict == "chosen" and trials["int8"].points == {"P@0.5": -0.2}
    assert evidence.fp32 == {"P@0.5": 0.8} and evidence.chosen == {"P@0.5": pytest.approx(0.798)}


def test_losses_that_add_up_are_taken_back_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    harm = {("sam_encoder", "int8"): 0.4, ("decoder_step", "w8"): 0.3}
    chosen, evidence = _search(monkeypatch, _Judge(harm))
    assert chosen == {"sam_encoder": "fp16", "text_encoder": "fp16", "decoder_step": "w8"}
    assert "together with the others it loses 0.7 points" in evidence.trials["sam_encoder"][0].verdict
    assert evidence.chosen["P@0.5"] == pytest.approx(0.797)


def test_a_model_that_fp16_harms_stays_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    harm = {(role, name): 2.0 for role in DRIFT for name in DRIFT[role]}
    chosen, evidence = _search(monkeypatch, _Judge(harm))
    assert set(chosen.values()) == {"fp32"}
    assert not [trial for trials in evidence.trials.values() for trial in trials if trial.verdict == "chosen"]


def test_precisions_that_are_given_are_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, evidence = _search(monkeypatch, fixed={"decoder_step": "fp32"})
    assert chosen["decoder_step"] == chosen["text_encoder"] == "fp32", "they hold the same weights"
    assert set(evidence.trials) == {"sam_encoder"}
    with pytest.raises(ExportError, match=r"sam_encoder in int8 the model loses 3\.0 points of P@0\.5"):
        _search(monkeypatch, _Judge({("sam_encoder", "int8"): 3.0}), fixed={"sam_encoder": "int8"})


def test_half_a_point_is_the_limit_and_cider_may_lose_half_a_percent() -> None:
    fp32 = {"P@0.5": 0.5, "cIoU": 0.9, "caption CIDEr": 6.0}
    assert not lost({"P@0.5": 0.495, "cIoU": 0.99, "caption CIDEr": 5.97}, fp32)
    assert lost({"P@0.5": 0.4949, "cIoU": 0.9, "caption CIDEr": 5.9}, fp32) == {"P@0.5": -0.51, "caption CIDEr": -10.0}
    assert lost({"P@0.5": float("nan"), "cIoU": 0.9, "caption CIDEr": 6.0}, fp32)
    assert points({"P@0.5": 0.51}, {"P@0.5": 0.5}) == {"P@0.5": 1.0}


def test_the_judge_passes_on_why_nothing_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(tasks={"refer": None})
    judge = Judge(tmp_path, 3)
    with pytest.raises(ExportError, match="has nothing that this model can be asked about"):
        judge.tasks(manifest)  # type: ignore[arg-type]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "refer.json").write_text("{}")
    (tmp_path / "annotations" / "captions.json").write_text("{}")
    assert judge.tasks(manifest) == ["refer", "masks"]  # type: ignore[arg-type]
    failed = SimpleNamespace(returncode=1, stderr="a warning\ndeixis eval: error: no such thing\n")
    monkeypatch.setattr(quality.subprocess, "run", lambda *args, **more: failed)
    with pytest.raises(ExportError, match=r"could not be measured: no such thing$"):
        judge.measure(tmp_path, manifest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "scenes"], "belong to --precision auto"),
        (["--four-bits"], "belong to --precision auto"),
        (["--precision", "auto", "--pictures", "3"], "--pictures belongs to --data"),
    ],
)
def test_options_of_the_search_are_checked(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--preset", "tiny", "--random", "--out", "nowhere", *arguments])
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_search_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert cli.main(["--preset", "tiny", "--random", "--precision", "auto", "--threads", "1", "--out", str(out)]) == 0
    manifest = open_bundle(out).manifest
    evidence = manifest.precision_search
    assert evidence is not None and set(evidence.trials) == set(manifest.graphs)
    for role, trials in evidence.trials.items():
        taken = [trial.precision for trial in trials if trial.verdict == "chosen"] or ["fp32"]
        assert taken == [manifest.graphs[role].precision.weights]
    assert "of fp32's time" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
