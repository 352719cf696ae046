"""The command line: what it prints and writes, its exit codes, and one line for every mistake."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deixis import bundle as b
from deixis.cli import checks, main, parts, tasks
from deixis.errors import DeadlineError
from deixis.overlay import save_image

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"
ON_CPU = ("--bundle", TINY, "--device", "cpu")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "table.png"
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    save_image(path, cv2.resize(noise, (160, 120)))
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may spoil."""
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def run(capsys: Captured, *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys: Captured, code: int, message: str, *arguments: object) -> None:
    found, out, err = run(capsys, *arguments)
    assert err.startswith("deixis: error: ") and err.count("\n") == 1, err
    assert message in err and found == code and out == ""


def test_caption(capsys: Captured, picture: str, tmp_path: Path) -> None:
    result, drawn = tmp_path / "r.json", tmp_path / "o.png"
    code, out, err = run(capsys, "caption", picture, *ON_CPU, "--json", result, "--overlay", drawn)
    assert code == 0 and err == ""
    values = json.loads(result.read_text())
    assert values["command"] == "caption" and values["device"] == "cpu"
    assert (values["width"], values["height"]) == (160, 120)
    [caption] = values["results"]
    assert out.splitlines()[0] == caption["text"]
    assert len(out.splitlines()) == 1 + len(caption["words"])
    assert cv2.imread(str(drawn)).shape[1] >= 480
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.png", "r.json"]


def test_json_on_standard_output_is_all_there_is(capsys: Captured, picture: str) -> None:
    code, out, err = run(capsys, "refer", picture, "w1 w2", "w3", "--bundle", TINY, "--json", "-")
    assert code == 0 and err == ""
    first, second = json.loads(out)["results"]
    assert first["text"] == "w1 w2" and second["mask"]["size"] == [120, 160]


def test_stream_gives_the_words_of_the_caption(capsys: Captured, picture: str) -> None:
    _, plain, _ = run(capsys, "caption", picture, "--bundle", TINY)
    code, streamed, _ = run(capsys, "caption", picture, "--bundle", TINY, "--stream")
    assert code == 0 and streamed.split() == plain.splitlines()[0].split()


def test_region_captions_and_options(capsys: Captured, picture: str, tmp_path: Path) -> None:
    boxes = ("--box", "10,10,60,60", "--box", "0,0,160,120")
    limits = ("--beams", 2, "--max-new-tokens", 3, "--threads", 1, "--device", "cpu", "--deadline-ms", "60000")
    drawn = tmp_path / "o.jpg"
    code, out, _ = run(capsys, "caption", picture, *boxes, *limits, "--bundle", TINY, "--json", "-", "--overlay", drawn)
    results = json.loads(out)["results"]
    assert code == 0 and [r["box"] for r in results] == [[10, 10, 60, 60], [0, 0, 160, 120]]
    assert all(len(r["ids"]) <= 3 for r in results) and drawn.is_file()


@pytest.mark.parametrize("prompt", [("--box", "10,10,60,60"), ("--point", "30,40", "--point", "80,20,0")])
def test_segment(capsys: Captured, picture: str, tmp_path: Path, prompt: tuple[str, ...]) -> None:
    drawn = tmp_path / "o.png"
    code, out, _ = run(capsys, "segment", picture, *prompt, "--bundle", TINY, "--overlay", drawn)
    assert code == 0 and out.startswith("segment: box") and "score" in out and drawn.is_file()


def test_trace(capsys: Captured, picture: str) -> None:
    code, out, _ = run(capsys, "trace", picture, "w1 w2 w3", "--bundle", TINY, "--json", "-")
    assert code == 0 and [w["text"] for w in json.loads(out)["results"][0]["words"]] == ["w1", "w2", "w3"]


