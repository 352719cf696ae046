"""The BERT/GIT text head against the reference, its steps against its pass, and its names in a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deixis_train.loaders.flax import load_flax, name_table
from deixis_train.losses.text import text_loss
from deixis_train.models.bert_text import BertText
from deixis_train.models.config import PRESETS, BertTextConfig, PixelLLMConfig
from deixis_train.models.decoding import begin_tokens, greedy, zero_after_end
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.optim import choose_trained

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "pixelllm" / "bert_text.npz"
CONFIG = dataclasses.replace(
    PRESETS["tiny"], bert=BertTextConfig(vocab=90, emb=32, heads=2, layers=2, mlp=128, max_positions=40)
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(golden: dict[str, np.ndarray]) -> PixelLLM:
    model = PixelLLM(CONFIG).eval()
    report = load_flax(model, {name.replace("params/", "textual/", 1): array for name, array in golden.items()})
    text = [name for name in report.missing if name.startswith(("textual/", "visual_project"))]
    assert not text and not report.misshapen
    assert set(report.unexpected) == {name for name in golden if not name.startswith("params/")}
    return model


@pytest.fixture(scope="module")
def head(model: PixelLLM) -> BertText:
    assert isinstance(model.text, BertText)
    return model.text


def tensors(golden: dict[str, np.ndarray], model: PixelLLM) -> tuple[Tensor, Tensor, Tensor]:
    """Visual prefix, context and text."""
    visual = model.visual_projection(torch.tensor(golden["visual"]))
    return visual, torch.tensor(golden["context_tokens"]).long(), torch.tensor(golden["text_tokens"]).long()


@pytest.mark.parametrize("with_context", [True, False])
def test_agrees_with_the_reference(
    golden: dict[str, np.ndarray], model: PixelLLM, head: BertText, with_context: bool
) -> None:
    visual, context, ids = tensors(golden, model)
    assert bool((context == 0).any())  # the mask of the prefix matters
    with torch.no_grad():
        logits, features = head.decode(ids, *head.encode(visual, context if with_context else None))
    suffix = "" if with_context else "_noctx"
    assert logits is not None
    np.testing.assert_allclose(logits.numpy(), golden[f"logits{suffix}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features.numpy(), golden[f"feats{suffix}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("widths", [[1] * 14, [14], [5, 1, 1, 7]], ids=["narrow", "prefill", "mixed"])
@torch.no_grad()
def test_steps_give_what_the_pass_gives(
    golden: dict[str, np.ndarray], model: PixelLLM, head: BertText, widths: list[int]
) -> None:
    visual, context, ids = tensors(golden, model)
    encoded, valid = head.encode(visual, context)
    cross = head.cross_kv(encoded)
    cache = [(key + 3.0, value - 3.0) for key, value in head.empty_cache(3, 17)]  # what lies behind is not read
    done = 0
    for width in widths:
        part = slice(done, done + width)
        logits, features, cache = head.step(ids[:, part], torch.tensor([done]), cache, cross, valid)
        done += width
        np.testing.assert_allclose(features.numpy(), golden["feats"][:, part], rtol=0, atol=1e-5)
        np.testing.assert_allclose(logits.numpy(), golden["logits"][:, done - 1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_beams_share_the_prefix_of_their_prompt(golden: dict[str, np.ndarray], model: PixelLLM, head: BertText) -> None:
    visual, context, ids = tensors(golden, model)
    beams = torch.stack([ids, ids.flip(1), ids.roll(3, dims=1)], dim=1).flatten(0, 1)  # row = prompt * 3 + beam
    encoded, valid = head.encode(visual, context)
    cross = head.cross_kv(encoded)
    tiled = [(key.repeat_interleave(3, dim=0), value.repeat_interleave(3, dim=0)) for key, value in cross]
    apart, _ = head.decode(beams, None, valid.repeat_interleave(3, dim=0), cross=tiled)
    shared, _ = head.decode(beams, None, valid, cross=cross)
    stepped, _, _ = head.step(beams, torch.tensor([0]), head.empty_cache(9, 14), cross, valid)
    assert apart is not None and shared is not None
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped, apart[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_of_the_context_has_no_say(golden: dict[str, np.ndarray], model: PixelLLM, head: BertText) -> None:
    visual, context, ids = tensors(golden, model)
    context = torch.where(torch.arange(8) < 3, context.clamp(min=1), 0)
    _, short = head.decode(ids, *head.encode(visual, context[:, :3]))
    _, padded = head.decode(ids, *head.encode(visual, context))
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-5)


def test_a_model_is_filled_by_the_names_of_published_checkpoints() -> None:
    """As many names as tensors, all of section 16, and the projection where BERT's head keeps it."""
    model = PixelLLM(CONFIG)
    table = name_table(model)
    assert {entry.target for entry in table} == set(model.state_dict())
    sources = {source for entry in table for source in entry.sources}
    assert {"textual/visual_projection.0/kernel", "textual/embedding/positions/embedding"} <= sources
    assert not any(source.startswith(("textual/t5_module", "visual_project_layers")) for source in sources)


