"""GLaMM's published names into `models.glamm` (section 13), and the sizes of golden directories.

Below the prefixes of the table, both sides have the same names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from deixis_train.loaders.report import CheckpointError, LoadReport, fill
from deixis_train.models.config import MaskDecoderConfig, SamVitConfig
from deixis_train.models.glamm.clip import ClipVision
from deixis_train.models.glamm.config import ClipConfig, GlammConfig, LlamaConfig, RegionConfig, SpecialIds
from deixis_train.models.glamm.eva_vision import EvaVision
from deixis_train.models.glamm.glamm import Glamm

CLIP = "model.vision_tower.vision_tower.vision_model."
# Ours -> theirs. Longer prefixes first: `llama.lm_head.` is not below `model.`.
PREFIXES = {
    "llama.lm_head.": "lm_head.",
    "llama.": "model.",
    "clip.": CLIP,
    "projector.": "model.mm_projector.",
    "region_encoder.": "model.region_encoder.",
    "mask_projection.": "model.text_hidden_fcs.0.",
    "sam_encoder.": "model.grounding_encoder.image_encoder.",
    "prompt_encoder.": "model.grounding_encoder.prompt_encoder.",
    "mask_decoder.": "model.grounding_encoder.mask_decoder.",
}
MASK_PROMPTS = PREFIXES["prompt_encoder."] + "mask_downscaling."
# Tables that follow from sizes, a counter of training, and mask prompts where the model takes none.
IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".position_ids", ".num_batches_tracked")
IGNORED_PREFIXES = (MASK_PROMPTS,)


def glamm_names(model: Glamm) -> dict[str, str]:
    """Our name -> published name of every parameter and buffer with a counterpart. LoRA factors have none."""
    names = {}
    for ours in model.state_dict():
        if ours.endswith((".lora_a", ".lora_b", ".num_batches_tracked")):
            continue
        prefix = next(prefix for prefix in PREFIXES if ours.startswith(prefix))
        names[ours] = PREFIXES[prefix] + ours.removeprefix(prefix)
    return names


def load_glamm_state(model: Glamm, tensors: Mapping[str, Tensor], without: Collection[str] = ()) -> LoadReport:
    """Fill a model from tensors under the published names.

    Args:
        model: the receiver. LoRA factors keep their values.
        tensors: name -> tensor. Any floating dtype; the receiver's is kept.
        without: our parts that the file need not hold, say ("clip",): published folders leave CLIP to OpenAI's own
            file. They keep their values, and names of theirs in the file count as ignored.

    Returns:
        What was missing, unexpected or of another shape; call its `raise_if_incomplete`.
    """
    left_out = tuple(f"{part}." for part in without)
    names = {ours: theirs for ours, theirs in glamm_names(model).items() if not ours.startswith(left_out)}
    theirs_left_out = tuple(theirs for ours, theirs in PREFIXES.items() if ours.startswith(left_out))
    ignored = {name for name in _unused(tensors, CLIP, model.config.clip) if name not in names.values()}
    ignored |= {name for name in tensors if name.startswith(theirs_left_out)} - set(names.values())
    if model.llama.lm_head is None:
        ignored.add("lm_head.weight")  # a copy of the embeddings
    return fill(model, tensors, names, ignored)


def load_clip_state(
    clip: ClipVision | EvaVision, tensors: Mapping[str, Tensor], prefix: str = "vision_model."
) -> LoadReport:
    """Fill the global encoder from a CLIP in Hugging Face naming; its text half and later blocks are ignored.

    Raises:
        CheckpointError: the global encoder is no CLIP.
    """
    if not isinstance(clip, ClipVision):
        raise CheckpointError("a CLIP is given for a model whose global encoder is an EVA02")
    names = {ours: prefix + ours for ours in clip.state_dict()}
    ignored = {name for name in tensors if not name.startswith(prefix)} | set(_unused(tensors, prefix, clip.config))
    return fill(clip, tensors, names, ignored)


def _unused(tensors: Iterable[str], clip_prefix: str, config: ClipConfig) -> Iterable[str]:
    """Names of the file that no model takes: blocks of CLIP behind the selected state, and what follows from sizes."""
    blocks = tuple(f"{clip_prefix}encoder.layers.{i}." for i in range(config.selected, config.depth))
    unused = (*IGNORED_PREFIXES, *blocks, f"{clip_prefix}post_layernorm.")
    return (name for name in tensors if name.startswith(unused) or name.endswith(IGNORED_ENDINGS))


def mask_prompt_channels(tensors: Mapping[str, Tensor]) -> int:
    """Width inside the part that takes masks as prompts, of tensors under the published names; 0 without that part."""
    weight = tensors.get(f"{MASK_PROMPTS}3.weight")
    return 0 if weight is None else len(weight)


def config_from_golden(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> GlammConfig:
    """The sizes of a golden directory.

    Args:
        manifest: content of its `manifest.json`.
        tensors: its parameters by published name. What the manifest does not speak of is read off them: which parts
            there are, the heads that share keys and values, tied embeddings, the region encoder's levels, rounds and
            crop. None: these are as in the published model.

    Raises:
        KeyError, TypeError, ValueError: a size is absent or no number.
    """
    config = _config_from_manifest(manifest)
    return config if tensors is None else _as_parameters_say(config, tensors)


def _as_parameters_say(config: GlammConfig, tensors: Mapping[str, Tensor]) -> GlammConfig:
    llama, region, encoder = config.llama, config.region, PREFIXES["region_encoder."]
    key = tensors.get("model.layers.0.self_attn.k_proj.weight")
    kv_heads = llama.kv_heads if key is None else len(key) // llama.head_dim
    if not any(name.startswith(encoder) for name in tensors):
        region = None
    if region is not None:
        flat = tensors.get(f"{encoder}roi_align.flatten_linear.weight")
        region = dataclasses.replace(
            region,
            levels=_length(tensors, f"{encoder}mlvl_fuse.input_conv"),
            rounds=_length(tensors, f"{encoder}mlvl_fuse.fuse_convs"),
            crop=region.crop if flat is None else math.isqrt(flat.shape[1] // config.clip.embed_dim),
        )
    return dataclasses.replace(
        config,
        llama=dataclasses.replace(llama, kv_heads=kv_heads, tied="lm_head.weight" not in tensors),
        region=region,
        mask_prompt_channels=mask_prompt_channels(tensors),
    )


def _length(tensors: Iterable[str], prefix: str) -> int:
    """How many modules a list of them holds."""
    return len({match[1] for name in tensors if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def _config_from_manifest(manifest: Mapping[str, Any]) -> GlammConfig:
    sizes = manifest["config"]
    llm, clip, sam, region, ids = (sizes[key] for key in ("llm", "clip", "sam", "reg", "ids"))
    heads = llm["num_attention_heads"]
    return GlammConfig(
        name="golden",
        clip=ClipConfig(
            embed_dim=clip["hidden_size"],
            depth=clip["num_hidden_layers"],
            num_heads=clip["num_attention_heads"],
            mlp_dim=clip["intermediate_size"],
            patch_size=clip["patch_size"],
            image_size=clip["image_size"],
        ),
        region=RegionConfig(
            groups=region["gn_groups"], hidden_dim=region["reg_hidden"], position_dim=region["pos_mid"]
        ),
        llama=LlamaConfig(
            vocab=llm["vocab_size"],
            emb=llm["hidden_size"],
            layers=llm["num_hidden_layers"],
            heads=heads,
            kv_heads=heads,
            head_dim=llm["hidden_size"] // heads,
            mlp=llm["intermediate_size"],
            rms_eps=llm["rms_norm_eps"],
        ),
        image_size=sam["img"],
        sam=SamVitConfig(
            embed_dim=sam["embed"],
            depth=sam["depth"],
            num_heads=sam["heads"],
            patch_size=sam["patch"],
            out_chans=sam["prompt"],
            img_size=sam["img"],
            window_size=sam["window"],
            window_block_indexes=tuple(i for i in range(sam["depth"]) if i not in sam["glob"]),
        ),
        prompt_embed_dim=sam["prompt"],
        mask_prompt_channels=sam.get("mask_in", 0),
        mask_decoder=MaskDecoderConfig(
            transformer_depth=sam["dec_depth"],
            mlp_dim=sam["dec_mlp"],
            num_heads=sam["dec_heads"],
            iou_head_hidden_dim=sam["iou_hidden"],
            mask_head_hidden_dim=sam["prompt"],
        ),
        ids=SpecialIds(
            begin=ids["bos"],
            end=ids["eos"],
            pad=ids["pad"],
            image_start=ids["im_start"],
            image_end=ids["im_end"],
            region=ids["bbox"],
            mask=ids["seg"],
            phrase_start=ids["p"],
            phrase_end=ids["ep"],
        ),
    )
