"""Our text graphs against optimum's own export of the same T5: an exporter that shares no code with ours.

The visual prefix is given as the embeddings of the first ids, so that both encoders read the same sequence.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exporting import TINY

from deixis_export.cases import Sizes, make_cases
from deixis_export.graphs import graph_specs
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.trace import trace
from deixis_export.weights import write_graph
from deixis_train.loaders.real_weights import real_weight
from deixis_train.loaders.t5 import dequantized_flan_t5, load_t5_tensors
from deixis_train.models.config import T5_SIZES, T5Config
from deixis_train.models.pixelllm import PixelLLM

transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx", reason="optimum is not installed")

PREFIX = TINY.prompt_adapter.num_outputs
NEW_TOKENS = 12


def _hugging_face(config: T5Config) -> transformers.T5ForConditionalGeneration:
    values = transformers.T5Config(
        vocab_size=config.vocab,
        d_model=config.emb,
        d_kv=config.head_dim,
        d_ff=config.mlp,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(values).eval()


def _export_with_optimum(model: transformers.T5ForConditionalGeneration, folder: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model

    onnx_export_from_model(model, folder, task="text2text-generation", opset=17, do_validation=False)


def _optimum_logits(folder: Path, ids: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Logits [N, L, V] of decoder inputs [N, L] for encoder ids [N, E]."""
    mask = np.ones_like(ids)
    encoder = onnxruntime.InferenceSession(str(folder / "encoder_model.onnx"), providers=["CPUExecutionProvider"])
    encoded = encoder.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})[0]
    decoder = onnxruntime.InferenceSession(str(folder / "decoder_model.onnx"), providers=["CPUExecutionProvider"])
    feed = {"input_ids": written, "encoder_hidden_states": encoded, "encoder_attention_mask": mask}
    return decoder.run(["logits"], feed)[0]


class _Ours:
    """The text graphs of a PixelLLM with a given T5 inside."""

    def __init__(self, config: T5Config, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        model = PixelLLM(dataclasses.replace(TINY, t5=config, mask_adapter=None)).eval()
        load_t5_tensors(tensors, model.text).raise_if_incomplete()
        cases = make_cases(model, Sizes(B=2, N=3, K=2, P=4, C=5, S=2, T=9, L=7))
        self._embedding = model.text.token_embedder
        self._config = config
        self._sessions = {}
        for role in ("text_encoder", "decoder_step"):
            write_graph(trace(graph_specs(model)[role], model, cases[role]), folder / f"{role}.onnx")
            self._sessions[role] = GraphSession(folder / f"{role}.onnx", threads=1)

    def greedy(self, ids: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Plain arg-max decoding: ids [N, steps] and the logits [N, steps, V] they were chosen from."""
        prefix = self._embedding(torch.from_numpy(ids[:, :PREFIX])).detach().numpy()
        cross = self._sessions["text_encoder"].run({"visual_prefix": prefix, "context_ids": ids[:, PREFIX:]})
        shape = (len(ids), self._config.heads, steps, self._config.head_dim)
        layers = range(self._config.layers)
        cache: Arrays = {f"self_{part}.{i}": np.zeros(shape, np.float32) for i in layers for part in ("key", "value")}
        token, chosen, logits = np.zeros((len(ids), 1), np.int64), [], []
        nothing = np.full(len(ids), -1, np.int64)
        for position in range(steps):
            feed = {"ids": token, "position": np.array([position]), "banned": nothing, **cross, **cache}
            out = self._sessions["decoder_step"].run(feed)
            cache = {name.replace("_out", ""): value for name, value in out.items() if "_out." in name}
            token = out["logits"].argmax(axis=-1)[:, None]
            chosen.append(token[:, 0])
            logits.append(out["logits"])
        return np.stack(chosen, axis=1), np.stack(logits, axis=1)


def _compare(config: T5Config, model: transformers.T5ForConditionalGeneration, folder: Path, ids: np.ndarray) -> None:
    (folder / "ours").mkdir()
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    ours = _Ours(config, tensors, folder / "ours")
    _export_with_optimum(model, folder / "optimum")
    chosen, logits = ours.greedy(ids, NEW_TOKENS)
    written = np.concatenate([np.zeros((len(ids), 1), np.int64), chosen[:, :-1]], axis=1)
    theirs = _optimum_logits(folder / "optimum", ids, written)
    assert relative_error({"x": logits}, {"x": theirs}) < 1e-4
    np.testing.assert_array_equal(chosen, theirs.argmax(axis=-1))


@pytest.mark.filterwarnings("ignore")
def test_random_t5_agrees_with_optimum(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY.t5, enc_rank=0, dec_rank=0)
    ids = np.random.default_rng(1).integers(2, config.vocab, (3, PREFIX + 5))
    _compare(config, _hugging_face(config), tmp_path, ids)


@pytest.mark.slow  # exports Flan-T5-small twice: about a minute
@pytest.mark.filterwarnings("ignore")
def test_flan_t5_small_agrees_with_optimum(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    weights = real_weight("flan_t5_small")
    if weights is None:
        pytest.skip("flan_t5_small is not in the cache; `make real-weights` fetches it")
    config = dataclasses.replace(T5_SIZES["small"], enc_rank=0, dec_rank=0)
    model = _hugging_face(config)
    missing, unexpected = model.load_state_dict(dequantized_flan_t5(weights), strict=False)
    assert not unexpected and all("embed_tokens" in name for name in missing)
    tokenizer = Tokenizer.from_file(str(next(weights.rglob("tokenizer.json"))))
    text = tokenizer.encode("translate English to German: The house is wonderful and the garden is large.")
    _compare(config, model, tmp_path, np.array([text.ids]))
