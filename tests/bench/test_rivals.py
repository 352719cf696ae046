"""Competitors in processes of their own: the worker's protocol, taking turns, comparing outputs, what cannot run."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deixis_bench.rivals import __main__ as command
from deixis_bench.rivals import run_rivals
from deixis_bench.rivals.contract import Answer, Loaded, RivalError, Spec, Stopwatch
from deixis_bench.rivals.registry import RIVALS, Entry, choose
from deixis_bench.rivals.worker import serve

IDS = list(range(100, 120))
NEW = 8

# Times are what each says of itself, so that ratios are exact; every run is noted in a common file.
FAKE = """
import os, sys
import numpy as np
from deixis_bench.rivals.contract import Answer, Loaded, Stopwatch

SECONDS = {"deixis": 0.002, "slow": 0.004, "wrong": 0.001, "dies": 0.001}
IDS = list(range(100, 120))

def load(spec):
    print("a library says hello on stdout")
    os.write(1, b"and so does one in C\\n")
    if spec.name == "absent":
        import no_such_runtime
    runs = 0
    def run():
        nonlocal runs
        runs += 1
        if spec.name == "dies" and runs == 3:
            os._exit(3)
        with (spec.work.parent / "turns.txt").open("a") as turns:
            print(spec.name, spec.precision, file=turns)
        watch = Stopwatch()
        watch.seconds = SECONDS[spec.name] * (1 + runs % 2)
        if spec.part == "encoder":
            with np.load(spec.folder / "reference.npz") as arrays:
                sam = arrays["sam"]
            return Answer(watch, outputs={"sam": sam + (1.0 if spec.name == "wrong" else 0.0)})
        tokens = IDS[: spec.new_tokens + 1]
        if spec.name == "wrong" or spec.precision == "int8":
            tokens[3] = 7
        return Answer(watch, tokens)
    return Loaded("1.2", run, f"{spec.threads} threads, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
"""


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`run_rivals` on fake competitors, with weights that are already there."""
    (tmp_path / "fake_rival.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for part in ("text", "encoder"):
        weights = tmp_path / "work" / f"{part}-tiny" / "weights"
        weights.mkdir(parents=True)
        (weights / "rivals.json").write_text(json.dumps({"prompt": [3, 4], "ids": IDS}), encoding="utf-8")
        np.savez(weights / "reference.npz", sam=np.arange(12.0))
    parts = {"text": ("fp32", "int8"), "encoder": ("fp32",)}
    fakes = {name: Entry("fake_rival", parts) for name in ("deixis", "slow", "wrong", "dies", "absent")}
    return functools.partial(
        run_rivals,
        rounds=3,
        threads=2,
        new_tokens=NEW,
        work=tmp_path / "work",
        size="tiny",
        rivals=fakes,
        pause_s=0.0,
    )


def test_competitors_take_turns_and_ratios_are_those_of_a_round(
    campaign: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    own, slow = campaign(["slow"], "text")
    assert (own["name"], slow["name"]) == ("deixis", "slow")
    # The fakes' odd and even runs differ by a factor of two, which a ratio within a round does not see.
    assert slow["ratio_to_deixis"] == {"median": 2.0, "least": 2.0, "most": 2.0}
    assert slow["against"] == "deixis fp32" and slow["part"] == "text fp32" and slow["version"] == "1.2"
    assert slow["ms_per_token"]["count"] == 3
    assert slow["ms_per_token"]["least"] == pytest.approx(0.004 * 1e3 / NEW)
    assert slow["ms_per_token"]["p50"] == pytest.approx(0.004 * 1e3 / NEW)
    assert own["same_output"] is True and slow["same_output"] is True
    assert "2 threads, OMP_NUM_THREADS=2" in slow["note"]
    turns = (tmp_path / "work" / "text-tiny" / "turns.txt").read_text(encoding="utf-8").split("\n")[:-1]
    rounds = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    assert len(rounds) == 4  # the first is the warm-up
    assert all(sorted(each) == ["deixis fp32", "slow fp32"] for each in rounds)
    assert len({each[0] for each in rounds[1:]}) == 2  # who goes first changes


def test_other_ids_are_wrong_in_fp32_and_only_said_in_a_lower_precision(
    campaign: Callable[..., list[dict[str, Any]]],
) -> None:
    found = {(e["name"], e["part"]): e for e in campaign(["wrong", "slow:int8"], "text", rounds=1)}
    assert found["wrong", "text fp32"]["same_output"] is False
    lower = found["slow", "text int8"]
    assert lower["same_output"] is None
    assert "first 3 of 9 ids" in lower["note"]
    assert lower["against"] == "deixis int8"


def test_encoders_are_compared_by_their_arrays(campaign: Callable[..., list[dict[str, Any]]]) -> None:
    found = {e["name"]: e for e in campaign(["slow", "wrong"], "encoder", rounds=1)}
    assert found["slow"]["same_output"] is True and "p50" in found["slow"]["ms"]
    assert found["wrong"]["same_output"] is False


def test_what_cannot_run_is_one_line_and_the_others_go_on(campaign: Callable[..., list[dict[str, Any]]]) -> None:
    found = {e["name"]: e for e in campaign(["absent", "dies", "slow"], "text")}
    assert "no_such_runtime" in found["absent"]["error"] and "\n" not in found["absent"]["error"]
    assert found["absent"]["ratio_to_deixis"] is None and found["absent"]["same_output"] is None
    assert "process ended" in found["dies"]["error"]
    assert found["slow"]["ratio_to_deixis"]["median"] == 2.0


def test_the_command_fails_on_a_wrong_output_and_writes_what_it_found(
    campaign: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keywords = {name: campaign.keywords[name] for name in ("rivals", "pause_s")}  # type: ignore[attr-defined]
    monkeypatch.setattr(command, "run_rivals", functools.partial(run_rivals, **keywords))
    report = tmp_path / "report.json"
    given = ["--rounds", "1", "--new-tokens", str(NEW), "--size", "tiny", "--work", str(tmp_path / "work")]
    assert command.main([*given, "--names", "wrong", "--json", str(report)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    written = json.loads(report.read_text(encoding="utf-8"))
    assert [entry["same_output"] for entry in written["rivals"]] == [True, False]
    assert command.main([*given, "--names", "slow", "absent"]) == 0
    assert "not measured: ModuleNotFoundError" in capsys.readouterr().out
    assert command.main([*given, "--names", "nobody"]) == 2
    assert "no rival 'nobody'" in capsys.readouterr().err
    assert command.main([*given, "--names", "slow", "--new-tokens", "100000"]) == 2


def _spec(folder: Path) -> Spec:
    return Spec("fake", "encoder", "fp32", folder, folder, 1, NEW)


def _serve(load: Callable[[], Loaded], folder: Path, runs: int) -> tuple[int, list[dict[str, Any]]]:
    requests = io.StringIO("".join(json.dumps({"run": n}) + "\n" for n in range(runs)))
    answers = io.StringIO()
    code = serve(load, _spec(folder), requests, answers)
    return code, [json.loads(line) for line in answers.getvalue().splitlines()]


def test_worker_answers_each_line_and_writes_arrays(tmp_path: Path) -> None:
    arrays = iter([np.zeros(3), np.ones(3)])
    loaded = Loaded("1.2", lambda: Answer(Stopwatch(), outputs={"sam": next(arrays)}), "a note")
    code, [ready, *answers] = _serve(lambda: loaded, tmp_path, 2)
    assert code == 0 and len(answers) == 2
    assert ready.pop("load_s") >= 0
    assert ready == {"ready": True, "version": "1.2", "note": "a note"}
    with np.load(answers[1]["outputs"]) as second:
        np.testing.assert_array_equal(second["sam"], np.ones(3))


def test_worker_says_in_one_line_why_it_cannot_load_or_run(tmp_path: Path) -> None:
    def refuse() -> Loaded:
        raise RivalError("no such kernel\nhere")

    code, lines = _serve(refuse, tmp_path, 1)
    assert code == 1 and lines == [{"error": "no such kernel here"}]

    def broken() -> Answer:
        raise ValueError("bad shape")

    code, lines = _serve(lambda: Loaded("1", broken), tmp_path, 2)
    assert code == 1 and lines[1:] == [{"error": "ValueError: bad shape"}]


def test_ours_is_there_for_every_precision_that_is_compared() -> None:
    chosen = [(each.name, each.precision) for each in choose(["ctranslate2:all", "openvino:bf16"], "text")]
    assert chosen[:2] == [("deixis", "fp32"), ("deixis", "w8")]
    assert set(chosen[2:]) == {("ctranslate2", "fp32"), ("ctranslate2", "int8"), ("openvino", "bf16")}
    own = [each.precision for each in choose(["deixis:int8", "ctranslate2:int8"], "text") if each.name == "deixis"]
    assert own == ["int8"]
    everybody = choose(["all"], "llama")
    assert {each.name for each in everybody} == {name for name, entry in RIVALS.items() if "llama" in entry.parts}
    with pytest.raises(ValueError, match="in fp32, int8, not in 'bf16'"):
        choose(["ctranslate2:bf16"], "text")
    with pytest.raises(ValueError, match="no rival 'ctranslate2' for part 'encoder'"):
        choose(["ctranslate2"], "encoder")


PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "optimum-onnx": "optimum.onnxruntime",
    "ctranslate2": "ctranslate2",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
    "onnxruntime-genai": "onnxruntime_genai",
}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(PACKAGES[name]) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.slow  # makes weights, exports, and starts each runtime: some minutes
@pytest.mark.parametrize("part", ["text", "llama", "encoder"])
def test_real_competitors_give_the_same_at_tiny_sizes(part: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    names = [name for name, entry in RIVALS.items() if part in entry.parts and name in PACKAGES and _installed(name)]
    missing = [name for name in PACKAGES if part in RIVALS[name].parts and name not in names]
    found = run_rivals(names, part, rounds=1, threads=1, new_tokens=12, work=tmp_path, size="tiny")
    failed = {entry["name"]: entry["error"] for entry in found if "error" in entry}
    assert not failed
    assert {entry["name"]: entry["same_output"] for entry in found} == dict.fromkeys(("deixis", *names), True)
    if missing:
        pytest.skip(f"all others agree; not installed: {', '.join(missing)}")
