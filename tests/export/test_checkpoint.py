"""Our checkpoint format: round trips, parts taken from elsewhere, and what damaged ones say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exporting import TINY
from safetensors.torch import save_file

from deixis_export.presets import random_model, random_tokenizer
from deixis_train.checkpoint import SAM_PARTS, load_checkpoint, save_checkpoint
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.pixelllm import PixelLLM

TOKENIZER = random_tokenizer(TINY.t5.vocab)


def test_round_trip_is_exact_in_fp32(tmp_path: Path, model: PixelLLM) -> None:
    save_checkpoint(tmp_path / "c", model, TOKENIZER, {"caption": {"beams": 2}}, dtype="fp32")
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.config == TINY and loaded.tokenizer_json == TOKENIZER and loaded.tasks == {"caption": {"beams": 2}}
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert not loaded.model.training


def test_fp16_rounds_matrices_only(tmp_path: Path, model: PixelLLM) -> None:
    save_checkpoint(tmp_path / "c", model, TOKENIZER)
    state = load_checkpoint(tmp_path / "c").model.state_dict()
    for name, value in model.state_dict().items():
        wanted = value.half().float() if value.ndim > 1 else value
        assert torch.equal(state[name], wanted), name


def test_omitted_parts_come_from_the_recorded_file(tmp_path: Path, model: PixelLLM) -> None:
    prefixes = {"sam_encoder": "image_encoder", "prompt_encoder": "prompt_encoder", "mask_decoder": "mask_decoder"}
    published = tmp_path / "sam.pth"
    torch.save(
        {
            f"{theirs}.{name}": value
            for ours, theirs in prefixes.items()
            for name, value in getattr(model, ours).state_dict().items()
        },
        published,
    )
    save_checkpoint(tmp_path / "c", model, TOKENIZER, omit=SAM_PARTS, frozen_from=published, dtype="fp32")
    with pytest.raises(CheckpointError, match=r"takes sam_encoder.* from sam\.pth"):
        load_checkpoint(tmp_path / "c")
    loaded = load_checkpoint(tmp_path / "c", published)
    assert all(torch.equal(value, loaded.model.state_dict()[name]) for name, value in model.state_dict().items())

    other = tmp_path / "other.pth"
    torch.save({"image_encoder.x": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="not the file that the checkpoint was made with"):
        load_checkpoint(tmp_path / "c", other)

    ours = tmp_path / "parts.safetensors"
    save_file({n: v for n, v in model.state_dict().items() if n.split(".")[0] in SAM_PARTS}, ours)
    assert load_checkpoint(tmp_path / "c", ours).frozen is not None


def test_saving_again_replaces_everything_but_the_documents(tmp_path: Path, model: PixelLLM) -> None:
    save_checkpoint(tmp_path / "c", model, TOKENIZER, documents={"MODEL_CARD.md": "card"})
    (tmp_path / "c" / "stray").write_text("x")
    save_checkpoint(tmp_path / "c", random_model(TINY, seed=1), TOKENIZER)
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"}
    assert load_checkpoint(tmp_path / "c").documents == {"MODEL_CARD.md": "card"}


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _edit_config(**changes: object):  # type: ignore[no-untyped-def]
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    return edit


DAMAGE = {
    "truncated weights": (_truncate, "not a whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "not complete"),
    "foreign weights": (lambda f: save_file({"x": torch.zeros(1)}, f / "model.safetensors"), "lacks "),
    "no config": (lambda f: (f / "config.json").unlink(), "this is not a checkpoint"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "foreign config": (lambda f: (f / "config.json").write_text("{}"), "not a deixis checkpoint"),
    "newer": (_edit_config(version=2), "upgrade deixis"),
    "unknown key": (_edit_config(model={"nose": 1}), "unknown key"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "needs its tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(tmp_path: Path, model: PixelLLM, kind: str) -> None:
    save_checkpoint(tmp_path / "c", model, TOKENIZER)
    damage, text = DAMAGE[kind]
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(tmp_path / "c")
    assert "\n" not in str(caught.value)


def test_another_size_is_refused(tmp_path: Path, model: PixelLLM) -> None:
    save_checkpoint(tmp_path / "c", model, TOKENIZER)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    config["model"]["t5"]["mlp"] = 64
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="where the model has"):
        load_checkpoint(tmp_path / "c")


def test_what_cannot_be_saved(tmp_path: Path, model: PixelLLM) -> None:
    with pytest.raises(ValueError, match="no such part"):
        save_checkpoint(tmp_path / "c", model, TOKENIZER, omit=("ears",), frozen_from=tmp_path)
    with pytest.raises(ValueError, match="frozen_from"):
        save_checkpoint(tmp_path / "c", model, TOKENIZER, omit=SAM_PARTS)
    model.visual_projection[0].weight.data[0, 0] = 1e6
    with pytest.raises(OverflowError, match=r"visual_projection\.0\.weight"):
        save_checkpoint(tmp_path / "c", model, TOKENIZER)
    assert not list(tmp_path.iterdir())
