"""The Flax names of the visual projection and the text head, T5's and BERT's (section 16)."""

from __future__ import annotations

from collections.abc import Iterator

from deixis_train.loaders.flax_entries import Entry, linear, norm, same
from deixis_train.models.bert_text import BertText
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.t5 import LoraLinear


def visual_projection(model: PixelLLM) -> Iterator[Entry]:
    """BERT's head holds the projection itself; the arrays are the same."""
    theirs = "textual" if isinstance(model.text, BertText) else "visual_project_layers"
    yield from linear("visual_projection.0", f"{theirs}/visual_projection.0")
    yield from norm("visual_projection.1", f"{theirs}/visual_projection.1")


def text(model: PixelLLM) -> Iterator[Entry]:
    """The text head without the visual projection."""
    return _bert(model.text) if isinstance(model.text, BertText) else _t5(model)


def _bert(head: BertText) -> Iterator[Entry]:
    for name in ("words", "positions"):
        yield Entry(f"text.embedding.{name}.weight", (f"textual/embedding/{name}/embedding",), same)
    yield from norm("text.embedding.norm", "textual/embedding/layer_norm")
    for i in range(len(head.layers)):
        o, t = f"text.layers.{i}", f"textual/transformer/encoder/layer.{i}"
        for name in ("query", "key", "value"):
            yield from linear(f"{o}.{name}", f"{t}/attention/self/{name}")
        yield from linear(f"{o}.out", f"{t}/attention/output/dense")
        yield from norm(f"{o}.attention_norm", f"{t}/attention/output/LayerNorm")
        yield from linear(f"{o}.wi", f"{t}/intermediate/dense")
        yield from linear(f"{o}.wo", f"{t}/output/dense")
        yield from norm(f"{o}.output_norm", f"{t}/output/LayerNorm")
    yield from linear("text.output", "textual/output")


def _t5(model: PixelLLM) -> Iterator[Entry]:
    ours, theirs = "text", "textual/t5_module"
    yield Entry(f"{ours}.token_embedder.weight", (f"{theirs}/token_embedder/embedding",), same)

    def attention(o: str, t: str) -> Iterator[Entry]:
        for name in ("query", "key", "value", "out"):
            yield from linear(f"{o}.{name}", f"{t}/{name}", bias=False)
            if isinstance(model.get_submodule(f"{o}.{name}"), LoraLinear):
                yield Entry(f"{o}.{name}.lora_a", (f"{t}/{name}/kernel_left_lora",), same)  # [in, rank]
                yield Entry(f"{o}.{name}.lora_b", (f"{t}/{name}/kernel_right_lora",), same)  # [rank, out]

    stacks = {
        "encoder": (model.text.encoder, {"attention": "pre_attention_layer_norm"}),
        "decoder": (
            model.text.decoder,
            {
                "self_attention": "pre_self_attention_layer_norm",
                "encoder_decoder_attention": "pre_cross_attention_layer_norm",
            },
        ),
    }
    for stack, (module, attentions) in stacks.items():
        so, st = f"{ours}.{stack}", f"{theirs}/{stack}"
        yield Entry(f"{so}.relpos_bias.rel_embedding", (f"{st}/relpos_bias/rel_embedding",), same)
        yield from norm(f"{so}.{stack}_norm", f"{st}/{stack}_norm", bias=False)
        for i in range(len(module.layers)):
            o, t = f"{so}.layers.{i}", f"{st}/layers_{i}"
            for name, pre_norm in attentions.items():
                yield from attention(f"{o}.{name}", f"{t}/{name}")
                yield from norm(f"{o}.{pre_norm}", f"{t}/{pre_norm}", bias=False)
            yield from norm(f"{o}.pre_mlp_layer_norm", f"{t}/pre_mlp_layer_norm", bias=False)
            for name in ("wi_0", "wi_1", "wo"):
                yield from linear(f"{o}.mlp.{name}", f"{t}/mlp/{name}", bias=False)
    yield from linear(f"{ours}.decoder.logits_dense", f"{theirs}/decoder/logits_dense", bias=False)
