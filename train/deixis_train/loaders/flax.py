"""PixelLLM's own checkpoints: the Flax parameter tree of section 16, as a flattened npz or as msgpack."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deixis_train.loaders import flax_text
from deixis_train.loaders.flax_entries import Entry, conv2d, flipped_conv, linear, norm, same
from deixis_train.loaders.report import CheckpointError, LoadReport
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.sam_vit import SamVit
from deixis_train.models.two_way import TwoWayTransformer

Tree = dict[str, np.ndarray]


# ---- the name tables, one function per part of section 16; those of the text are in `flax_text`


def _semantic_encoder(model: PixelLLM) -> Iterator[Entry]:
    ours, theirs = "semantic_encoder", "git_backbone"
    yield Entry(f"{ours}.cls_token", (f"{theirs}/cls_token",), same)
    yield Entry(f"{ours}.pos_embed", (f"{theirs}/pos_embed",), same)
    yield from conv2d(f"{ours}.patch_embed.proj", f"{theirs}/patch_embed.proj")
    yield from norm(f"{ours}.norm", f"{theirs}/ln_post")
    for i in range(len(model.semantic_encoder.blocks)):
        o, t = f"{ours}.blocks.{i}", f"{theirs}/blocks.{i}"
        yield from norm(f"{o}.norm1", f"{t}/norm1")
        yield from norm(f"{o}.norm2", f"{t}/norm2")
        for name in ("q_proj", "k_proj", "v_proj"):
            yield from linear(f"{o}.attn.{name}", f"{t}/attn/{name}", bias=False)
        for name in ("q_bias", "v_bias"):
            yield Entry(f"{o}.attn.{name}", (f"{t}/attn/{name}",), same)
        yield from linear(f"{o}.attn.proj", f"{t}/attn/proj")
        for name in ("w1", "w2", "w3"):
            yield from linear(f"{o}.mlp.{name}", f"{t}/mlp/{name}")
        yield from norm(f"{o}.mlp.ffn_ln", f"{t}/mlp/ffn_ln")


def _sam_encoder(model: PixelLLM) -> Iterator[Entry]:
    if not isinstance(model.sam_encoder, SamVit):
        raise CheckpointError("a Flax checkpoint holds SAM's ViT; this model has another SAM branch")
    ours, theirs = "sam_encoder", "sam_backbone"
    yield Entry(f"{ours}.pos_embed", (f"{theirs}/pos_embed",), same)
    yield from conv2d(f"{ours}.patch_embed.proj", f"{theirs}/patch_embed.proj")
    for i in (0, 2):
        yield from conv2d(f"{ours}.neck.{i}", f"{theirs}/neck/{i}", bias=False)
        yield from norm(f"{ours}.neck.{i + 1}", f"{theirs}/neck/{i + 1}")
    for i in range(len(model.sam_encoder.blocks)):
        o, t = f"{ours}.blocks.{i}", f"{theirs}/blocks.{i}"
        yield from norm(f"{o}.norm1", f"{t}/norm1")
        yield from norm(f"{o}.norm2", f"{t}/norm2")
        for name in ("qkv", "proj"):
            yield from linear(f"{o}.attn.{name}", f"{t}/attn/{name}")
        for name in ("rel_pos_h", "rel_pos_w"):
            yield Entry(f"{o}.attn.{name}", (f"{t}/attn/{name}",), same)
        for name in ("lin1", "lin2"):
            yield from linear(f"{o}.mlp.{name}", f"{t}/mlp/{name}")


def _prompt_encoder(model: PixelLLM) -> Iterator[Entry]:
    del model
    matrix = "positional_encoding_gaussian_matrix"
    yield Entry(f"prompt_encoder.pe_layer.{matrix}", (f"prompt_encoder/pe_layer/{matrix}",), same)
    for name in (
        *(f"point_embeddings.{i}.weight" for i in range(4)),
        "not_a_point_embed.weight",
        "no_mask_embed.weight",
    ):
        yield Entry(f"prompt_encoder.{name}", (f"prompt_encoder/{name}",), same)


def _two_way(transformer: TwoWayTransformer, ours: str, theirs: str) -> Iterator[Entry]:
    projections = ("q_proj", "k_proj", "v_proj", "out_proj")
    for i in range(len(transformer.layers)):
        o, t = f"{ours}.layers.{i}", f"{theirs}/layers.{i}"
        for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            for name in projections:
                yield from linear(f"{o}.{attention}.{name}", f"{t}/{attention}/{name}")
        for name in ("lin1", "lin2"):
            yield from linear(f"{o}.mlp.{name}", f"{t}/mlp/{name}")
        for name in ("norm1", "norm2", "norm3", "norm4"):
            yield from norm(f"{o}.{name}", f"{t}/{name}")
    for name in projections:
        yield from linear(f"{ours}.final_attn_token_to_image.{name}", f"{theirs}/final_attn_token_to_image/{name}")
    yield from norm(f"{ours}.norm_final_attn", f"{theirs}/norm_final_attn")


def _prompt_adapter(model: PixelLLM) -> Iterator[Entry]:
    ours, theirs = "prompt_adapter", "prompt_adapter"
    adapter = model.prompt_adapter
    yield Entry(f"{ours}.output_tokens", (f"{theirs}/output_tokens.weight",), same)
    yield from linear(f"{ours}.image_projection", f"{theirs}/image_projection_mlp/layers.0")
    if isinstance(adapter.prompt_projection, nn.Linear):  # absent where prompts have the adapter's width already
        yield from linear(f"{ours}.image_pe_projection", f"{theirs}/image_pe_projection_mlp/layers.0")
        yield from linear(f"{ours}.prompt_projection", f"{theirs}/prompt_embedding_projection_mlp/layers.0")
    yield from _two_way(adapter.transformer, f"{ours}.transformer", f"{theirs}/transformer")
    heads = [f"{theirs}/output_hypernetworks_mlps.{i}/layers.0" for i in range(adapter.output_tokens.shape[0])]
    yield Entry(f"{ours}.output_weight", tuple(f"{head}/kernel" for head in heads), same, stacked=True)
    yield Entry(f"{ours}.output_bias", tuple(f"{head}/bias" for head in heads), same, stacked=True)
    yield from linear(f"{ours}.dense_output_projection", f"{theirs}/dense_output_mlp/layers.0")


def _point_predictor(model: PixelLLM) -> Iterator[Entry]:
    if model.point_predictor is None:
        return
    yield from norm("point_predictor.norm", "point_predictor/LayerNorm_0")
    for i in range(len(model.point_predictor.mlp.layers)):
        yield from linear(f"point_predictor.mlp.layers.{i}", f"point_predictor/mlp/layers.{i}")


def _mask_adapter(model: PixelLLM) -> Iterator[Entry]:
    adapter = model.mask_adapter
    if adapter is None:
        return
    yield Entry("mask_adapter.output_tokens", ("mask_adapter/output_tokens.weight",), same)
    if adapter.gate is not None:
        yield Entry("mask_adapter.gate", ("mask_adapter/alpha_output.weight",), same)
    for name in ("visual_projection", "textual_projection"):
        yield from norm(f"mask_adapter.{name}.0", f"mask_adapter/{name}_mlp/LayerNorm_0")
        yield from linear(f"mask_adapter.{name}.1", f"mask_adapter/{name}_mlp/layers.0")
    yield from _two_way(adapter.transformer, "mask_adapter.transformer", "mask_adapter/transformer")


def _mask_decoder(model: PixelLLM) -> Iterator[Entry]:
    decoder = model.mask_decoder
    if decoder is None:
        return
    ours, theirs = "mask_decoder", "mask_decoder"
    for name in ("iou_token.weight", "mask_tokens.weight"):
        yield Entry(f"{ours}.{name}", (f"{theirs}/{name}",), same)
    yield from _two_way(decoder.transformer, f"{ours}.transformer", f"{theirs}/transformer")
    yield from conv2d(f"{ours}.output_upscaling.0", f"{theirs}/output_upscaling/0")
    yield from norm(f"{ours}.output_upscaling.1", f"{theirs}/output_upscaling/1")
    yield from conv2d(f"{ours}.output_upscaling.3", f"{theirs}/output_upscaling/3")
    for i in range(decoder.num_masks):
        name = f"output_hypernetworks_mlps.{i}"
        for j in range(decoder.HYPERNETWORK_DEPTH):
            yield from linear(f"{ours}.{name}.layers.{j}", f"{theirs}/{name}/layers.{j}")
    for j in range(len(decoder.iou_prediction_head.layers)):
        yield from linear(f"{ours}.iou_prediction_head.layers.{j}", f"{theirs}/iou_prediction_head/layers.{j}")


def _box_decoder(model: PixelLLM) -> Iterator[Entry]:
    decoder = model.box_decoder
    if decoder is None:
        return
    ours, theirs = "box_decoder.pyramid", "box_decoder/fpn"
    yield Entry(f"{ours}.p3.0.weight", (f"{theirs}/simfp_3.0/kernel",), flipped_conv)
    yield Entry(f"{ours}.p3.0.bias", (f"{theirs}/simfp_3.0/bias",), same)
    for o, t in (("p3.1", "3.1"), ("p3.2", "3.2"), ("p4.0", "4.0"), ("p4.1", "4.1"), ("p5.1", "5.1"), ("p5.2", "5.2")):
        yield from conv2d(f"{ours}.{o}.conv", f"{theirs}/simfp_{t}", bias=False)
        yield from norm(f"{ours}.{o}.norm", f"{theirs}/simfp_{t}.norm")
    for name in ("p6", "p7"):
        yield from conv2d(f"{ours}.{name}", f"{theirs}/top_block/{name}")
    ours, theirs = "box_decoder.head", "box_decoder/proposal_generator"
    for i in range(0, len(decoder.head.tower), 3):  # convolution, norm, activation
        yield from conv2d(f"{ours}.tower.{i}", f"{theirs}/bbox_tower/{i}")
        yield from norm(f"{ours}.tower.{i + 1}", f"{theirs}/bbox_tower/{i + 1}")
    yield from conv2d(f"{ours}.heatmap", f"{theirs}/agn_hm")
    yield from conv2d(f"{ours}.regression", f"{theirs}/bbox_pred")
    scales = tuple(f"{theirs}/scales.{i}/scale" for i in range(len(decoder.head.scales)))
    yield Entry(f"{ours}.scales", scales, same, stacked=True)
    for name in ("fc1", "fc2", "cls_score", "bbox_pred"):
        yield from linear(f"box_decoder.roi_head.{name}", f"box_decoder/roi_heads/box_head.0/{name}")


_PARTS = (
    _semantic_encoder,
    _sam_encoder,
    _prompt_encoder,
    _prompt_adapter,
    flax_text.visual_projection,
    flax_text.text,
    _point_predictor,
    _mask_adapter,
    _mask_decoder,
    _box_decoder,
)
# A model without a detector takes the rest of a checkpoint that has one.
_OPTIONAL_PARTS = ("box_decoder/",)


def name_table(model: PixelLLM) -> list[Entry]:
    """Every tensor of the model's state dict with the Flax arrays that fill it (section 16)."""
    return [entry for part in _PARTS for entry in part(model)]


