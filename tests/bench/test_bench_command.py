"""`deixis bench` on the tiny bundles: what a report holds, that its numbers belong together, and how it fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deixis
from deixis_bench.bench import cli, random_preset, roofline
from deixis_bench.bench.forced import NEVER
from deixis_bench.bench.requests import MASKS, REFER_TOKENS
from deixis_bench.bench.rounds import PROMPT, STEP, Subject
from deixis_bench.bench.settings import Settings

GOLDEN = Path(__file__).parents[1] / "golden"
TINY, GLAMM = GOLDEN / "tiny_bundle", GOLDEN / "tiny_glamm"
ROUNDS, TOKENS = 2, 6
WARM = ("--threads", "1", "--rounds", str(ROUNDS), "--warmup", "0", "--new-tokens", str(TOKENS), "--cold", "0")
SETTINGS = Settings("cpu", threads=1, prompt_tokens=3, new_tokens=TOKENS, rounds=ROUNDS, warmup_rounds=0, cold=0)


@pytest.fixture(scope="module", autouse=True)
def small_roofline() -> Iterator[None]:
    """A roofline that takes no time; its numbers are not looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "buffer_bytes", lambda: 1 << 20)
        patch.setattr(roofline.measure, "__defaults__", (1, (64,)))
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    assert cli.main([str(TINY), "--device", "cpu", *WARM, "--cold", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny() -> Iterator[Subject]:
    subject = Subject(TINY, SETTINGS)
    subject.open()
    yield subject
    subject.close()


@pytest.fixture(scope="module")
def glamm() -> Iterator[Subject]:
    subject = Subject(GLAMM, SETTINGS)
    subject.open()
    yield subject
    subject.close()


def test_a_report_says_what_it_is_about(report: dict[str, Any]) -> None:
    assert (report["format"], report["version"]) == ("deixis-bench", 1)
    assert report["bundle"]["name"] == "tiny" and report["bundle"]["family"] == "pixelllm"
    assert report["settings"]["threads"] == 1 and report["settings"]["new_tokens"] == TOKENS
    assert report["settings"]["rounds"] == ROUNDS and report["settings"]["device"] == "cpu"
    assert report["machine"]["cores"] >= 1 and report["machine"]["packages"]["numpy"] == np.__version__
    assert report["roofline"]["read_gb_s"] > 0 and set(report["roofline"]["gflop_s"]) == {"fp32", "int8"}
    assert report["rivals"] == [] and report["notes"] == []


def test_every_graph_is_a_stage_with_its_costs(report: dict[str, Any]) -> None:
    stages = {stage["name"]: stage for stage in report["stages"]}
    graphs = {name for name, stage in stages.items() if stage["kind"] == "graph"}
    assert graphs == set(report["bundle"]["precision"])
    others = {"caption_again", "region_caption", "refer", "trace", "segment"}
    assert set(stages) - graphs == {"preprocess", "postprocess", "python", *(f"postprocess {task}" for task in others)}
    assert stages["postprocess"]["request"] == "caption" and stages["postprocess refer"]["request"] == "refer"
    # the last token is consumed for its place
    assert stages["decoder_step"]["calls"] == TOKENS + 1
    assert stages["decoder_step"]["warm_ms"]["count"] == (TOKENS + 1) * ROUNDS
    assert stages["sam_encoder"]["calls"] == 1 and stages["mask_decoder"]["request"] == "refer"
    limits = report["roofline"]
    for name in graphs:
        stage = stages[name]
        seconds = stage["warm_ms"]["p50"] / 1000
        assert stage["bandwidth_share"] == pytest.approx(stage["bytes_read"] / seconds / limits["read_gb_s"] / 1e9)
        assert stage["arithmetic_share"] == pytest.approx(stage["flop"] / seconds / limits["gflop_s"]["fp32"] / 1e9)
        assert stage["cold_ms"] > 0 and stage["flop"] > 0
    assert stages["python"]["bytes_read"] is None and stages["python"]["bandwidth_share"] is None


def test_weight_bytes_are_those_of_the_files(report: dict[str, Any]) -> None:
    manifest = deixis.open_bundle(TINY, verify_hashes=False).manifest
    stages = {stage["name"]: stage for stage in report["stages"]}
    for role, graph in manifest.graphs.items():
        files = sum(manifest.files[name].bytes for name in (graph.file, *graph.external))
        stored = report["bundle"]["weight_bytes"][role]
        assert stored == stages[role]["weight_bytes"] and 0.3 * files < stored < files
        # stored as fp16 and read as fp32; a little stays fp32, and a little is folded
        assert stored < stages[role]["bytes_read"] < 2.2 * stored


def test_the_decoder_step_reads_its_matrices_once(report: dict[str, Any]) -> None:
    """Against a count of its own: the parameters of all matrices that are multiplied, four bytes each."""
    model = onnx.load(str(TINY / "graphs" / "decoder_step.onnx"), load_external_data=False)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    looked_up = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    matrices = sum(size for name, size in sizes.items() if name not in looked_up)
    [stage] = [stage for stage in report["stages"] if stage["name"] == "decoder_step"]
    assert 4 * matrices <= stage["bytes_read"] <= 4 * matrices * 1.1 + 4096
    assert 2 * matrices <= stage["flop"] <= 2 * matrices * 1.5  # with attention over few positions


def test_requests_are_those_of_the_bundle(report: dict[str, Any]) -> None:
    rows = {row["task"]: row for row in report["requests"]}
    assert list(rows) == ["caption", "encode", "caption_again", "region_caption", "refer", "trace", "segment"]
    for name in ("caption", "caption_again", "region_caption"):
        row = rows[name]
        assert row["new_tokens"] == TOKENS and row["warm_ms"]["count"] == ROUNDS
        assert row["per_token_ms"]["count"] == (TOKENS - 1) * ROUNDS
        assert row["tokens_per_s"] == pytest.approx(1000 / row["per_token_ms"]["p50"])
        assert row["first_token_ms"]["most"] < row["warm_ms"]["most"]
        assert 0 < row["python_us_per_step"] < row["per_token_ms"]["most"] * 1000
    assert rows["encode"]["images_per_s"] == pytest.approx(1000 / rows["encode"]["warm_ms"]["p50"])
    assert rows["refer"]["first_token_ms"] is None and rows["refer"]["given_tokens"] == 8
    assert rows["segment"]["images_per_s"] is None
    assert all(row["cold_ms"] > 0 and row["processor_ms"]["count"] == ROUNDS for row in rows.values())


def test_memory_and_metrics(report: dict[str, Any]) -> None:
    memory, start = report["memory"], report["cold_start"]
    assert 0 < memory["before_mb"] < memory["after_first_mb"] <= memory["peak_first_mb"] <= memory["peak_mb"]
    total = sum(report["bundle"]["weight_bytes"].values()) / (1 << 20)
    assert memory["weight_mb"] == pytest.approx(total) and 0 < memory["first_weight_mb"] < total
    assert start["count"] == 1 and start["import_ms"] + start["load_ms"] < start["first_result_ms"]
    metrics = report["metrics"]
    assert metrics["caption/warm_ms/p50"] == report["requests"][0]["warm_ms"]["p50"]
    [step] = [stage for stage in report["stages"] if stage["name"] == "decoder_step"]
    assert metrics["decoder_step/bandwidth_share"] == step["bandwidth_share"]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("which", ["tiny", "glamm"])
def test_stages_of_a_request_are_the_whole_of_it(which: str, request: pytest.FixtureRequest) -> None:
    subject: Subject = request.getfixturevalue(which)
    for one in subject.requests:
        run = subject.run(one)
        stages = run.stages()
        assert not run.loads()  # all have run before
        assert sum(sum(values) for values in stages.values()) == pytest.approx(run.seconds, rel=1e-6, abs=1e-6), (
            one.task
        )
        assert all(value >= 0 for values in stages.values() for value in values), one.task
        assert len(run.marks) == one.tokens and list(run.marks) == sorted(run.marks)
        assert ("preprocess" in stages) == one.from_picture
        graphs = set(stages) - {"preprocess", "postprocess", "python", PROMPT}
        encoders = {
            role for role in graphs if role.endswith("_encoder") and role not in ("text_encoder", "region_encoder")
        }
        assert bool(encoders) == one.from_picture, one.task
        assert (PROMPT in stages) == (which == "glamm" and one.tokens > 0)


def test_texts_have_the_length_that_was_asked_for(tiny: Subject, glamm: Subject) -> None:
    for subject in (tiny, glamm):
        for one in subject.requests:
            assert subject.model is not None
            made = one.run(subject.model.encode([np.zeros((40, 60, 3), np.uint8)]))
            ids = [getattr(result, "ids", None) for result in made.results]
            if one.tokens and subject is tiny:
                assert [len(own) for own in ids if own is not None] == [TOKENS]
            assert len(made.marks) == one.tokens and NEVER not in [i for own in ids if own for i in own]
    [grounded] = [one for one in glamm.requests if one.task == "grounded_caption"]
    [answer] = grounded.run([]).results
    assert len(answer.masks) == MASKS and len(answer.ids) == TOKENS
    [refer] = [one for one in glamm.requests if one.task == "refer"]
    assert refer.tokens == min(REFER_TOKENS, TOKENS) and refer.given == 3


def test_glamm_reads_its_prompt_once(glamm: Subject) -> None:
    [grounded] = [one for one in glamm.requests if one.task == "grounded_caption"]
    stages = glamm.run(grounded).stages()
    assert len(stages[PROMPT]) == 1 and len(stages[STEP]) == TOKENS - 1
    assert len(stages["pixel_decoder"]) == len(stages["grounding_encoder"]) == 1


def test_rows_of_a_batch_run_together(capsys: pytest.CaptureFixture[str]) -> None:
    subject = Subject(TINY, Settings("cpu", threads=1, batch=2, prompt_tokens=3, new_tokens=4))
    subject.open()
    run = subject.run(subject.requests[0])
    subject.close()
    assert len(run.stages()["sam_encoder"]) == 1 and len(run.stages()["decoder_step"]) == 5


def test_two_bundles_are_compared_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[Any] = []
    real = Subject.run

    def noted(self: Subject, request: Any, joules: Any = None) -> Any:
        order.append((self.opened.path.name, request.task))
        return real(self, request, joules)

    path = tmp_path / "both.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "run", noted)
        assert cli.main(["--compare", str(TINY), str(GLAMM), "--device", "cpu", *WARM, "--json", str(path)]) == 0
    names = [name for name, _ in order]
    assert names.index("tiny_glamm") < len(names) - names[::-1].index("tiny_bundle") - 1  # not one behind the other
    both = json.loads(path.read_text(encoding="utf-8"))
    assert both["first"]["memory"] is None and both["first"]["cold_start"] is None  # --cold 0
    metrics = [both[which]["metrics"] for which in ("first", "second")]
    name = "region_caption/warm_ms/p50"
    assert both["ratios"][name] == pytest.approx(metrics[1][name] / metrics[0][name])
    assert both["changed"]["bundle.family"] == ["pixelllm", "glamm"]
    printed = capsys.readouterr().out
    assert name in printed and "only in the second: " in printed


def test_graphs_one_at_a_time_when_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exported(preset: str, precision: str, seed: int, folder: Path) -> None:
        assert (preset, precision, seed) == ("tiny", "fp16", 0)
        folder.symlink_to(TINY)

    big = {"decoder_pass"}  # pretend that one graph does not fit even alone
    monkeypatch.setattr(random_preset, "export", exported)
    monkeypatch.setattr(random_preset, "fits", lambda bundle: False)
    real = random_preset.weights_in_memory
    monkeypatch.setattr(
        random_preset, "weights_in_memory", lambda bundle, role: 1 << 60 if role in big else real(bundle, role)
    )
    path = tmp_path / "report.json"
    arguments = ["--random", "tiny", "--precision", "fp16", "--device", "cpu", "--work", str(tmp_path), *WARM]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["preset"] == "tiny" and report["requests"] == []
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert set(stages) == set(report["bundle"]["precision"]) - big
    assert all(stage["warm_ms"]["count"] == ROUNDS and stage["flop"] > 0 for stage in stages.values())
    assert any(note.startswith("decoder_pass: left out: its weights take") for note in report["notes"])


@pytest.mark.slow
def test_a_preset_is_exported_and_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["--random", "tiny", "--precision", "w8", "--device", "cpu", "--work", str(tmp_path), *WARM]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["preset"] == "tiny" and report["bundle"]["source"].startswith("random weights, preset tiny")
    assert report["bundle"]["precision"]["decoder_step"] == "w8"
    [step] = [stage for stage in report["stages"] if stage["name"] == "decoder_step"]
    assert step["bytes_read"] <= step["weight_bytes"]  # blocks are read as they are stored
    assert (tmp_path / "tiny-w8-0").is_dir()


def test_memory_decides_how_a_preset_is_run() -> None:
    bundle = deixis.open_bundle(TINY, verify_hashes=False)
    needed = sum(random_preset.weights_in_memory(bundle, role) for role in bundle.manifest.graphs)
    files = sum(bundle.manifest.files[g.file].bytes for g in bundle.manifest.graphs.values())
    assert needed > 2 * files  # fp16 is widened, and both decoders hold the file they share
    assert random_preset.fits(bundle, int(needed / random_preset.FREE) + 1)
    assert not random_preset.fits(bundle, int(needed / random_preset.FREE) - 1)


def test_a_failed_export_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def failed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", "deixis_export"] and "--random" in command
        return subprocess.CompletedProcess(command, 1, "", "noise\ndeixis export: error: unknown preset 'x'\n")

    monkeypatch.setattr(random_preset.subprocess, "run", failed)
    assert cli.main(["--random", "x"]) == 1
    said = capsys.readouterr().err
    assert said == "deixis bench: error: the export of 'x' failed: unknown preset 'x'\n"


def test_page_and_rivals_get_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    campaign, page = types.ModuleType("campaign"), types.ModuleType("page")
    lost = {"name": "third", "part": "text", "error": "not installed", "ms": None, "ratio_to_deixis": None}
    row = {"name": "other", "part": "decoder_step", "ms": {"p50": 2.0}, "ratio_to_deixis": {"median": 2.0}}

    def run_rivals(names: list[str], part: str, rounds: int, threads: int, new_tokens: int, work: Path) -> list[Any]:
        given["rivals"] = (names, part, rounds, threads, new_tokens, work)
        return [row, lost]

    campaign.run_rivals = run_rivals  # type: ignore[attr-defined]
    page.write_page = lambda report, path: given.update(page=(report["rivals"], path))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deixis_bench.rivals.campaign", campaign)
    monkeypatch.setitem(sys.modules, "deixis_bench.page", page)
    monkeypatch.setattr("deixis_bench.bench.measure.measure", lambda *_: [_empty_report()])
    html = tmp_path / "report.html"
    assert (
        cli.main(
            ["tiny", *WARM, "--rivals", "other", "--part", "encoder", "--work", str(tmp_path), "--html", str(html)]
        )
        == 0
    )
    assert given["rivals"] == (["other"], "encoder", ROUNDS, 1, TOKENS, tmp_path)
    assert given["page"] == ([row, lost], html)
    assert "rival third (text): not measured: not installed" in capsys.readouterr().out


def _empty_report() -> dict[str, Any]:
    return {
        "bundle": {"name": "tiny", "family": "pixelllm", "precision": {}},
        "settings": {"device": "cpu", "threads": 1, "batch": 1, "new_tokens": TOKENS, "rounds": ROUNDS},
        "machine": {"cpu": "?", "cores": 1, "load": 0.0},
        "roofline": {"threads": 1, "read_gb_s": None, "gflop_s": {"fp32": None, "int8": None}},
        "stages": [], "requests": [], "memory": None, "cold_start": None, "energy": None, "rivals": [], "notes": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at/all"], "no bundle"),
        ([str(TINY), "--new-tokens", "400"], "400 new tokens are too many: the bundle's caches hold 56"),
        (["--compare", str(TINY / "manifest.json"), str(TINY / "manifest.json")], "not a report of 'deixis bench'"),
        (["--compare", str(TINY), str(TINY / "manifest.json")], "not one of each"),
        ([str(TINY), "--rivals", "nobody"], "--rivals: no rival 'nobody'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("deixis bench: error: ") and said in line


@pytest.mark.parametrize(
    "arguments",
    [[], [str(TINY), "--random", "tiny"], [str(TINY), "--rounds", "0"], [str(TINY), "--json", "no/such/folder/a.json"],
     ["--compare", "a", "b", "--html", "c.html"]],
)  # fmt: skip
def test_bad_use_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("deixis bench: error: ")


def test_a_fresh_process_that_fails_is_one_line(tmp_path: Path) -> None:
    from deixis_bench.bench import cold

    with pytest.raises(deixis.DeixisError, match=r"^the fresh process failed: .*no bundle"):
        cold.start(tmp_path / "none", SETTINGS)
