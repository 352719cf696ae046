"""The parity command on the golden vectors of GLaMM, through PyTorch, and on damaged and incomplete copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import golden_copies
import numpy as np
import pytest
from golden_copies import edit, silent, statuses

from deixis_export.parity.__main__ import compare, main
from deixis_export.parity.report import GoldenFile, Report
from deixis_train.loaders.glamm_names import config_from_golden

GOLDEN = golden_copies.GOLDEN / "glamm"

# Fewest arrays that each file must contribute.
LEAST = {
    "preprocess.npz": 14,
    "clip.npz": 8,
    "projector.npz": 2,
    "region_encoder.npz": 10,
    "llm_text.npz": 4,
    "splice_and_llm.npz": 10,
    "text_hidden_fcs.npz": 1,
    "sam_image_encoder.npz": 4,
    "sam_prompt_and_decoder.npz": 11,
    "e2e_generate.npz": 28,
    "train_forward.npz": 11,
    "train_forward_region.npz": 5,
    "train_grad_norms.json": 120,
    "res_teacher_forced.npz": 3,
    "mask_losses.npz": 4,
    "text.json": 35,
    "gcg_eval.json": 33,
    "res_eval.npz": 2,
}


@pytest.fixture(scope="module")
def report() -> Report:
    return compare(GOLDEN, emit=silent)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Sizes and parameters alone, to which a test adds the files that it is about."""
    for name in ("manifest.json", "state_dict.npz", "preprocess.npz"):
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def test_everything_agrees(report: Report) -> None:
    assert [str(line) for line in report.failed] == []
    assert max(line.error or 0.0 for line in report.compared if line.file != "train_grad_norms.json") < 2e-5


@pytest.mark.parametrize(("file", "least"), LEAST.items())
def test_every_file_contributes(report: Report, file: str, least: int) -> None:
    if file == "gcg_eval.json" and shutil.which("java") is None:
        least -= 18
    assert statuses(report, file)["ok"] >= least
    if shutil.which("java") is not None:
        assert not statuses(report, file)["absent"]


def test_everything_is_looked_at(report: Report) -> None:
    left = ("unknown file", "not compared", "torch-only", "not covered yet")
    assert not [str(line) for line in report.lines if line.status in left]


