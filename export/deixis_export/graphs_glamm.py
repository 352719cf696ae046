"""The graphs of the `glamm` family: one small module per role, with the named inputs and outputs of docs/bundle.md."""

from __future__ import annotations

import torch
from torch import Tensor

from deixis_export.graph_spec import GraphSpec, TensorSpec, View, pairs_of
from deixis_export.step_head import BANNED, top_of, top_specs
from deixis_train.models.glamm.config import GlammConfig, LlamaConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.llama import Llama

_View = View[Glamm]


class GlobalEncoder(_View):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features, levels = self.model.encode_global(image)
        return (features, *levels)


class RegionEncoder(_View):
    def forward(self, *inputs: Tensor) -> Tensor:
        *levels, boxes, image_index = inputs
        return self.model.encode_regions(levels, boxes, image_index)


class DecoderStep(_View):
    def forward(
        self, ids: Tensor, visual: Tensor, embed_index: Tensor, position: Tensor, banned: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        return _step(self.model.llama, self.model.splice(ids, visual, embed_index), position, banned, caches)


class GroundingEncoder(_View):
    def forward(self, image: Tensor, valid_hw: Tensor) -> Tensor:
        return self.model.encode_grounding(image, valid_hw)


class PixelDecoder(_View):
    def forward(self, states: Tensor, sam: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.decode_masks(states, sam, image_index)


class LanguageStep(View[Llama]):
    """The decoder step of a language model without pictures."""

    def forward(self, ids: Tensor, position: Tensor, banned: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return _step(self.model, self.model.embed(ids), position, banned, caches)


def _step(
    llama: Llama, embeds: Tensor, position: Tensor, banned: Tensor, caches: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    states, written = llama.step(embeds, position, pairs_of(caches))
    logits = llama.head(states[:, -1])
    return (*top_of(logits, banned), states, *(tensor for pair in written for tensor in pair), logits)


def _caches(config: LlamaConfig, suffix: str = "") -> tuple[TensorSpec, ...]:
    dims = ("R", config.kv_heads, "T", config.head_dim)
    return tuple(
        TensorSpec(f"self_{part}{suffix}.{layer}", dims) for layer in range(config.layers) for part in ("key", "value")
    )


def _step_outputs(config: LlamaConfig) -> tuple[TensorSpec, ...]:
    logits, states = TensorSpec("logits", ("R", config.vocab)), TensorSpec("states", ("R", "S", config.emb))
    return (*top_specs(config.vocab), states, *_caches(config, "_out"), logits)


def empty_caches(config: LlamaConfig, rows: int, capacity: int) -> dict[str, Tensor]:
    """Zeroed caches of the step graph by name, each [rows, Hkv, capacity, Dh]."""
    shape = (rows, config.kv_heads, capacity, config.head_dim)
    return {spec.name: torch.zeros(shape) for spec in _caches(config)}


def language_step_spec(config: LlamaConfig) -> GraphSpec[Llama]:
    """The step graph of a LLaMA alone: `ids` [R, S] in place of spliced embeddings."""
    new = (TensorSpec("ids", ("R", "S"), "int64"), TensorSpec("position", (1,), "int64"), BANNED)
    inputs = (*new, *_caches(config))
    parts = ("embed_tokens", "layers", "norm", "lm_head")
    return GraphSpec("decoder_step", inputs, _step_outputs(config), LanguageStep, parts)


def level_specs(config: GlammConfig) -> tuple[TensorSpec, ...]:
    """The maps that the region encoder reads, shallow first; none without it."""
    clip, levels = config.clip, config.region.levels if config.region else 0
    return tuple(TensorSpec(f"level.{i}", ("B", clip.grid, clip.grid, clip.embed_dim)) for i in range(levels))


def graph_specs(model: Glamm) -> dict[str, GraphSpec[Glamm]]:
    """The graphs that a model is cut into, by role, in the order of a request."""
    config = model.config
    clip, llama, size = config.clip, config.llama, config.image_size
    height, width = model.sam_encoder.grid, model.sam_encoder.grid
    sam = TensorSpec("sam", ("B", height, width, config.prompt_embed_dim))
    specs = [
        GraphSpec(
            "global_encoder",
            (TensorSpec("image", ("B", clip.image_size, clip.image_size, 3)),),
            (TensorSpec("features", ("B", clip.tokens, llama.emb)), *level_specs(config)),
            GlobalEncoder,
            ("clip", "projector"),
        )
    ]
    if config.region is not None:
        boxes = (TensorSpec("boxes", ("K", 4)), TensorSpec("image_index", ("K",), "int64"))
        specs.append(
            GraphSpec(
                "region_encoder",
                (*level_specs(config), *boxes),
                (TensorSpec("regions", ("K", llama.emb)),),
                RegionEncoder,
                ("region_encoder",),
            )
        )
    return {
        spec.role: spec
        for spec in (
            *specs,
            GraphSpec(
                "decoder_step",
                (
                    TensorSpec("ids", ("R", "S"), "int64"),
                    TensorSpec("visual", ("V", llama.emb)),
                    TensorSpec("embed_index", ("R", "S"), "int64"),
                    TensorSpec("position", (1,), "int64"),
                    BANNED,
                    *_caches(llama),
                ),
                _step_outputs(llama),
                DecoderStep,
                ("llama",),
            ),
            GraphSpec(
                "grounding_encoder",
                (TensorSpec("image", ("B", size, size, 3)), TensorSpec("valid_hw", ("B", 2))),
                (sam,),
                GroundingEncoder,
                ("sam_encoder",),
            ),
            GraphSpec(
                "pixel_decoder",
                (TensorSpec("states", ("M", llama.emb)), sam, TensorSpec("image_index", ("M",), "int64")),
                (TensorSpec("masks", ("M", 4 * height, 4 * width)), TensorSpec("iou", ("M",))),
                PixelDecoder,
                ("mask_projection", "prompt_encoder", "mask_decoder"),
            ),
        )
    }