def test_boxes_only(capsys: Captured, picture: str) -> None:
    code, out, _ = run(capsys, "refer", picture, "w1", "--no-mask", "--bundle", TINY)
    assert code == 0 and "mask" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("dance",), "invalid choice"),
        (("caption",), "IMAGE"),
        (("refer", "p.png"), "PHRASE"),
        (("trace", "p.png"), "TEXT"),
        (("caption", "p.png", "--device", "tpu"), "invalid choice: 'tpu'"),
        (("caption", "p.png", "--box", "1,2,3"), "'1,2,3' is not four numbers"),
        (("caption", "p.png", "--box", "1,2,3,nan"), "is not four numbers"),
        (("caption", "p.png", "--box", "a,b,c,d"), "is not four numbers"),
        (("segment", "p.png", "--point", "1"), "is not x,y"),
        (("segment", "p.png", "--point", "1,2,7"), "label must be 1"),
        (("caption", "p.png", "--beams", "0"), "whole number from 1"),
        (("caption", "p.png", "--max-new-tokens", "many"), "whole number from 1"),
        (("caption", "p.png", "--threads", "-1"), "--threads"),
        (("caption", "p.png", "--deadline-ms", "-1"), "--deadline-ms"),
        (("caption", "p.png", "--colour", "red"), "unrecognized arguments"),
        (("segment", "p.png"), "give --box or --point"),
        (("segment", "p.png", "--box", "1,1,2,2", "--point", "1,1"), "not both"),
        (("caption", "p.png", "--stream", "--json", "-"), "choose one"),
    ],
)
def test_bad_use(capsys: Captured, arguments: tuple[str, ...], message: str) -> None:
    fails(capsys, 2, message, *arguments)


@pytest.mark.parametrize(
    ("box", "message"),
    [("50,50,50,60", "no area"), ("60,60,50,50", "no area"), ("500,500,600,600", "outside the picture")],
)
def test_boxes_that_make_no_sense(capsys: Captured, picture: str, box: str, message: str) -> None:
    for command in ("caption", "segment"):
        fails(capsys, 2, message, command, picture, "--bundle", TINY, "--box", box)


def test_text_that_is_too_long(capsys: Captured, picture: str) -> None:
    for command in ("trace", "refer"):
        fails(capsys, 2, "shorten it", command, picture, "w1 " * 200, "--bundle", TINY)


def test_pictures_that_cannot_be_used(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("nowhere.png", "No such file"), ("empty.png", "empty"), ("text.png", "not a picture")):
        fails(capsys, 1, message, "caption", tmp_path / name, "--bundle", TINY)


def test_one_pixel(capsys: Captured, tmp_path: Path) -> None:
    save_image(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    drawn = tmp_path / "o.png"
    for command in (("caption",), ("refer", "w1"), ("segment", "--box", "0,0,1,1"), ("trace", "w1")):
        extra = command[1:]
        code, _, err = run(capsys, command[0], tmp_path / "dot.png", *extra, "--bundle", TINY, "--overlay", drawn)
        assert code == 0, err


def test_bundles_that_cannot_be_used(capsys: Captured, picture: str, tiny: Path) -> None:
    fails(capsys, 1, "no bundle", "caption", picture, "--bundle", tiny / "nowhere")
    fails(capsys, 1, "no bundle named 'nowhere'", "inspect", "nowhere")
    (tiny / "tokenizer" / "tokenizer.json").write_text("{}")
    for arguments in (("caption", picture, "--bundle", tiny), ("verify", tiny)):
        fails(capsys, 1, "tokenizer/tokenizer.json has 2 bytes", *arguments)
    (tiny / "manifest.json").write_text("{")
    fails(capsys, 1, "not a manifest", "inspect", tiny)


def test_device_that_is_not_there(capsys: Captured, picture: str) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    fails(capsys, 1, 'pip install "deixis[gpu]"', "caption", picture, "--bundle", TINY, "--device", "cuda")
    fails(capsys, 1, "tensorrt", "verify", TINY, "--device", "tensorrt")


def test_output_that_cannot_be_written(capsys: Captured, picture: str, tmp_path: Path) -> None:
    base = ("caption", picture, "--bundle", TINY)
    fails(capsys, 1, "there is no folder", *base, "--json", tmp_path / "no" / "r.json")
    fails(capsys, 1, "it is a folder", *base, "--json", tmp_path)
    fails(capsys, 1, "there is no folder", *base, "--overlay", tmp_path / "no" / "o.png")
    fails(capsys, 1, "unknown picture type", *base, "--overlay", tmp_path / "o.txt")
    assert list(tmp_path.iterdir()) == []


def test_full_disk(capsys: Captured, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    fails(capsys, 1, "No space left", "caption", picture, "--bundle", TINY, "--overlay", tmp_path / "o.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", [("caption",), ("refer", "w1"), ("trace", "w1"), ("segment", "--box", "1,1,9,9")])
def test_deadline(capsys: Captured, picture: str, task: tuple[str, ...]) -> None:
    command, *asked = task
    fails(capsys, 1, "deadline of 0 ms passed", command, picture, *asked, "--bundle", TINY, "--deadline-ms", "0")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (DeadlineError("two\nlines"), 1, "two lines"),
        (ZeroDivisionError("x"), 1, "ZeroDivisionError: x (run again with --debug"),
        (PermissionError(13, "Permission denied", "file"), 1, "file: Permission denied"),
    ],
)
def test_errors_from_inside(
    capsys: Captured, picture: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def broken(options: object) -> None:
        raise error

    monkeypatch.setattr(tasks, "load", broken)
    fails(capsys, code, message, "caption", picture)
    if isinstance(error, ZeroDivisionError):
        _, _, err = run(capsys, "caption", picture, "--debug")
        assert "Traceback" in err and err.splitlines()[-1].startswith("deixis: error: ")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="POSIX pipes")