def test_the_published_size() -> None:
    with torch.device("meta"):
        head = BertText(BertTextConfig())
    projection = 1024 * 768 + 768 + 2 * 768  # which the published head holds as well
    assert round((sum(p.numel() for p in head.parameters()) + projection) / 1e6, 1) == 91.0


def test_every_parameter_learns(golden: dict[str, np.ndarray]) -> None:
    """Nothing is dead weight. A bias of all keys alike moves no softmax: its gradient is rounding, and left out."""
    torch.manual_seed(0)
    model = PixelLLM(CONFIG)
    visual, context, ids = tensors(golden, model)
    logits, _ = model.text.decode(ids, *model.text.encode(visual, context))
    assert logits is not None
    text_loss(logits, ids).backward()
    learning = [name for name, p in model.text.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-7]
    idle = {name for name, _ in model.text.named_parameters()} - set(learning)
    assert all(name.endswith("key.bias") for name in idle)


def test_it_is_trained_in_full_and_learns_texts() -> None:
    """Section 13. Two prompts, two texts: after training, greedy decoding says them."""
    torch.manual_seed(0)
    begin, end = 7, 8
    model = PixelLLM(CONFIG)
    assert set(choose_trained(model, ["text"])) == {f"text.{name}" for name, _ in model.text.named_parameters()}
    model.train(False)
    visual, context = torch.randn(2, 6, 32), torch.tensor([[20, 21, end, 0], [20, end, 0, 0]])
    ids = torch.tensor([[begin, 30, 31, 32, 33, end], [begin, 40, 31, 50, end, 0]])
    optimizer = torch.optim.AdamW(model.text.parameters(), lr=3e-3)
    for _ in range(80):
        logits, _ = model.text.decode(ids, *model.text.encode(visual, context))
        assert logits is not None
        loss = text_loss(logits, ids, smoothing=0.0, end_id=end)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    encoded, valid = model.text.encode(visual, context)

    def logits_fn(tokens: Tensor, position: int) -> Tensor:
        return model.text.vocabulary_head(model.text.decode(tokens, encoded, valid)[1][:, position])

    tokens, _ = greedy(logits_fn, begin_tokens(2, 8, begin, end), end)
    assert zero_after_end(tokens, end)[:, :6].tolist() == ids.tolist()


def test_dropout_acts_in_training_only(golden: dict[str, np.ndarray], model: PixelLLM) -> None:
    visual, context, ids = tensors(golden, model)

    def features() -> Tensor:
        with torch.no_grad():
            return model.text.decode(ids, *model.text.encode(visual, context))[1]

    torch.testing.assert_close(features(), features(), rtol=0, atol=0)
    model.text.train()
    try:
        assert not torch.allclose(features(), features())
    finally:
        model.text.eval()


def test_configurations_of_both_heads_come_back() -> None:
    assert PixelLLMConfig.from_dict(CONFIG.to_dict()) == CONFIG
    old = {k: v for k, v in PRESETS["tiny"].to_dict().items() if k not in ("bert", "unknown_token_id")}
    assert PixelLLMConfig.from_dict(old) == PRESETS["tiny"]


def test_texts_longer_than_the_position_table_are_refused() -> None:
    with pytest.raises(ValueError, match="40 positions, fewer than the 41"):
        PixelLLM(dataclasses.replace(CONFIG, refer_length=41))
