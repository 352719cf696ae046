"""T5 1.1 and Flan-T5 in Hugging Face naming into `models.t5.T5` (section 16.2); an int8 ONNX one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deixis_train.loaders.files import read_tensors
from deixis_train.loaders.report import CheckpointError, LoadReport, fill
from deixis_train.models.t5 import T5

ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}
# `layer.N` of a block and what it holds: our attention and norm, or our norm before the MLP.
STACKS = {
    "encoder": {
        0: ("SelfAttention", "attention", "pre_attention_layer_norm"),
        1: ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    },
    "decoder": {
        0: ("SelfAttention", "self_attention", "pre_self_attention_layer_norm"),
        1: ("EncDecAttention", "encoder_decoder_attention", "pre_cross_attention_layer_norm"),
        2: ("DenseReluDense", "mlp", "pre_mlp_layer_norm"),
    },
}
RELATIVE_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
# Copies of `shared`, and a table that T5 1.0 stored but never used.
IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def t5_names(layers: int) -> dict[str, str]:
    """Our parameter name -> Hugging Face name, for a T5 of that many layers. LoRA factors have no counterpart."""
    names = {"token_embedder.weight": "shared.weight", "decoder.logits_dense.weight": "lm_head.weight"}
    for stack, parts in STACKS.items():
        names[f"{stack}.relpos_bias.rel_embedding"] = f"{stack}.{RELATIVE_BIAS}"
        names[f"{stack}.{stack}_norm.weight"] = f"{stack}.final_layer_norm.weight"
        for i in range(layers):
            for position, (theirs, ours, norm) in parts.items():
                block, layer = f"{stack}.block.{i}.layer.{position}", f"{stack}.layers.{i}"
                names[f"{layer}.{norm}.weight"] = f"{block}.layer_norm.weight"
                matrices = {name: name for name in ("wi_0", "wi_1", "wo")} if ours == "mlp" else ATTENTION
                for letter, name in matrices.items():
                    names[f"{layer}.{ours}.{name}.weight"] = f"{block}.{theirs}.{letter}.weight"
    return names


def load_t5(path: Path, model: T5) -> LoadReport:
    """Fill a T5 from safetensors: a file, a sharded model's index, or the directory that holds either.

    LoRA factors keep their values. Tensors are read one at a time, so a sharded model never lies in memory twice.

    Raises:
        CheckpointError: unreadable, a shard absent, or nothing of a T5's in it.
    """
    tensors = read_tensors(path)
    if "shared.weight" not in tensors:
        raise CheckpointError(f"{path}: not a T5 checkpoint in Hugging Face naming: no shared.weight")
    return load_t5_tensors(tensors, model)


def load_t5_tensors(tensors: Mapping[str, Tensor], model: T5) -> LoadReport:
    """`load_t5` for tensors already at hand, by Hugging Face names."""
    names = t5_names(model.config.layers)
    turned = [f"{stack}.relpos_bias.rel_embedding" for stack in STACKS]  # [buckets, heads] there, [heads, buckets] here
    return fill(model, tensors, names, IGNORED, transposed=turned)


def dequantized_flan_t5(onnx_dir: Path) -> dict[str, Tensor]:
    """Weights of a T5 that was exported to ONNX and quantised to int8 dynamically, in Hugging Face names, float32.

    Args:
        onnx_dir: holds `encoder.onnx` and `decoder.onnx` as ONNX Runtime's dynamic quantisation leaves them: every
            matrix is an integer initializer beside its scale and zero point, and a node's name is its module's path.

    Raises:
        CheckpointError: a file is absent or no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    weights: dict[str, Tensor] = {}
    for file in ("encoder.onnx", "decoder.onnx"):
        path = Path(onnx_dir) / file
        try:
            graph = onnx.load(path).graph
        except (OSError, DecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as ONNX: {error}") from None
        values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        # Plain and looked-up parameters keep their names; matrices of products lost theirs to the node.
        for name in values:
            if name.endswith("_quantized") and not name.startswith("onnx::"):
                stem = name.removesuffix("_quantized")
                weights[_module_path(stem)] = torch.from_numpy(_dequantized(values, stem))
            elif name.endswith(".weight"):
                weights[_module_path(name)] = torch.from_numpy(values[name].copy())
        for node in graph.node:
            if node.op_type == "MatMulInteger" and node.input[1].endswith("_quantized"):
                stem = node.input[1].removesuffix("_quantized")
                path_in_model = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".") + ".weight"
                # ONNX multiplies from the right: [in, out] there, [out, in] in PyTorch.
                weights[_module_path(path_in_model)] = torch.from_numpy(
                    np.ascontiguousarray(_dequantized(values, stem).T)
                )
    return weights


def _dequantized(values: Mapping[str, np.ndarray], stem: str) -> np.ndarray:
    integers = values[stem + "_quantized"].astype(np.float32)
    return (integers - values[stem + "_zero_point"].astype(np.float32)) * values[stem + "_scale"]


def _module_path(name: str) -> str:
    """Name inside the exported wrappers -> Hugging Face name. The wrapped encoder is `enc`, the whole model `m`."""
    if name == "enc.embed_tokens.weight":
        return "shared.weight"
    return "encoder." + name.removeprefix("enc.") if name.startswith("enc.") else name.removeprefix("m.")