def test_reader_that_has_gone() -> None:
    command = [sys.executable, "-m", "deixis.cli", "inspect", str(TINY), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment())
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141 and errors == b""


def child_environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(b.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }


def test_help_and_version(capsys: Captured) -> None:
    for arguments in (("--help",), ("caption", "--help"), ("--version",)):
        code, out, err = run(capsys, *arguments)
        assert code == 0 and out and not err


def test_inspect(capsys: Captured) -> None:
    code, out, _ = run(capsys, "inspect", TINY)
    manifest = b.open_bundle(TINY).manifest
    assert code == 0 and all(role in out for role in manifest.graphs) and all(task in out for task in manifest.tasks)
    code, out, _ = run(capsys, "inspect", TINY, "--json")
    assert code == 0 and b.parse_manifest(out.encode()) == manifest


def test_verify(capsys: Captured, tmp_path: Path) -> None:
    report = tmp_path / "v.json"
    code, out, _ = run(capsys, "verify", TINY, "--device", "cpu", "--json", report)
    values = json.loads(report.read_text())
    assert code == 0 and values["ok"] and all(row["ok"] for row in values["comparisons"])
    assert {row["role"] for row in values["comparisons"]} == set(b.open_bundle(TINY).manifest.graphs)
    assert f"{len(values['comparisons'])} of {len(values['comparisons'])} outputs agree on cpu" in out


def change_golden(root: Path, change: Any) -> None:
    """Alter the golden vectors and make the manifest agree: what a differently computing machine looks like."""
    path = root / b.open_bundle(root).manifest.golden
    with np.load(path) as stored:
        arrays = dict(stored)
    change(arrays)
    np.savez_compressed(path, **arrays)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][path.relative_to(root).as_posix()] = {"sha256": b.sha256_of(path), "bytes": path.stat().st_size}
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_verify_finds_a_difference(capsys: Captured, tiny: Path, wrong: float) -> None:
    def change(arrays: dict[str, Any]) -> None:
        arrays["decoder_step/out/logits"] = arrays["decoder_step/out/logits"] * np.float32(wrong)

    change_golden(tiny, change)
    code, out, err = run(capsys, "verify", tiny)
    assert code == 1 and err == ""
    [line] = [line for line in out.splitlines() if "FAILED" in line]
    assert line.startswith("decoder_step logits")


@pytest.mark.parametrize(("wrong", "expected"), [(1.0, 0), (1.001, 1)])
def test_verify_with_every_third_value(capsys: Captured, tiny: Path, wrong: float, expected: int) -> None:
    def change(arrays: dict[str, Any]) -> None:
        logits = arrays.pop("decoder_step/out/logits")
        arrays["decoder_step/out[::3]/logits"] = logits.ravel()[::3] * np.float32(wrong)

    change_golden(tiny, change)
    code, out, _ = run(capsys, "verify", tiny)
    assert code == expected and "decoder_step logits" in out


