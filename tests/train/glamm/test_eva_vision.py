"""EVA02 as the global encoder: its states, where it begins, what refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deixis_train.checkpoint import save_checkpoint
from deixis_train.glamm.start import start
from deixis_train.loaders.glamm_names import load_clip_state
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.config import PRESETS
from deixis_train.models.glamm import config as configs
from deixis_train.models.glamm.config import ClipConfig, GlammConfig
from deixis_train.models.glamm.eva_vision import EvaVision
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.recipe import RecipeError, load_recipe

SIDE = PRESETS["tiny"].semantic_size or PRESETS["tiny"].image_size
PIXELLLM = replace(PRESETS["tiny"], semantic=replace(PRESETS["tiny"].semantic, pretrain_img_size=SIDE))


def eva_config(**changes) -> GlammConfig:
    """glamm-tiny with the semantic encoder of the PixelLLM `tiny` as its global encoder."""
    theirs = PIXELLLM.semantic
    clip = ClipConfig(
        architecture="eva02",
        embed_dim=theirs.embed_dim,
        depth=theirs.depth,
        num_heads=theirs.num_heads,
        mlp_dim=int(theirs.embed_dim * theirs.mlp_ratio),
        patch_size=theirs.patch_size,
        image_size=SIDE,
        select_layer=-1,
    )
    tiny = configs.GLAMM_PRESETS["glamm-tiny"]
    assert tiny.region is not None
    region = replace(tiny.region, levels=1, groups=4)
    return replace(tiny, name="eva", clip=replace(clip, **changes), region=region)


def test_the_last_state_is_what_the_encoder_gives_and_each_block_makes_one() -> None:
    torch.manual_seed(0)
    encoder = EvaVision(eva_config().clip).eval()
    encoder.init_weights()
    image = torch.randn(2, SIDE, SIDE, 3)
    with torch.no_grad():
        states = encoder(image)
        assert torch.equal(states[-1], encoder.tokens(image))
        assert torch.equal(states[1], encoder.blocks[0](states[0], encoder.rope_cos, encoder.rope_sin))
    assert len(states) == PIXELLLM.semantic.depth + 1


def test_only_the_last_state_can_be_selected() -> None:
    with pytest.raises(ValueError, match="select_layer -2"):
        EvaVision(eva_config(select_layer=-2).clip)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, PixelLLM]:
    torch.manual_seed(1)
    model = PixelLLM(PIXELLLM).eval()
    save_checkpoint(tmp_path / "pixelllm", model, "{}", dtype="fp32")
    return tmp_path / "pixelllm", model


def begin(folder: Path, where: Path, config: GlammConfig, monkeypatch: pytest.MonkeyPatch) -> Glamm:
    monkeypatch.setitem(configs.GLAMM_PRESETS, config.name, config)
    recipe = load_recipe("tabletop-glamm")
    init = replace(recipe.init, mobile_sam=None, pixelllm=str(where))
    recipe = replace(recipe, preset=config.name, init=init)
    (folder / "run").mkdir()
    return start(recipe, folder, folder / "run", lambda: ["a red mug"], ["what is it?"]).model


def test_a_run_begins_with_the_semantic_encoder_of_a_pixelllm(
    tmp_path: Path, checkpoint: tuple[Path, PixelLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, theirs = checkpoint
    model = begin(tmp_path, where, eva_config(), monkeypatch)
    for name, value in theirs.semantic_encoder.state_dict().items():
        assert torch.equal(model.clip.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (configs.GLAMM_PRESETS["glamm-tiny"], "'glamm-tiny' is no EVA02"),
        (eva_config(mlp_dim=8), "other sizes than 'eva'"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    tmp_path: Path,
    checkpoint: tuple[Path, PixelLLM],
    monkeypatch: pytest.MonkeyPatch,
    config: GlammConfig,
    says: str,
) -> None:
    with pytest.raises(RecipeError, match=says):
        begin(tmp_path, checkpoint[0], config, monkeypatch)


def test_a_clip_is_no_eva02() -> None:
    with pytest.raises(CheckpointError, match="global encoder is an EVA02"):
        load_clip_state(EvaVision(eva_config().clip), {})
