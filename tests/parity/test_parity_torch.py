"""The parity command on the golden vectors in the repository, and on damaged and incomplete copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import golden_copies
import numpy as np
import pytest
from golden_copies import edit, silent, statuses

from deixis_export.parity.__main__ import compare, main
from deixis_export.parity.report import Report

GOLDEN = golden_copies.GOLDEN / "pixelllm"

# Fewest arrays that each covered file must contribute.
LEAST = {
    "preprocess.npz": 5,
    "resize.npz": 7,
    "eva02.npz": 6,
    "sam.npz": 5,
    "features.npz": 1,
    "prompt_encoder.npz": 8,
    "prompt_adapter.npz": 2,
    "visual_projection.npz": 1,
    "t5.npz": 12,
    "bert_text.npz": 6,
    "point_predictor.npz": 11,
    "mask_decoder.npz": 5,
    "decode_table.npz": 10,
    "e2e_caption_beam3.npz": 12,
    "e2e_caption_beam3_ctx.npz": 13,
    "e2e_caption_beam4_pnb2.npz": 13,
    "e2e_caption_greedy.npz": 12,
    "e2e_caption_greedy_ctx.npz": 13,
    "e2e_pointprompt_greedy.npz": 12,
    "e2e_loca_greedy.npz": 10,
    "e2e_referring.npz": 11,
    "e2e_trace_teacher_forced.npz": 9,
    "box_decoder.npz": 29,
    "e2e_densecap_beam_mult.npz": 10,
    "e2e_densecap_greedy.npz": 13,
    "e2e_densecap_greedy_mult.npz": 13,
    "losses.npz": 16,
    "lbm.npz": 42,
    "metrics.npz": 87,
    "data_prep.npz": 11,
}


@pytest.fixture(scope="module")
def report() -> Report:
    return compare(GOLDEN, emit=silent)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden", copy_function=shutil.copyfile))


def test_everything_agrees(report: Report) -> None:
    assert [str(line) for line in report.failed] == []
    # Far inside the tolerances of 1e-4 and 2e-3.
    assert max(line.error or 0.0 for line in report.compared) < 2e-5


@pytest.mark.parametrize(("file", "least"), LEAST.items())
def test_every_covered_file_contributes(report: Report, file: str, least: int) -> None:
    assert statuses(report, file)["ok"] >= least
    assert not statuses(report, file)["absent"]


def test_what_is_not_compared_is_said(report: Report) -> None:
    assert not [line for line in report.lines if line.status in ("not covered yet", "unknown file")]
    left = {(line.file, line.name) for line in report.lines if line.status == "not compared"}
    # Point grids that no configuration uses.
    assert left == {("prompt_encoder.npz", "grid_side3_offset"), ("prompt_encoder.npz", "grid_donut4")}


def test_command(capsys: pytest.CaptureFixture[str], report: Report) -> None:
    assert main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report.lines) + 1
    assert lines[-1].startswith(f"parity torch: {len(report.compared)} arrays, 0 failed, worst ")
    assert lines[2].split()[:2] == ["preprocess.npz", "git_input_sub7"]
    assert lines[2].endswith(" 1e-04 ok")


@pytest.mark.parametrize(
    ("parameter", "file"),
    [
        ("git_backbone/blocks.1/attn/q_bias", "eva02.npz"),
        ("sam_backbone/blocks.1/attn/rel_pos_h", "sam.npz"),
        ("prompt_encoder/no_mask_embed.weight", "e2e_caption_greedy.npz"),
        ("textual/t5_module/decoder/layers_1/encoder_decoder_attention/value/kernel_right_lora", "t5.npz"),
        ("textual/t5_module/decoder/logits_dense/kernel", "e2e_caption_beam3.npz"),
        ("point_predictor/mlp/layers.3/bias", "e2e_trace_teacher_forced.npz"),
        ("mask_adapter/alpha_output.weight", "e2e_referring.npz"),
    ],
)
def test_a_corrupted_parameter_fails(copy: Path, parameter: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def corrupt(arrays: dict[str, np.ndarray]) -> None:
        arrays[parameter] = arrays[parameter][::-1].copy() if arrays[parameter].ndim == 1 else arrays[parameter] * 1.5

    edit(copy / "params.npz", corrupt)
    assert main([str(copy)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith(file) and line.endswith("FAIL") for line in out)
    assert " 0 failed" not in out[-1]


def test_a_wrong_golden_value_fails(copy: Path) -> None:
    def corrupt(arrays: dict[str, np.ndarray]) -> None:
        arrays["out_text_tokens"][0, 0, 1] += 1
        arrays["out_log_probs"][0, 0] = np.nan

    edit(copy / "e2e_caption_greedy.npz", corrupt)
    failed = {(line.file, line.name) for line in compare(copy, emit=silent).failed}
    assert failed == {("e2e_caption_greedy.npz", name) for name in ("out_text_tokens", "out_log_probs")}


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("losses.npz", "text_logits"),
        ("lbm.npz", "case3/pred"),
        ("metrics.npz", "ln/trace_xyt"),
        ("data_prep.npz", "case1/bbox"),
        ("bert_text.npz", "params/transformer/encoder/layer.1/attention/self/value/kernel"),
    ],
)
def test_a_corrupted_input_of_a_loss_or_metric_fails(copy: Path, file: str, array: str) -> None:
    edit(copy / file, lambda arrays: arrays.__setitem__(array, arrays[array][::-1] * 0.7))
    assert statuses(compare(copy, emit=silent), file)["FAIL"] > 0


def test_fewer_pictures_prompts_and_another_length(copy: Path) -> None:
    """Shapes come from the arrays: a directory with one picture and one prompt per picture is as good."""

    def one_picture(arrays: dict[str, np.ndarray]) -> None:
        for name in arrays:
            if name != "small_size":
                arrays[name] = arrays[name][1:]

    def one_prompt(arrays: dict[str, np.ndarray]) -> None:
        for name in arrays:
            arrays[name] = arrays[name][1:, :1]

    edit(copy / "preprocess.npz", one_picture)
    for file in ("eva02.npz", "sam.npz", "features.npz"):
        edit(copy / file, one_picture)
    for path in copy.glob("e2e_*.npz"):
        edit(path, one_picture if "densecap" in path.name else one_prompt)
    report = compare(copy, emit=silent)
    assert [str(line) for line in report.failed] == []
    assert all(statuses(report, file)["ok"] >= least for file, least in LEAST.items())


def test_what_a_directory_lacks_is_absent(copy: Path) -> None:
    (copy / "sam.npz").unlink()
    (copy / "e2e_loca_greedy.npz").unlink()
    shutil.copyfile(copy / "resize.npz", copy / "surprise.npz")
    edit(copy / "mask_decoder.npz", lambda arrays: arrays.pop("visual"))
    edit(copy / "t5.npz", lambda arrays: arrays.pop("logits_noctx"))
    report = compare(copy, emit=silent)
    assert [str(line) for line in report.failed] == []
    found = {(line.file, line.name, line.status) for line in report.lines}
    assert {
        ("sam.npz", "*", "absent"),
        ("e2e_loca_*.npz", "*", "absent"),
        ("mask_decoder.npz", "adapted", "absent"),
        ("mask_decoder.npz", "masks_single", "ok"),
        ("t5.npz", "logits_noctx", "absent"),
        ("surprise.npz", "*", "unknown file"),
    } <= found


def test_without_pictures_or_parameters(copy: Path) -> None:
    (copy / "preprocess.npz").unlink()
    report = compare(copy, emit=silent)
    assert not report.failed
    assert statuses(report, "eva02.npz") == {"absent": 6}
    assert statuses(report, "t5.npz")["ok"] == 12
    (copy / "params.npz").unlink()
    report = compare(copy, emit=silent)
    assert not report.failed
    assert not report.compared


def test_without_the_optional_parts(copy: Path) -> None:
    def drop(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if name.startswith(("mask_adapter/", "mask_decoder/"))]:
            del arrays[name]

    edit(copy / "params.npz", drop)
    (copy / "e2e_referring.npz").unlink()
    report = compare(copy, emit=silent)
    assert not report.failed
    assert statuses(report, "mask_decoder.npz")["absent"] == 5
    assert not statuses(report, "mask_decoder.npz")["ok"]


def bad_json(directory: Path) -> None:
    (directory / "config.json").write_text("{", encoding="utf-8")


def config_without_text(directory: Path) -> None:
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del values["t5"]
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")


def parameter_missing(directory: Path) -> None:
    edit(directory / "params.npz", lambda arrays: arrays.pop("git_backbone/cls_token"))


def parameter_misshapen(directory: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["git_backbone/cls_token"] = arrays["git_backbone/cls_token"][..., :-1]

    edit(directory / "params.npz", change)


def truncated(directory: Path) -> None:
    path = directory / "params.npz"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        (shutil.rmtree, 2, "no such directory"),
        (lambda directory: (directory / "config.json").unlink(), 2, "has neither config.json nor manifest.json"),
        (bad_json, 2, "config.json: not the sizes of a PixelLLM"),
        (config_without_text, 2, "lacks t5"),
        (parameter_missing, 1, "1 missing (git_backbone/cls_token)"),
        (parameter_misshapen, 1, "1 misshapen (git_backbone/cls_token"),
        (truncated, 1, "params.npz"),
    ],
)
def test_bad_use_is_one_line(
    copy: Path, damage: Callable[[Path], None], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main([str(copy)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert said in captured.err


def test_a_damaged_file_fails(copy: Path) -> None:
    (copy / "t5.npz").write_bytes((copy / "t5.npz").read_bytes()[:2000])
    failed = compare(copy, emit=silent).failed
    assert [(line.file, line.name) for line in failed] == [("t5.npz", "*")]


def test_unknown_option_is_bad_use() -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(GOLDEN), "--through", "magic"])
    assert stopped.value.code == 2