def test_verify_with_unusable_vectors(capsys: Captured, tiny: Path) -> None:
    change_golden(tiny, lambda arrays: arrays.pop("decoder_step/in/ids"))
    fails(capsys, 1, "graph decoder_step: inputs ['ids'] missing", "verify", tiny)
    change_golden(tiny, lambda arrays: arrays.clear())
    code, _, err = run(capsys, "verify", tiny)
    assert code == 1 and "vectors for none of its graphs" in err


def test_relative_error() -> None:
    assert checks.relative_error(np.array([1.0, 2.5]), np.array([1.0, -2.0])) == pytest.approx(2.25)
    assert checks.relative_error(np.zeros(3), np.zeros(3)) == 0
    assert checks.relative_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert checks.relative_error(np.zeros(3), np.zeros(4)) == float("inf")
    assert checks.relative_error(np.array([np.nan]), np.zeros(1)) == float("inf")


def test_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "DEFAULT_BUNDLE", str(TINY))
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and "numpy" in out and "onnxruntime" in out
    assert next(line for line in out.splitlines() if line.startswith("device cpu")).endswith("works")


class Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def test_demo(capsys: Captured, picture: str, tmp_path: Path) -> None:
    shutil.copy(picture, tmp_path / "a&b<.png")  # names are escaped on the page
    asked = {
        "file": "a&b<.png",
        "refer": ["w1", "w2"],
        "boxes": [[10, 10, 90, 90]],
        "points": [[30, 40], [50, 60, 1]],
        "trace": "w1 w2",
    }
    (tmp_path / "prompts.json").write_text(json.dumps([asked, {"file": "a&b<.png"}]))
    folder = tmp_path / "out" / "demo"
    code, out, err = run(capsys, "demo", "--bundle", TINY, "--pictures", tmp_path, "--out", folder)
    assert code == 0, err
    values = json.loads((folder / "results.json").read_text())
    tasks_done = [record["task"] for record in values["pictures"]]
    assert len(tasks_done) == 8 and len(set(tasks_done)) == 6
    names = {record["picture"] for record in values["pictures"]}
    assert {p.name for p in folder.iterdir()} == names | {"results.json", "index.html", "contact_sheet.jpg"}
    page = Links()
    page.feed((folder / "index.html").read_text())
    assert names <= set(page.found) and all((folder / link).is_file() for link in page.found)
    assert "8 pictures" in out


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "[1]", '[{"file": "../x.png"}]', '[{"refer": []}]', '[{"file": "a.png", "boxes": [[1, 2]]}]'],
)
def test_demo_with_unusable_prompts(capsys: Captured, tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts.json").write_text(text)
    fails(capsys, 1, "prompts.json", "demo", "--bundle", TINY, "--pictures", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_demo_without_pictures(capsys: Captured, tmp_path: Path) -> None:
    fails(
        capsys,
        1,
        "prompts.json: No such file",
        "demo",
        "--bundle",
        TINY,
        "--pictures",
        tmp_path,
        "--out",
        tmp_path / "o",
    )


@pytest.mark.parametrize(("command", "extra"), sorted(parts.EXTRAS.items()))
def test_part_that_is_not_installed(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, command: str, extra: str
) -> None:
    monkeypatch.setattr(parts.metadata, "entry_points", lambda group: ())
    fails(capsys, 2, f'pip install "deixis[{extra}]"', command, "anything", "--x")


def greet(arguments: list[str]) -> int:
    print("hello", *arguments)
    return 3


def test_parts_add_commands(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        metadata.EntryPoint("greet", f"{__name__}:greet", parts.GROUP),
        metadata.EntryPoint("export", "no_such_package:main", parts.GROUP),
    ]
    monkeypatch.setattr(parts.metadata, "entry_points", lambda group: entries)
    assert run(capsys, "greet", "a", "--b", "--debug") == (3, "hello a --b\n", "")
    fails(capsys, 2, "cannot start (No module named 'no_such_package')", "export")
