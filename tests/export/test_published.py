"""`deixis export` of published folders of GLaMM: which folders those are, both ways of export, what may be missing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from deixis.bundle import open_bundle
from deixis.errors import ExportError
from deixis_export import cli, routes
from deixis_export.bundle_parts import ExportOptions
from deixis_export.presets_glamm import random_glamm
from deixis_export.sentencepiece import tokenizer_json_from_sentencepiece
from deixis_train.loaders.glamm_names import CLIP, glamm_names
from deixis_train.models.glamm.config import GLAMM_PRESETS, GlammConfig, SpecialIds

GOLDEN = Path(__file__).parents[1] / "golden" / "glamm"
ADDED = json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))["special_ids"]
ROWS = 607  # of the golden tokenizer with its added tokens
TINY = GLAMM_PRESETS["glamm-tiny"]
SIZES = dataclasses.replace(
    TINY,
    llama=dataclasses.replace(TINY.llama, vocab=ROWS),
    ids=SpecialIds(image_start=600, image_end=601, region=602, mask=604, phrase_start=605, phrase_end=606),
)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """A random model's weights by their published names."""
    model = random_glamm(SIZES)
    state = model.state_dict()
    return {theirs: state[ours].contiguous() for ours, theirs in glamm_names(model).items()}


@pytest.fixture
def folder(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    """Without CLIP, as published folders are."""
    folder = tmp_path / "GLaMM-Tiny"
    folder.mkdir()
    save_file({n: v for n, v in tensors.items() if not n.startswith(CLIP)}, folder / "model.safetensors")
    llama = SIZES.llama
    values = {
        "model_type": "llava",
        "hidden_size": llama.emb,
        "intermediate_size": llama.mlp,
        "num_hidden_layers": llama.layers,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "vocab_size": ROWS,
        "rms_norm_eps": llama.rms_eps,
        "mm_hidden_size": SIZES.clip.embed_dim,
        "mm_vision_select_layer": SIZES.clip.select_layer,
        "out_dim": SIZES.prompt_embed_dim,
        "with_region": True,
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return folder


@pytest.fixture
def clip(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "clip.safetensors"
    save_file({f"vision_model.{n.removeprefix(CLIP)}": v for n, v in tensors.items() if n.startswith(CLIP)}, path)
    return path


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, on the sizes of the tiny folder for what no file of a folder says."""
    opened, loaded = routes.open_glamm_folder, routes.load_glamm_folder

    def base(given: GlammConfig | None) -> GlammConfig:
        assert given is None
        return SIZES

    monkeypatch.setattr(routes, "open_glamm_folder", lambda f, clip, given: opened(f, clip, base(given)))
    monkeypatch.setattr(routes, "load_glamm_folder", lambda f, clip, given: loaded(f, clip, base(given)))


@pytest.mark.parametrize("large", [False, True])
def test_the_command_exports_a_folder_either_way(
    large: bool, folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    monkeypatch.setattr(routes, "is_large", lambda config: large)
    out = tmp_path / "bundle"
    assert cli.main([str(folder), "--clip", str(clip), "--out", str(out), "--precision", "fp16"]) == 0
    manifest = open_bundle(out).manifest
    assert (manifest.model.family, manifest.model.name) == ("glamm", "GLaMM-Tiny")
    assert ("chain/greedy_ids" in manifest.parity) is not large
    assert {name for name in manifest.parity if name.startswith("graph/")} == {f"graph/{r}" for r in manifest.graphs}
    provenance = manifest.provenance
    assert (provenance.source, provenance.licence) == ("published folder GLaMM-Tiny, CLIP from clip.safetensors", "")
    conversation, tokenizer = manifest.conversation, manifest.tokenizer
    assert conversation is not None and (conversation.mask_id, conversation.region_id) == (604, 602)
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 0, ROWS)
    text = (out / tokenizer.file).read_text(encoding="utf-8")
    assert text == tokenizer_json_from_sentencepiece(folder / "tokenizer.model", ADDED)


def test_what_is_missing_is_one_line(
    folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)

    def refused(*options: object) -> str:
        assert cli.main([str(folder), *map(str, options), "--out", str(tmp_path / "bundle")]) == 1
        err = capsys.readouterr().err
        assert err.startswith("deixis export: error: ") and err.count("\n") == 1
        assert not (tmp_path / "bundle").exists()
        return err

    assert "holds no CLIP" in refused()
    assert "absent.bin: no such file" in refused("--clip", tmp_path / "absent.bin")
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    assert "holds neither" in refused("--clip", clip)
    (tmp_path / "elsewhere").rename(weights)
    (folder / "added_tokens.json").write_text(json.dumps({**ADDED, "<more>": 609}))
    assert "without gaps" in refused("--clip", clip)
    (folder / "tokenizer.model").unlink()
    assert "tokenizer.model: no such file" in refused("--clip", clip)


def test_weights_that_are_missing_leave_nothing(
    tensors: dict[str, Tensor], folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "is_large", lambda config: True)
    kept = {n: v for n, v in tensors.items() if not n.startswith(CLIP) and n != "model.norm.weight"}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"lacks model\.norm\.weight"):
        routes.export_published(folder, tmp_path / "out" / "b", clip=clip, options=ExportOptions(), base=SIZES)
    assert not (tmp_path / "out").exists()


def test_which_folders_are_published_ones(folder: Path, tmp_path: Path) -> None:
    assert routes.is_published(folder)
    (folder / "tokenizer.model").unlink()
    assert routes.is_published(folder)  # by its config.json; what is missing is said later
    own = tmp_path / "own"
    own.mkdir()
    assert not routes.is_published(own)
    (own / "config.json").write_text(json.dumps({"format": "deixis-checkpoint"}))
    assert not routes.is_published(own)


def test_clip_belongs_to_published_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    preset = ["--preset", "glamm-tiny", "--random", "--clip", "x", "--out", str(tmp_path / "b")]
    assert cli.main(preset) == 1
    assert "--clip belongs to the published folder" in capsys.readouterr().err
