"""The graphs of the `pixelllm` family: one small module per role, with the named inputs and outputs of docs/bundle.md.

A module here only re-arranges arguments: flat lists of caches instead of pairs, float masks instead of booleans. What
it computes is a method of `PixelLLM`. Tensors keep their logical names in the files.
"""

from __future__ import annotations

from torch import Tensor

from deixis_export.graph_spec import GraphSpec, TensorSpec, View, pairs_of, run_torch
from deixis_export.step_head import BANNED, top_of, top_specs
from deixis_train.models.config import PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM

__all__ = ["GraphSpec", "TensorSpec", "graph_specs", "run_torch", "shared_roles"]

_View = View[PixelLLM]


class SemanticEncoder(_View):
    def forward(self, image: Tensor, valid_hw: Tensor) -> Tensor:
        return self.model.encode_semantic(image, valid_hw)


class SamEncoder(_View):
    def forward(self, image: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor]:
        on_grid, own = self.model.encode_sam(image, valid_hw)
        # A graph may not have the same tensor as two outputs, which is what equal grids would give.
        return own, on_grid if on_grid is not own else own + 0.0


class PromptExtractor(_View):
    def forward(self, features: Tensor, image_index: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return self.model.extract_prompt(features, image_index, points, labels)


class TextEncoder(_View):
    def forward(self, visual_prefix: Tensor, context_ids: Tensor) -> tuple[Tensor, ...]:
        encoded, valid = self.model.text.encode(visual_prefix, context_ids)
        cross = [tensor for pair in self.model.text.cross_kv(encoded) for tensor in pair]
        return (valid.to(encoded.dtype), *cross)


class DecoderStep(_View):
    def forward(
        self, ids: Tensor, position: Tensor, banned: Tensor, encoder_mask: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        pairs = pairs_of(caches)
        cross, own = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        logits, features, written = self.model.text.step(ids, position, own, cross, encoder_mask > 0.5)
        places = _locations(self.model, features)
        return (*top_of(logits, banned), features, *places, *(tensor for pair in written for tensor in pair), logits)


class DecoderPass(_View):
    def forward(self, ids: Tensor, encoder_mask: Tensor, *cross: Tensor) -> tuple[Tensor, ...]:
        _, features = self.model.text.decode(ids, None, encoder_mask > 0.5, cross=pairs_of(cross), with_logits=False)
        return (features, *_locations(self.model, features))


class MaskAdapter(_View):
    def forward(self, visual_prefix: Tensor, features: Tensor) -> Tensor:
        assert self.model.mask_adapter is not None
        return self.model.mask_adapter(visual_prefix, features)


class MaskDecoder(_View):
    def forward(
        self, sam: Tensor, image_index: Tensor, points: Tensor, labels: Tensor, prompt_delta: Tensor
    ) -> tuple[Tensor, Tensor]:
        sparse = self.model.prompt_encoder(points, labels) + prompt_delta
        return self.model.decode_masks(sam, image_index, sparse)


class BoxProposals(_View):
    """The detector's first stage. Which places become proposals is for the reader: it sorts, and that is no graph."""

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        assert self.model.box_decoder is not None
        maps = self.model.box_decoder.dense(features)
        return (*maps.pyramid, maps.heatmap, self.model.box_decoder.boxes(maps))


class BoxRefine(_View):
    """The detector's second stage on the boxes that are left."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *pyramid, boxes = inputs
        assert self.model.box_decoder is not None
        return self.model.box_decoder.roi(pyramid, boxes)


def _locations(model: PixelLLM, features: Tensor) -> tuple[Tensor, ...]:
    return () if model.point_predictor is None else (model.locate(features),)


def _pyramid_sides(grid: int) -> tuple[int, ...]:
    """Sides of the levels P3 to P7 over a fused grid (section 10)."""
    p5 = grid // 2
    p6 = (p5 + 1) // 2
    return (2 * grid, grid, p5, p6, (p6 + 1) // 2)


def _caches(kind: str, config: PixelLLMConfig, rows: str, length: str, suffix: str = "") -> tuple[TensorSpec, ...]:
    dims = (rows, config.text.heads, length, config.text.head_dim)
    return tuple(
        TensorSpec(f"{kind}_{part}{suffix}.{layer}", dims)
        for layer in range(config.text.layers)
        for part in ("key", "value")
    )


def shared_roles(model: PixelLLM) -> tuple[str, ...]:
    """Graphs that share one file of weights."""
    decoder = ("decoder_step", "decoder_pass")
    return ("text_encoder", *decoder) if model.text.encoder_shares_weights else decoder


def graph_specs(model: PixelLLM) -> dict[str, GraphSpec[PixelLLM]]:
    """The graphs that a model is cut into, by role, in the order of a request."""
    config = model.config
    size, grid, sam = config.image_size, model.grid, model.sam_grid
    c1, c2, width = config.semantic.embed_dim, config.sam.out_chans, config.text.emb
    queries = grid * grid if config.prompt_fuse == "dense" else config.prompt_adapter.num_outputs
    prompt = config.prompt_embed_dim

    image = (TensorSpec("image", ("B", size, size, 3)), TensorSpec("valid_hw", ("B", 2)))
    index = TensorSpec("image_index", ("R",), "int64")
    points = (TensorSpec("points", ("R", "P", 2)), TensorSpec("labels", ("R", "P"), "int64"))
    cross = (TensorSpec("encoder_mask", ("N", "E")), *_caches("cross", config, "N", "E"))

    def text_outputs(rows: str, length: str) -> tuple[TensorSpec, ...]:
        features = TensorSpec("features", (rows, length, width))
        if config.point_predictor is None:
            return (features,)
        return (features, TensorSpec("locations", (rows, length, config.point_predictor.num_output_points, 2)))

    specs = [
        GraphSpec(
            "semantic_encoder",
            image,
            (TensorSpec("semantic", ("B", grid, grid, c1)),),
            SemanticEncoder,
            ("semantic_encoder",),
        ),
        GraphSpec(
            "sam_encoder",
            image,
            (TensorSpec("sam", ("B", sam, sam, c2)), TensorSpec("sam_on_grid", ("B", grid, grid, c2))),
            SamEncoder,
            ("sam_encoder",),
        ),
        GraphSpec(
            "prompt_extractor",
            (TensorSpec("features", ("B", grid, grid, c1 + c2)), index, *points),
            (TensorSpec("visual_prefix", ("R", queries, width)),),
            PromptExtractor,
            ("prompt_encoder", "prompt_adapter", "visual_projection"),
        ),
        GraphSpec(
            "text_encoder",
            (TensorSpec("visual_prefix", ("N", queries, width)), TensorSpec("context_ids", ("N", "C"), "int64")),
            cross,
            TextEncoder,
            ("text",),
        ),
        GraphSpec(
            "decoder_step",
            (
                TensorSpec("ids", ("R", "S"), "int64"),
                TensorSpec("position", (1,), "int64"),
                BANNED,
                *cross,
                *_caches("self", config, "R", "T"),
            ),
            (
                *top_specs(config.text.vocab),
                *text_outputs("R", "S"),
                *_caches("self", config, "R", "T", "_out"),
                TensorSpec("logits", ("R", config.text.vocab)),
            ),
            DecoderStep,
            ("text", "point_predictor"),
        ),
        GraphSpec(
            "decoder_pass",
            (TensorSpec("ids", ("N", "L"), "int64"), *cross),
            text_outputs("N", "L"),
            DecoderPass,
            ("text", "point_predictor"),
        ),
    ]
    if config.mask_adapter is not None:
        prefix = TensorSpec("visual_prefix", ("R", queries, width))
        delta = TensorSpec("prompt_delta", ("R", config.mask_adapter.num_outputs, prompt))
        inputs = (prefix, TensorSpec("features", ("R", "L", width)))
        specs.append(GraphSpec("mask_adapter", inputs, (delta,), MaskAdapter, ("mask_adapter",)))
    if config.mask_decoder is not None:
        masks = config.mask_decoder.num_multimask_outputs + 1
        specs.append(
            GraphSpec(
                "mask_decoder",
                (
                    TensorSpec("sam", ("B", sam, sam, c2)),
                    index,
                    *points,
                    TensorSpec("prompt_delta", ("R", "P", prompt)),
                ),
                (TensorSpec("masks", ("R", masks, 4 * sam, 4 * sam)), TensorSpec("iou", ("R", masks))),
                MaskDecoder,
                ("prompt_encoder", "mask_decoder"),
            )
        )
    if model.box_decoder is not None:
        pyramid = tuple(
            TensorSpec(f"p{level}", ("B", model.box_decoder.config.channels, side, side))
            for level, side in enumerate(_pyramid_sides(grid), start=3)
        )
        places = sum(side * side for side in _pyramid_sides(grid))
        specs += [
            GraphSpec(
                "box_proposals",
                (TensorSpec("features", ("B", grid, grid, c1 + c2)),),
                (*pyramid, TensorSpec("heatmap", ("B", places)), TensorSpec("boxes", ("B", places, 4))),
                BoxProposals,
                ("box_decoder",),
            ),
            GraphSpec(
                "box_refine",
                (*pyramid, TensorSpec("boxes", ("B", "O", 4))),
                (TensorSpec("logits", ("B", "O", 2)), TensorSpec("deltas", ("B", "O", 4))),
                BoxRefine,
                ("box_decoder",),
            ),
        ]
    return {spec.role: spec for spec in specs}