@torch.no_grad()
def load_flax(model: PixelLLM, tree: Mapping[str, np.ndarray]) -> LoadReport:
    """Fill a model from a flattened Flax tree.

    Names and shapes must fit exactly; what does not is reported and left at its start value. The report speaks in Flax
    names.

    Args:
        model: the receiver; dtype and device of its tensors are kept.
        tree: arrays by '/'-joined Flax name, as `read_flax` gives them.
    """
    own = model.state_dict(keep_vars=True)
    missing: list[str] = []
    misshapen: list[str] = []
    known: set[str] = set()
    for target, sources, convert, stacked in name_table(model):
        known.update(sources)
        absent = [name for name in sources if name not in tree]
        missing += absent
        if absent:
            continue
        receiver = own[target]
        slots = list(receiver) if stacked else [receiver]
        for name, slot in zip(sources, slots, strict=True):
            array = np.asarray(tree[name])
            # Same number of axes first: the conversions permute, and cannot permute what is not there.
            turned = convert(array) if array.ndim == slot.ndim else array
            if turned.shape != tuple(slot.shape):
                misshapen.append(f"{name}: file {turned.shape}, model {tuple(slot.shape)}")
            else:
                slot.copy_(torch.tensor(turned))
    rest = sorted(set(tree) - known)
    ignored = [name for name in rest if name.startswith(_OPTIONAL_PARTS)]
    unexpected = [name for name in rest if not name.startswith(_OPTIONAL_PARTS)]
    return LoadReport(tuple(missing), tuple(unexpected), tuple(misshapen), tuple(ignored))


