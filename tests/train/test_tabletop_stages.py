"""Stages of the demo's training: a stopped one ends like one that was not; the checkpoint holds what was learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deixis_train.checkpoint import SAM_PARTS, load_checkpoint
from deixis_train.data.scenes.generate import generate
from deixis_train.models.config import (
    PRESETS,
    Eva02Config,
    MaskDecoderConfig,
    PointPredictorConfig,
    PromptAdapterConfig,
    T5Config,
    TinyVitConfig,
)
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.tabletop import train as train_stage
from deixis_train.tabletop import warmup as warmup_stage
from deixis_train.tabletop.__main__ import class_names, load_tokenizer, prepare_semantic, write_checkpoint
from deixis_train.tabletop.rows import CAPTION, REFER, REGION, SceneData, decoder_arrays
from deixis_train.tabletop.run import Stage, adamw, cosine, set_learning_rate
from deixis_train.tabletop.scenes import prepare_pictures, prepare_sam, read_shard, shards
from deixis_train.tabletop.tokenizer import END, PAD, SPACE
from deixis_train.tabletop.train import draw_batch, tapped
from deixis_train.tabletop.warmup import warm_up

SIZE, GRID = 128, 4
CELL = SIZE // GRID


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Stopped(Exception):
    """Stands for a killed run."""


def stop_after(calls: int) -> Callable[..., None]:
    """`set_learning_rate`, which every step calls once, until the run is killed in step number `calls`."""
    left = iter(range(calls))

    def set_or_stop(optimizer: torch.optim.Optimizer, rate: float) -> None:
        if next(left, None) is None:
            raise Stopped
        set_learning_rate(optimizer, rate)

    return set_or_stop


def assert_same_state(a: Path, b: Path) -> None:
    """Two files of `Stage.save` hold the same modules, optimizer and step, bit for bit."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                yield from flat(child, f"{name}.{key}")
        else:
            yield name, value

    first, second = (dict(flat(torch.load(path, weights_only=True), "")) for path in (a, b))
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