def test_command(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small / "grand_pipeline.json").write_text("{}")
    (small / "other.npz").write_bytes(b"")
    assert main([str(small)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("parity torch: 14 arrays, 0 failed, worst ")
    about = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines[:-1]}
    assert about["grand_pipeline.json"].strip() == "not covered yet" and about["other.npz"].strip() == "unknown file"
    assert about["clip.npz"].strip() == about["text.json"].strip() == "absent"


@pytest.mark.parametrize(
    ("parameter", "file"),
    [
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.4.mlp.fc1.bias", "clip.npz"),
        ("model.mm_projector.2.bias", "projector.npz"),
        ("model.text_hidden_fcs.0.2.weight", "text_hidden_fcs.npz"),
        ("model.layers.1.self_attn.v_proj.weight", "llm_text.npz"),
        ("model.grounding_encoder.mask_decoder.iou_token.weight", "sam_prompt_and_decoder.npz"),
    ],
)
def test_a_corrupted_parameter_fails(
    small: Path, parameter: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (file, "clip.npz", "sam_image_encoder.npz"):
        shutil.copyfile(GOLDEN / name, small / name)

    def corrupt(arrays: dict[str, np.ndarray]) -> None:
        arrays[parameter] = arrays[parameter] + np.float16(0.25)

    edit(small / "state_dict.npz", corrupt)
    assert main([str(small)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if " FAIL" in line]
    assert any(line.startswith(file) for line in failed)


def test_what_is_missing_is_named(small: Path) -> None:
    shutil.copyfile(GOLDEN / "projector.npz", small / "projector.npz")
    edit(small / "projector.npz", lambda arrays: arrays.pop("tok_idx"))
    edit(small / "preprocess.npz", lambda arrays: arrays.pop("sam1_input"))
    report = compare(small, emit=silent)
    absent = {(line.file, line.name): line.note for line in report.lines if line.status == "absent"}
    assert absent["projector.npz", "output"] == "(projector.npz has no tok_idx)"
    assert absent["preprocess.npz", "sam1_input"] == "(preprocess.npz has no sam1_input)"
    (small / "state_dict.npz").unlink()
    report = compare(small, emit=silent)
    assert ("state_dict.npz", "*") in {(line.file, line.name) for line in report.lines if line.status == "absent"}
    # What needs no parameters is compared all the same.
    assert not report.failed and statuses(report, "preprocess.npz")["ok"] == 6


def test_files_without_what_they_are_about(small: Path) -> None:
    """Pictures and entries of JSON files that are not there are absent, wherever they are needed."""
    for name in ("splice_and_llm.npz", "res_teacher_forced.npz", "train_forward.npz", "e2e_generate.npz"):
        shutil.copyfile(GOLDEN / name, small / name)
    edit(small / "preprocess.npz", lambda arrays: [arrays.pop(n) for n in list(arrays) if "1_" in n])
    (small / "text.json").write_text('{"special_ids": {}}')
    (small / "gcg_eval.json").write_text('{"mask_gt": {}}')
    (small / "train_grad_norms.json").write_text("{")
    edit(small / "e2e_generate.npz", lambda arrays: [arrays.pop(n) for n in list(arrays) if n.startswith("no")])
    report = compare(small, emit=silent)
    assert [(line.file, line.note[:11]) for line in report.failed] == [("train_grad_norms.json", "(unreadable")]
    absent = {(line.file, line.name): line.note for line in report.lines if line.status == "absent"}
    assert absent["splice_and_llm.npz", "B_len"] == "(preprocess.npz has 1 pictures, not 2)"
    assert absent["e2e_generate.npz", "region_output_ids"] == "(preprocess.npz has no picture of 108x125 px)"
    assert "has 1 pictures" in absent["train_forward.npz", "loss_loss"]
    assert absent["gcg_eval.json", "*"] == "(gcg_eval.json has no mask_pred)"
    assert absent["text.json", "*"] == "(no file tokenizer.model)"


def test_changed_answers_fail(small: Path) -> None:
    """One id, one logit next to nothing and one far from it."""
    shutil.copyfile(GOLDEN / "e2e_generate.npz", small / "e2e_generate.npz")

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["short_output_ids"][-1] += 1
        masks = arrays["region_pred_masks"]
        masks[0, 0, 0] *= -1
        for name in [name for name in arrays if name.startswith("noregion")]:
            del arrays[name]

    edit(small / "e2e_generate.npz", change)
    failed = {line.name for line in compare(small, emit=silent).failed}
    assert failed == {
        "short_output_ids",
        "region_pred_masks",
        "region_pred_masks (mask)",
        "region_pred_masks (run lengths)",
    }


def test_directories_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("config.json", "{}"), ("manifest.json", "{}")):
        (tmp_path / name).write_text(content)
    assert main([str(tmp_path)]) == 2
    assert "has both config.json and manifest.json" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main([str(tmp_path)]) == 2
    assert "manifest.json: not the sizes of a GLaMM: KeyError: 'config'" in capsys.readouterr().err
    (tmp_path / "manifest.json").unlink()
    assert main([str(tmp_path)]) == 2
    assert "has neither config.json nor manifest.json" in capsys.readouterr().err


def test_parameters_that_do_not_fill_the_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(small / "state_dict.npz", lambda arrays: arrays.pop("model.norm.weight"))
    assert main([str(small)]) == 1
    assert "model.norm.weight" in capsys.readouterr().err


def test_sizes_that_the_manifest_does_not_give() -> None:
    import torch

    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    with np.load(GOLDEN / "state_dict.npz") as stored:
        tensors: dict[str, Any] = {name: torch.from_numpy(np.asarray(stored[name])) for name in stored.files}
    config = config_from_golden(manifest, tensors)
    assert config.region is not None
    assert (config.region.levels, config.region.rounds, config.region.crop) == (4, 5, 14)
    assert config.llama.kv_heads == config.llama.heads and not config.llama.tied
    del tensors["lm_head.weight"]
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name][: config.llama.head_dim * 2]
    shared = config_from_golden(manifest, tensors).llama
    assert shared.kv_heads == 2 and shared.tied
    without = {name: value for name, value in tensors.items() if ".region_encoder." not in name}
    assert config_from_golden(manifest, without).region is None
    assert config.mask_prompt_channels == 16
    without = {name: value for name, value in tensors.items() if ".mask_downscaling." not in name}
    assert config_from_golden(manifest, without).mask_prompt_channels == 0


def test_leaves_of_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"a": {"b": [[1, 2], [3, 4]], "c": [[1], [2, 3]]}, "d": "text", "e": [], "f": [{"g": 1}]})
    )
    file = GoldenFile(path)
    assert sorted(file) == ["a/b", "a/c/0", "a/c/1", "d", "e", "f/0/g"]
    assert file["a/b"].shape == (2, 2) and str(file["d"]) == "text" and file["e"].shape == (0,)
    assert file.unused() == ["a/c/0", "a/c/1", "f/0/g"]
    assert file.tree("f") == [{"g": 1}] and file.unused() == ["a/c/0", "a/c/1"]


# What the graphs and the runtime emit.
LEAST_THROUGH_GRAPHS = {
    "preprocess.npz": 6,
    "clip.npz": 4,
    "projector.npz": 1,
    "region_encoder.npz": 2,
    "llm_text.npz": 2,
    "splice_and_llm.npz": 6,
    "sam_image_encoder.npz": 1,
    "sam_prompt_and_decoder.npz": 1,
    "e2e_generate.npz": 26,
    "res_teacher_forced.npz": 2,
    "text.json": 35,
}


def test_golden_vectors_through_the_graphs() -> None:
    """Answers come out of the runtime's own search with its cache; the golden ids were decoded without one."""
    report = compare(GOLDEN, "onnx", emit=silent)
    assert [str(line) for line in report.failed] == []
    assert not [str(line) for line in report.lines if line.status == "absent"]
    found = {name: statuses(report, name)["ok"] for name in LEAST_THROUGH_GRAPHS}
    assert all(found[name] >= least for name, least in LEAST_THROUGH_GRAPHS.items()), found
    assert max(line.error or 0.0 for line in report.compared) < 1e-4
    inside = {(line.file, line.name) for line in report.lines if line.status == "torch-only"}
    assert ("clip.npz", "cls_level3") in inside and ("text_hidden_fcs.npz", "output") in inside