# ---- files


def read_flax(path: str | Path) -> Tree:
    """Read a Flax checkpoint file: '/'-joined name -> array.

    A flattened `.npz` or Flax's msgpack. The nesting of checkpoints (`optimizer/target`, `params`) is taken off, and
    what lies beside the parameters (optimizer state, step count) is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is neither format, is damaged, or holds no parameters.
    """
    path = Path(path)
    data = path.read_bytes() if not zipfile.is_zipfile(path) else None
    flat = _read_npz(path) if data is None else _read_msgpack(data, path)
    for prefix in ("optimizer/target/params/", "optimizer/target/", "params/"):
        if any(name.startswith(prefix) for name in flat):
            flat = {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}
            break
    if not flat:
        raise CheckpointError(f"{path}: holds no parameters")
    return flat


def _read_npz(path: Path) -> Tree:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: damaged npz file: {error}") from error


def _read_msgpack(data: bytes, path: Path) -> Tree:
    import msgpack

    try:
        nested = msgpack.unpackb(data, ext_hook=_decode_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CheckpointError(f"{path}: neither an npz file nor Flax msgpack: {error}") from error
    if not isinstance(nested, dict):
        raise CheckpointError(f"{path}: neither an npz file nor Flax msgpack")
    return dict(_flatten(nested, ""))


def _decode_extension(code: int, data: bytes) -> Any:
    """Flax's msgpack extensions: 1 is an array, 2 a complex number, 3 a numpy scalar."""
    import msgpack

    if code not in (1, 3):
        return None
    shape, dtype, content = msgpack.unpackb(data, raw=False)
    if dtype == "bfloat16":  # numpy has no such type; it is the upper half of a float32
        wide = np.frombuffer(content, dtype=np.uint16).astype(np.uint32) << 16
        array = wide.view(np.float32)
    else:
        array = np.frombuffer(content, dtype=np.dtype(dtype))
    array = array.reshape(shape)
    return array if code == 1 else array[()]


def _flatten(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and "__msgpack_chunked_array__" in value:  # arrays over 1 GiB are stored in pieces
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
            shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
            yield name, np.concatenate([chunk.reshape(-1) for chunk in chunks]).reshape(shape)
        elif isinstance(value, dict):
            yield from _flatten(value, f"{name}/")
        elif isinstance(value, np.ndarray):
            yield name, value