def test_an_interrupted_save_leaves_the_old_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(3, 2)
    stage = Stage(tmp_path, "s", {"layer": layer}, adamw([layer], 0.1))
    assert stage.resume() == 0
    stage.save(5)
    saved = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()

    def half(_state: object, path: Path) -> None:
        path.write_bytes(b"half a fi")
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Stopped):
            stage.save(6)
    other = nn.Linear(3, 2)
    again = Stage(tmp_path, "s", {"layer": other}, adamw([other], 0.1))
    assert again.resume() == 5 and torch.equal(other.weight, saved)
    again.save(7)  # what the interrupted save left behind is no hindrance
    assert stage.resume() == 7 and torch.equal(layer.weight, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def test_learning_rate_rises_and_falls() -> None:
    rates = [cosine(step, 100, 2.0, warmup=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[50] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert rates[:9] == sorted(rates[:9]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_decay_leaves_vectors_alone() -> None:
    layer, frozen = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
    matrices, vectors = adamw([layer, frozen], 0.1).param_groups
    assert matrices["params"] == [layer.weight] and matrices["weight_decay"] == 0.1
    assert vectors["params"] == [layer.bias] and vectors["weight_decay"] == 0


def test_slow_modules_learn_at_a_fifth_of_the_rate() -> None:
    fast, slow = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = adamw([fast], 0.1, slow=[slow])
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in (fast.weight, fast.bias)] == [(0.5, 0.1), (0.5, 0.0)]
    assert [rates[id(p)] for p in (slow.weight, slow.bias)] == [(0.1, 0.1), (0.1, 0.0)]


# A tabletop model that is small, but has every part of the real one.
MINIATURE = replace(
    PRESETS["tabletop"],
    image_size=SIZE,
    semantic_size=56,
    semantic=Eva02Config(embed_dim=16, depth=1, num_heads=2, pretrain_img_size=56),
    sam=TinyVitConfig(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), out_chans=16),
    prompt_embed_dim=16,
    prompt_adapter=PromptAdapterConfig(
        depth=1, transformer_dim=16, num_outputs=1, output_dim=16, num_heads=2, mlp_dim=16
    ),
    t5=T5Config(vocab=128, emb=16, heads=2, head_dim=8, layers=2, mlp=16, enc_rank=0, dec_rank=0),
    point_predictor=PointPredictorConfig(hidden_dim=16),
    mask_decoder=MaskDecoderConfig(transformer_depth=1, num_heads=2, mlp_dim=16, iou_head_hidden_dim=16),
)


def miniature() -> PixelLLM:
    torch.manual_seed(0)
    return PixelLLM(MINIATURE).eval()


def test_tapping_the_attention_changes_nothing() -> None:
    text = miniature().text
    generator = torch.Generator().manual_seed(1)
    encoded, valid = text.encode(torch.randn(2, 5, 16, generator=generator), torch.tensor([[4, 5, END], [6, END, PAD]]))
    ids = torch.tensor([[PAD, 7, 8, END], [PAD, 9, END, PAD]])
    with torch.inference_mode():
        plain = text.decode(ids, encoded, valid)
        with tapped(text) as attention:
            again = text.decode(ids, encoded, valid)
        after = text.decode(ids, encoded, valid)
    assert [tuple(weights.shape) for weights in attention] == [(2, 2, 4, 8)] * 2  # one per layer; none of `after`
    for weights in attention:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 4))
        assert not weights[1, :, :2, 7].any(), "words do not look at padding"
    for before, now, later in zip(plain, again, after, strict=True):
        assert before is not None and now is not None and later is not None
        torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-5)
        assert torch.equal(later, before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six rendered scenes, and the caches that the stages make of them."""
    data, cache = tmp_path_factory.mktemp("scenes"), tmp_path_factory.mktemp("cache")
    generate(data, 6_000_000, 6, size=SIZE, workers=1, shard=4)
    model = miniature()
    for shard in shards(data):
        prepare_pictures(model, data, cache, shard)
        prepare_sam(model, data, cache, shard)
        prepare_semantic(model, cache, shard)
    return data, cache


def test_prepared_arrays_stay(scenes: tuple[Path, Path]) -> None:
    data, cache = scenes
    assert {path.name for path in cache.iterdir()} == {
        f"scenes-{shard:04d}.{name}.npy" for shard in range(2) for name in ("small", "owner", "sam", "semantic")
    }
    for name, shape in (("small", (4, 56, 56, 3)), ("owner", (4, 4, 4)), ("sam", (4, 4, 4, 16))):
        assert np.load(cache / f"scenes-0000.{name}.npy").shape == shape
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    model = miniature()
    for shard in shards(data):
        prepare_pictures(model, data, cache, shard)
        prepare_sam(model, data, cache, shard)
        prepare_semantic(model, cache, shard)
    assert written == {path: path.stat().st_mtime_ns for path in cache.iterdir()}


def test_a_stopped_warm_up_ends_like_one_that_was_not(
    scenes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = scenes
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def run(out: Path) -> PixelLLM:
        out.mkdir(exist_ok=True)
        model = miniature()
        warm_up(model, data, cache, out, class_names(data), pictures=2 * 104, batch=2)
        return model

    finished = run(whole)
    with monkeypatch.context() as patch:  # after the save at 100 steps; the three steps since then are lost
        patch.setattr(warmup_stage, "set_learning_rate", stop_after(103))
        with pytest.raises(Stopped):
            run(parts)
    assert torch.load(parts / "warmup.pt", weights_only=True)["step"] == 100
    resumed = run(parts)
    assert_same_state(whole / "warmup.pt", parts / "warmup.pt")
    start = miniature().semantic_encoder.state_dict()
    for name, value in finished.semantic_encoder.state_dict().items():
        assert torch.equal(value, resumed.semantic_encoder.state_dict()[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in finished.semantic_encoder.state_dict().items())
    with monkeypatch.context() as patch:  # a finished stage takes no further step
        patch.setattr(warmup_stage, "set_learning_rate", stop_after(0))
        run(whole)


def test_a_twice_stopped_training_ends_like_one_that_was_not_and_its_checkpoint_loads(
    scenes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = scenes
    names = class_names(data)
    steps = 202  # states are saved at 200 and at the end
    extractor = partial(train_stage.warm_up_extractor, steps=steps, batch=2)
    monkeypatch.setattr(train_stage, "warm_up_extractor", extractor)

    def run(out: Path) -> PixelLLM:
        out.mkdir(exist_ok=True)
        model = miniature()
        tokenizer = load_tokenizer(data, out, MINIATURE.t5.vocab)
        train_stage.train(model, tokenizer, scenes, scenes, out, names, steps=steps, batch=2)
        return model

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained = run(whole)
    # First killed in the last step of the extractor's warm-up, then in that of the training itself.
    for calls, left in ((steps - 1, "extractor.pt"), (2 + steps - 1, "train.pt")):
        with monkeypatch.context() as patch:
            patch.setattr(train_stage, "set_learning_rate", stop_after(calls))
            with pytest.raises(Stopped):
                run(parts)
        assert torch.load(parts / left, weights_only=True)["step"] == 200
    run(parts)
    assert_same_state(whole / "extractor.pt", parts / "extractor.pt")
    assert_same_state(whole / "train.pt", parts / "train.pt")
    figures = [json.loads(line) for line in (whole / "train.log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in figures if "val_P@0.5" in line] == [200, 202]

    # The checkpoint takes features as they are, and points where the trained model points on standardised ones.
    state = {"modules": {"semantic_encoder": miniature().semantic_encoder.state_dict()}}
    torch.save(state, whole / "warmup.pt")
    frozen = tmp_path / "frozen.safetensors"
    save_file({k: v for k, v in miniature().state_dict().items() if k.startswith(tuple(SAM_PARTS))}, frozen)
    write_checkpoint(miniature(), whole, frozen, names)
    loaded = load_checkpoint(whole / "checkpoint", frozen_from=frozen)
    assert loaded.tasks["refer"]["instruction"] == REFER
    tokenizer = load_tokenizer(data, whole, MINIATURE.t5.vocab)
    held = SceneData(*scenes, tokenizer, names)
    batch = draw_batch(held, np.arange(6), np.random.default_rng(0), CELL)
    ids, _, _ = decoder_arrays(batch.rows)
    helpers = train_stage.make_helpers(trained, names)
    helpers.load_state_dict(torch.load(whole / "train.pt", weights_only=True)["modules"]["helpers"])
    with torch.inference_mode():
        wanted = train_stage.run_rows(trained, replace(batch, features=helpers.standardize(batch.features)), ids)
        found = train_stage.run_rows(loaded.model, batch, ids)
    torch.testing.assert_close(found.locations, wanted.locations, rtol=0, atol=5e-3)  # matrices are stored in fp16
    assert wanted.locations.std() > 0.02


def test_the_tokenizer_of_a_run_is_made_once_and_knows_the_scenes(scenes: tuple[Path, Path], tmp_path: Path) -> None:
    data, _ = scenes
    tokenizer = load_tokenizer(data, tmp_path, 128)
    texts = [record["text"] for shard in shards(data) for scene in read_shard(shard) for record in scene["expressions"]]
    for text in [*texts, CAPTION, REGION, REFER.format(text="the")]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert [token.lstrip(SPACE) for token in encoding.tokens] == text.replace(":", " :").split()
    written = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    assert load_tokenizer(tmp_path / "nowhere", tmp_path, 128).to_str() == tokenizer.to_str()
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == written
