"""The step graph of a LLaMA alone: a random one with a tied head, and SmolLM2 against transformers where it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from deixis_export.language_model import export_language_model
from deixis_export.session import GraphSession
from deixis_train.loaders.llama import SMOLLM2_FILE, gguf_tokenizer_json, load_smollm2
from deixis_train.loaders.real_weights import default_cache
from deixis_train.models.glamm.config import LlamaConfig
from deixis_train.models.glamm.llama import Llama

SMOLLM2 = default_cache() / SMOLLM2_FILE
TINY = LlamaConfig(vocab=512, emb=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=96, tied=True)
PROMPTS = (
    "The three largest cities of France are",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
)
NEW_TOKENS = 200


def _greedy(session: GraphSession, config: LlamaConfig, prompt: list[int], count: int) -> list[int]:
    """A prefill, then step by step."""
    shape = (1, config.kv_heads, len(prompt) + count, config.head_dim)
    cache = {f"self_{part}.{i}": np.zeros(shape, np.float32) for i in range(config.layers) for part in ("key", "value")}
    ids, position, answer = prompt, 0, []
    for _ in range(count):
        out = session.run({"ids": np.array([ids]), "position": np.array([position]), "banned": np.array([-1]), **cache})
        cache = {name.replace("_out", ""): value for name, value in out.items() if "_out." in name}
        position += len(ids)
        ids = [int(out["top_ids"][0, 0])]
        answer += ids
    return answer


def test_a_tied_head_is_stored_once_and_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(TINY, lora_rank=2))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_b"):
                value.normal_(std=0.05)
    assert export_language_model(model, tmp_path).error < 1e-5
    table = TINY.vocab * TINY.emb * 4
    matrices = sum(p.numel() * 4 for p in model.layers.parameters() if p.ndim == 2)
    assert (tmp_path / "decoder_step.data").stat().st_size < 1.02 * (table + matrices)

    prompt = [3, 99, 7, 250]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model.head(model(model.embed(torch.tensor([ids])))[0, -1]).argmax()))
    with GraphSession(tmp_path / "decoder_step.onnx", threads=1) as session:
        assert _greedy(session, TINY, prompt, 12) == ids[len(prompt) :]


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.55), ("int8", 0.5), ("w8", 0.5)])
def test_lower_precisions_are_smaller(tmp_path: Path, precision: str, share: float) -> None:
    config = dataclasses.replace(TINY, tied=False)
    full, low = tmp_path / "full", tmp_path / "low"
    full.mkdir()
    low.mkdir()
    torch.manual_seed(0)
    model = Llama(config)
    export_language_model(model, full)
    export_language_model(model, low, precision)  # type: ignore[arg-type]
    sizes = [(folder / "decoder_step.data").stat().st_size for folder in (full, low)]
    assert sizes[1] < share * sizes[0]


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_file(), reason=f"{SMOLLM2} is absent; `make real-weights` fetches it")
def test_smollm2_decodes_as_transformers_does(tmp_path: Path) -> None:
    """Greedy, 200 tokens, three prompts: token for token. transformers gets the weights of our model."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    model = load_smollm2(SMOLLM2)
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.emb,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_eps,
            rope_theta=config.rope_base,
            max_position_embeddings=8192,
            tie_word_embeddings=config.tied,
        )
    ).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    state |= {"lm_head.weight": model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight}
    theirs.load_state_dict(state)
    export_language_model(model, tmp_path)
    tokenizer = Tokenizer.from_str(gguf_tokenizer_json(SMOLLM2))
    with GraphSession(tmp_path / "decoder_step.onnx") as session, torch.no_grad():
        for text in PROMPTS:
            prompt = tokenizer.encode(text).ids
            found = _greedy(session, config, prompt, NEW_TOKENS)
            wanted = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            assert found == wanted, tokenizer.decode(found)
