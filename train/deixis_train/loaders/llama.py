"""LLaMA in the two forms it is published in: a Hugging Face folder, and a GGUF file with quantised matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deixis_train.loaders.files import read_json, read_tensors
from deixis_train.loaders.real_weights import default_cache
from deixis_train.loaders.report import CheckpointError, fill
from deixis_train.loaders.unfilled import unfilled
from deixis_train.models.glamm.config import LlamaConfig
from deixis_train.models.glamm.llama import Llama

# What another LLaMA-like model may do and this one does not: key of config.json -> the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
}
SMOLLM2_FILE = "smollm2.gguf"  # in `real_weights.WEIGHTS`
IGNORED = (".rotary_emb.inv_freq",)  # follows from sizes


def llama_config(values: Mapping[str, Any], where: object, vocab: int | None = None) -> LlamaConfig:
    """Sizes from a Hugging Face `config.json`.

    Args:
        values: the file's content.
        where: the file, for messages.
        vocab: rows of the embedding table, where they differ from what the file says.

    Raises:
        CheckpointError: a size is missing, or the model does something that LLaMA does not.
    """
    for key, plain in _PLAIN.items():
        if (found := values.get(key, plain[0])) not in plain:
            raise CheckpointError(f"{where}: {key} is {found!r}, which this LLaMA does not compute")
    try:
        heads, emb = int(values["num_attention_heads"]), int(values["hidden_size"])
        return LlamaConfig(
            vocab=int(values["vocab_size"]) if vocab is None else vocab,
            emb=emb,
            layers=int(values["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or emb // heads),
            mlp=int(values["intermediate_size"]),
            rms_eps=float(values["rms_norm_eps"]),
            rope_base=float(values.get("rope_theta") or 10000.0),
            tied=bool(values.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: lacks {error}, so this is not the configuration of a LLaMA") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not the configuration of a LLaMA: {error}") from None


def load_llama_folder(folder: Path) -> Llama:
    """A LLaMA from a folder of `config.json` and safetensors or PyTorch weights, sharded or not. Float32, eval mode.

    Raises:
        CheckpointError: unreadable, of another architecture, or it does not fill the model.
    """
    folder = Path(folder)
    tensors = read_tensors(folder)
    config = llama_config(read_json(folder / "config.json"), folder / "config.json")
    model = unfilled(lambda: Llama(config)).eval()
    names = {own: own if own.startswith("lm_head.") else f"model.{own}" for own in model.state_dict()}
    ignored = [
        name for name in tensors if name.endswith(IGNORED) or (model.lm_head is None and name == "lm_head.weight")
    ]
    fill(model, tensors, names, ignored).raise_if_incomplete(folder)
    return model


# GGUF's names of the parts of a block, and ours.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


class GgufFile(Mapping[str, Tensor]):
    """The tensors of a GGUF file by its own names, dequantised to float32 one at a time, in PyTorch layout [out, in].

    Rows of query and key projections come in Hugging Face's order: GGUF stores each head's rotary pairs side by side.
    Needs the package `gguf`.

    Raises:
        CheckpointError: absent, no GGUF file, or no LLaMA.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader, dequantize
        except ImportError:
            raise CheckpointError(f"{path}: reading GGUF needs the package gguf; pip install gguf") from None
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            reader = GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole GGUF file: {error}") from None
        self._fields = reader.fields
        if (architecture := self.value("general.architecture")) != "llama":
            raise CheckpointError(f"{path}: holds a model of architecture {architecture!r}, not llama")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = dequantize

    def value(self, name: str, default: Any = None) -> Any:
        """A value of the file's header, or `default`. Raises CheckpointError when it has none and that is None."""
        if name in self._fields:
            return self._fields[name].contents()
        if default is None:
            raise CheckpointError(f"{self.path}: its header lacks {name}")
        return default

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        weight = torch.from_numpy(self._dequantize(tensor.data, tensor.tensor_type).copy())
        for end, heads in (
            (".attn_q.weight", "llama.attention.head_count"),
            (".attn_k.weight", "llama.attention.head_count_kv"),
        ):
            if name.endswith(end):
                pairs = weight.unflatten(0, (int(self.value(heads)), -1, 2))
                return pairs.transpose(1, 2).reshape(weight.shape)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def load_llama_gguf(source: Path | GgufFile) -> Llama:
    """A LLaMA from a GGUF file, its matrices dequantised. Float32, eval mode. An opened file saves reading its header.

    Raises:
        CheckpointError: unreadable, of another architecture, or it does not fill the model.
    """
    file = source if isinstance(source, GgufFile) else GgufFile(source)
    path = file.path
    if "rope_freqs.weight" in file or file.value("llama.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{path}: stretches its rotary positions, which this LLaMA does not compute")
    emb, heads = int(file.value("llama.embedding_length")), int(file.value("llama.attention.head_count"))
    config = LlamaConfig(
        vocab=file["token_embd.weight"].shape[0],
        emb=emb,
        layers=int(file.value("llama.block_count")),
        heads=heads,
        kv_heads=int(file.value("llama.attention.head_count_kv", heads)),
        head_dim=int(file.value("llama.attention.key_length", emb // heads)),
        mlp=int(file.value("llama.feed_forward_length")),
        rms_eps=float(file.value("llama.attention.layer_norm_rms_epsilon")),
        rope_base=float(file.value("llama.rope.freq_base", 10000.0)),
        tied="output.weight" not in file,
    )
    if file.value("llama.rope.dimension_count", config.head_dim) != config.head_dim:
        raise CheckpointError(f"{path}: rotates only a part of each head, which this LLaMA does not compute")
    model = unfilled(lambda: Llama(config)).eval()
    fill(model, file, _gguf_names(config)).raise_if_incomplete(path)
    return model


def load_smollm2(path: Path | None = None) -> Llama:
    """SmolLM2-135M-Instruct; None takes the file that `make real-weights` puts into the cache.

    Raises:
        CheckpointError: as `load_llama_gguf`.
    """
    return load_llama_gguf(default_cache() / SMOLLM2_FILE if path is None else path)


def _gguf_names(config: LlamaConfig) -> dict[str, str]:
    outside = {ours: theirs for theirs, ours in _OUTSIDE.items() if not (config.tied and theirs == "output")}
    blocks = {
        f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}"
        for layer in range(config.layers)
        for theirs, ours in _BLOCK.items()
    }
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in (outside | blocks).items()}


def gguf_tokenizer_json(source: Path | GgufFile) -> str:
    """Text of the `tokenizer.json` of a GGUF file whose tokenizer is a byte-level BPE of SmolLM's kind.

    Digits stand alone; no space is put before a text. Control tokens are special.

    Raises:
        CheckpointError: unreadable, or another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    file = source if isinstance(source, GgufFile) else GgufFile(source)
    path = file.path
    kind = (file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre", "default"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"{path}: its tokenizer is {'/'.join(map(str, kind))}; only gpt2/smollm is read")
    pieces = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = [p for p, kind in zip(pieces, file.value("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return tokenizer.to_str()
