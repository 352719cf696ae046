"""The text model: cached steps against whole passes, beams against rows, LoRA, and Hugging Face's T5 as a witness."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deixis_train.models.config import PRESETS, T5Config
from deixis_train.models.decoding import begin_tokens, greedy
from deixis_train.models.t5 import T5, KeyValue, LoraLinear

CONFIG = PRESETS["tiny"].t5
PROMPTS, VISUAL, CONTEXT, LENGTH = 3, 5, 4, 12


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_model(config: T5Config = CONFIG, seed: int = 0) -> T5:
    """A model whose every parameter matters: LoRA's B and the norms are not at their start values."""
    torch.manual_seed(seed)
    model = T5(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.normal_(std=0.2)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
        elif "relpos_bias" in name:
            parameter.normal_()
    return model


@pytest.fixture
def model() -> T5:
    return make_model()


@pytest.fixture
def encoded(model: T5) -> tuple[Tensor, Tensor]:
    """Encoder output and valid mask of prompts whose contexts differ in length."""
    torch.manual_seed(1)
    context = torch.randint(2, CONFIG.vocab, (PROMPTS, CONTEXT))
    context[0, 2:] = 0
    context[1, 1:] = 0
    return model.encode(torch.randn(PROMPTS, VISUAL, CONFIG.emb), context)


def random_ids(rows: int = PROMPTS, length: int = LENGTH) -> Tensor:
    return torch.randint(1, CONFIG.vocab, (rows, length), generator=torch.Generator().manual_seed(2))


def run_steps(
    model: T5, ids: Tensor, cross: list[KeyValue], valid: Tensor, widths: list[int], capacity: int
) -> tuple[Tensor, Tensor]:
    """Feed `ids` in pieces. Returns the logits after each piece [R, len(widths), V] and all features [R, L, D]."""
    cache = model.empty_cache(len(ids), capacity)
    position, logits, features = 0, [], []
    for width in widths:
        piece = ids[:, position : position + width]
        last, seen, cache = model.step(piece, torch.tensor(position), cache, cross, valid)
        logits.append(last)
        features.append(seen)
        position += width
    return torch.stack(logits, dim=1), torch.cat(features, dim=1)


def test_steps_equal_the_whole_pass(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    ids = random_ids()
    logits, features = model.decode(ids, *encoded)
    assert logits is not None
    stepped, stepped_features = run_steps(
        model, ids, model.cross_kv(encoded[0]), encoded[1], [1] * LENGTH, capacity=LENGTH + 5
    )
    # The last position is inactive in a whole pass (section 7 (iii)); a step knows nothing of that.
    torch.testing.assert_close(stepped[:, :-1], logits[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stepped_features[:, :-1], features[:, :-1], rtol=1e-5, atol=1e-5)


def test_greedy_ids_with_cache_equal_the_uncached_decoder(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    cross, valid = model.cross_kv(encoded[0]), encoded[1]

    def whole(tokens: Tensor, position: int) -> Tensor:
        logits, _ = model.decode(tokens, None, valid, cross=cross)
        assert logits is not None
        return logits[:, position]

    cache = model.empty_cache(PROMPTS, LENGTH)

    def cached(tokens: Tensor, position: int) -> Tensor:
        nonlocal cache
        logits, _, cache = model.step(tokens[:, position : position + 1], torch.tensor(position), cache, cross, valid)
        return logits

    begin = begin_tokens(PROMPTS, LENGTH)
    wanted, wanted_scores = greedy(whole, begin)
    found, scores = greedy(cached, begin)
    assert torch.equal(found, wanted)
    assert len(wanted.unique()) > 4  # not a degenerate caption
    torch.testing.assert_close(scores, wanted_scores)


@pytest.mark.parametrize("widths", [[12], [5, 7], [1, 3, 8]])
def test_wide_steps_equal_narrow_ones(model: T5, encoded: tuple[Tensor, Tensor], widths: list[int]) -> None:
    ids, cross = random_ids(), model.cross_kv(encoded[0])
    _, narrow = run_steps(model, ids, cross, encoded[1], [1] * LENGTH, capacity=LENGTH)
    logits, wide = run_steps(model, ids, cross, encoded[1], widths, capacity=LENGTH)
    torch.testing.assert_close(wide, narrow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, -1], model.decoder.logits_dense(narrow[:, -1]), rtol=1e-5, atol=1e-5)


def test_beams_of_a_prompt_equal_separate_rows(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    beams, (states, valid) = 4, encoded
    ids = random_ids(rows=PROMPTS * beams)
    tiled, tiled_valid = states.repeat_interleave(beams, dim=0), valid.repeat_interleave(beams, dim=0)
    shared_step = run_steps(model, ids, model.cross_kv(states), valid, [4, 1, 7], capacity=LENGTH)
    separate_step = run_steps(model, ids, model.cross_kv(tiled), tiled_valid, [4, 1, 7], capacity=LENGTH)
    shared_pass, separate_pass = model.decode(ids, states, valid), model.decode(ids, tiled, tiled_valid)
    for shared, separate in zip((*shared_step, *shared_pass), (*separate_step, *separate_pass), strict=True):
        assert shared is not None
        torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)


def test_what_lies_in_unwritten_cache_slots_does_not_matter(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    cross, ids = model.cross_kv(encoded[0]), random_ids(length=3)
    outputs = []
    for filler in (0.0, 1e4):
        cache = [(key + filler, value + filler) for key, value in model.empty_cache(PROMPTS, LENGTH)]
        outputs.append(model.step(ids, torch.tensor([0]), cache, cross, encoded[1])[0])
    assert torch.equal(*outputs)


def test_later_tokens_do_not_reach_back(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    ids, changed = random_ids(), random_ids()
    changed[:, 7:] = changed[:, 7:] % (CONFIG.vocab - 1) + 1
    _, before = model.decode(ids, *encoded)
    _, after = model.decode(changed, *encoded)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 8], after[:, 8])


def test_context_padding_reaches_no_active_position(model: T5) -> None:
    visual, context = torch.randn(1, VISUAL, CONFIG.emb), torch.tensor([[7, 9, 1]])
    _, plain = model.decode(random_ids(1), *model.encode(visual, context))
    padded, valid = model.encode(visual, torch.tensor([[7, 9, 1, 0, 0]]))
    assert valid.tolist() == [[True] * (VISUAL + 3) + [False] * 2]
    _, features = model.decode(random_ids(1), padded, valid)
    torch.testing.assert_close(features[:, :-1], plain[:, :-1], rtol=1e-5, atol=1e-5)
    # An inactive position attends to everything alike, padding included: there the padded length matters.
    assert not torch.allclose(features[:, -1], plain[:, -1])


def test_pass_without_logits(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    ids = random_ids()
    logits, features = model.decode(ids, *encoded, with_logits=False)
    assert logits is None
    assert torch.equal(features, model.decode(ids, *encoded)[1])


def test_merged_lora_is_the_same_function(model: T5, encoded: tuple[Tensor, Tensor]) -> None:
    ids = random_ids()
    before, _ = model.decode(ids, *encoded)
    plain, _ = make_model(dataclasses.replace(CONFIG, enc_scale=0.0, dec_scale=0.0)).decode(ids, *encoded)
    assert before is not None
    assert not torch.allclose(before, plain)  # LoRA does something here
    model.merge_lora()
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert not any("lora" in name for name in model.state_dict())
    after, _ = model.decode(ids, *encoded)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_lora_starts_as_the_plain_model() -> None:
    model = T5(CONFIG).eval()
    assert all(not module.lora_b.any() for module in model.modules() if isinstance(module, LoraLinear))
    assert not any("lora" in name for name in T5(dataclasses.replace(CONFIG, enc_rank=0, dec_rank=0)).state_dict())


def test_dropout_acts_in_training_only() -> None:
    model, visual = T5(CONFIG, dropout=0.5), torch.randn(1, VISUAL, CONFIG.emb)
    assert not torch.equal(model.encode(visual)[0], model.encode(visual)[0])
    model.eval()
    assert torch.equal(model.encode(visual)[0], model.encode(visual)[0])


def test_start_values_give_sane_logits() -> None:
    """From nothing, the first loss is about that of guessing."""
    torch.manual_seed(0)
    config = T5Config(vocab=512, emb=160, heads=4, head_dim=32, layers=3, mlp=384, enc_rank=0, dec_rank=0)
    model = T5(config).eval()
    logits, _ = model.decode(torch.randint(1, 512, (4, 20)), *model.encode(torch.randn(4, 16, 160)))
    assert logits is not None
    assert 0.5 < float(logits.std()) < 2.0


def test_agrees_with_hugging_face() -> None:
    """A random gated-GELU, untied T5 of transformers gives the same states and logits with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = T5Config(vocab=99, emb=48, heads=3, head_dim=8, layers=2, mlp=72, enc_rank=0, dec_rank=0)
    torch.manual_seed(3)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab,
            d_model=config.emb,
            d_kv=config.head_dim,
            d_ff=config.mlp,
            num_layers=config.layers,
            num_heads=config.heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    ours = T5(config).eval()
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), config.layers))

    visual, context = torch.randn(2, VISUAL, config.emb), torch.randint(2, config.vocab, (2, CONTEXT))
    context[1, 2:] = 0
    # Long enough to leave the exact buckets; every id non-zero and one more at the end, so that all rows are active.
    ids = torch.randint(1, config.vocab, (2, 150))
    encoded, valid = ours.encode(visual, context)
    logits, _ = ours.decode(torch.cat([ids, torch.ones(2, 1, dtype=torch.int64)], dim=1), encoded, valid)
    output = theirs(
        inputs_embeds=torch.cat([visual, ours.token_embedder(context)], dim=1),
        attention_mask=valid.long(),
        decoder_input_ids=ids,
    )
    assert logits is not None
    torch.testing.assert_close(encoded[valid], output.encoder_last_hidden_state[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :-1], output.logits, rtol=1e-4, atol=1e-4)


def from_hugging_face(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Written out here rather than taken from the loaders, so that the two check each other."""
    named = {
        "token_embedder.weight": state["shared.weight"],
        "decoder.logits_dense.weight": state["lm_head.weight"],
    }
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    parts = {
        "encoder": [("attention", "pre_attention_layer_norm", "SelfAttention")],
        "decoder": [
            ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
            ("encoder_decoder_attention", "pre_cross_attention_layer_norm", "EncDecAttention"),
        ],
    }
    for stack, attentions in parts.items():
        table = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        named[f"{stack}.relpos_bias.rel_embedding"] = table.T
        named[f"{stack}.{stack}_norm.weight"] = state[f"{stack}.final_layer_norm.weight"]
        for i in range(layers):
            for j, (name, norm, theirs) in enumerate(attentions):
                block = f"{stack}.block.{i}.layer.{j}"
                named[f"{stack}.layers.{i}.{norm}.weight"] = state[f"{block}.layer_norm.weight"]
                for ours, letter in attention.items():
                    named[f"{stack}.layers.{i}.{name}.{ours}.weight"] = state[f"{block}.{theirs}.{letter}.weight"]
            block = f"{stack}.block.{i}.layer.{len(attentions)}"
            named[f"{stack}.layers.{i}.pre_mlp_layer_norm.weight"] = state[f"{block}.layer_norm.weight"]
            for name in ("wi_0", "wi_1", "wo"):
                named[f"{stack}.layers.{i}.mlp.{name}.weight"] = state[f"{block}.DenseReluDense.{name}.weight"]
    return named
