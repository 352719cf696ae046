"""PixelLLM put together (section 1). Every method is one stage of a request, so an export wraps one method per graph.

Letters in shapes: B pictures, S `image_size`, g side of the fused grid, h side of the SAM grid, C1 and C2 widths of the
semantic and the SAM map, R prompts (rows), P points of a prompt, Q visual tokens, E width of the text model,
L text length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deixis_train.models.bert_text import BertText
from deixis_train.models.box_decoder import BoxDecoder, Detections
from deixis_train.models.config import PixelLLMConfig, SamVitConfig, T5Config
from deixis_train.models.eva02 import Eva02
from deixis_train.models.layers import init_heads, init_vit
from deixis_train.models.mask import MaskAdapter, MaskDecoder
from deixis_train.models.point_head import PointPredictor
from deixis_train.models.preprocess import Preprocess
from deixis_train.models.prompt_adapter import PromptAdapter, VisualProjection
from deixis_train.models.prompt_encoder import PromptEncoder, corners
from deixis_train.models.resample import Resize
from deixis_train.models.sam_vit import SamVit
from deixis_train.models.t5 import T5
from deixis_train.models.tiny_vit import TinyVit


class Scene(NamedTuple):
    """An encoded batch of pictures; any number of prompts can be asked about it."""

    semantic: Tensor  # [B, g, g, C1], on the fused grid
    sam_on_grid: Tensor  # [B, g, g, C2], on the fused grid
    sam: Tensor  # [B, h, h, C2], as the mask decoder takes it


class PixelLLM(nn.Module):
    """The whole model. Parts that the configuration sets to None are None here.

    All coordinates are pixels of the square, padded network input of `config.image_size`, except the fractions that
    `point_predictor` returns.
    """

    text: T5 | BertText
    point_predictor: PointPredictor | None
    mask_decoder: MaskDecoder | None
    mask_adapter: MaskAdapter | None
    box_decoder: BoxDecoder | None

    def __init__(self, config: PixelLLMConfig) -> None:
        super().__init__()
        self.config = config
        semantic_size = config.semantic_size or config.image_size
        sam_size = config.sam_size or config.image_size
        self.semantic_preprocess = Preprocess(
            config.image_size, semantic_size, config.pixel_mean_semantic, config.pixel_std_semantic
        )
        self.sam_preprocess = Preprocess(config.image_size, sam_size, config.pixel_mean_sam, config.pixel_std_sam)
        self.semantic_encoder = Eva02(config.semantic, semantic_size)
        if isinstance(config.sam, SamVitConfig):
            self.sam_encoder: SamVit | TinyVit = SamVit(config.sam, sam_size)
        else:
            self.sam_encoder = TinyVit(config.sam, sam_size)
        semantic_grid, self.sam_grid = self.semantic_encoder.grid, self.sam_encoder.grid
        self.grid = max(semantic_grid, self.sam_grid) if config.fusion_grid == "largest" else semantic_grid
        self.semantic_resize = Resize(semantic_grid, self.grid, "cubic")
        self.sam_resize = Resize(self.sam_grid, self.grid, "cubic")

        dim, text_dim = config.prompt_embed_dim, config.text.emb
        self.prompt_encoder = PromptEncoder(dim, config.image_size)
        fused = config.semantic.embed_dim + config.sam.out_chans
        self.prompt_adapter = PromptAdapter(config.prompt_adapter, dim, fused)
        self.visual_projection = VisualProjection(config.prompt_adapter.output_dim, text_dim)
        self.text = _text_head(config)
        self.point_predictor = PointPredictor(config.point_predictor, text_dim) if config.point_predictor else None
        self.mask_decoder = MaskDecoder(config.mask_decoder, dim) if config.mask_decoder else None
        self.mask_adapter = MaskAdapter(config.mask_adapter, dim, text_dim) if config.mask_adapter else None
        self.init_weights()
        # Last, so that a seed gives the other parts the same values with and without it. It initialises itself.
        self.box_decoder = None
        if config.box_decoder is not None:
            self.box_decoder = BoxDecoder(config.box_decoder, fused, config.image_size, self.grid)

    @property
    def t5(self) -> T5:
        """The text head, for what only T5 can do. Raises ValueError if it is another."""
        if not isinstance(self.text, T5):
            raise ValueError(f"the text head of model {self.config.name!r} is not a T5")
        return self.text

    # ---- pictures

    def encode_semantic(self, image: Tensor, valid_hw: Tensor) -> Tensor:
        """Image [B, S, S, 3] float32 RGB 0..255 and its real (height, width) [B, 2] px -> [B, g, g, C1]."""
        return self.semantic_resize(self.semantic_encoder(self.semantic_preprocess(image, valid_hw)))

    def encode_sam(self, image: Tensor, valid_hw: Tensor) -> tuple[Tensor, Tensor]:
        """The same picture -> SAM's map on the fused grid [B, g, g, C2] and on its own [B, h, h, C2]."""
        sam = self.sam_encoder(self.sam_preprocess(image, valid_hw))
        return self.sam_resize(sam), sam

    def encode_image(self, image: Tensor, valid_hw: Tensor) -> Scene:
        """Encode pictures (sections 2 to 4).

        Args:
            image: [B, S, S, 3] float32, RGB 0..255, padded right and bottom.
            valid_hw: real height and width [B, 2], float32, in pixels of `image`.
        """
        sam_on_grid, sam = self.encode_sam(image, valid_hw)
        return Scene(self.encode_semantic(image, valid_hw), sam_on_grid, sam)

    def features(self, scene: Scene) -> Tensor:
        """Fused features of a scene, semantic channels first (section 2.3): [B, g, g, C1 + C2]."""
        return torch.cat([scene.semantic, scene.sam_on_grid], dim=-1)

    # ---- prompts and words

    def extract_prompt(self, features: Tensor, image_index: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """The visual prefix of every prompt (sections 5 and 6).

        Args:
            features: fused maps [B, g, g, C1 + C2].
            image_index: the picture of each prompt [R] int64.
            points: (x, y) px [R, P, 2] float32.
            labels: [R, P] int64, see `PromptEncoder.forward`; `prompt_encoder.pixelllm_prompt` makes both from boxes.

        Returns:
            [R, Q, E], the first part of the text encoder's input: the learned output tokens, or with `prompt_fuse`
            "dense" every place of the grid, row by row.
        """
        sparse = self.prompt_encoder(points, labels)
        image_pe = self.prompt_encoder.dense_pe(self.grid, self.grid)
        dense = self.prompt_encoder.no_mask()
        if self.config.prompt_fuse == "dense":
            out = self.prompt_adapter.dense_output(features, image_index, image_pe, sparse, dense).flatten(1, 2)
        else:
            out = self.prompt_adapter(features, image_index, image_pe, sparse, dense)
        return self.visual_projection(out)

    def locate(self, features: Tensor) -> Tensor:
        """Text features [R, L, E] -> points [R, L, 2, 2] as fractions of the real width and height (section 8)."""
        if self.point_predictor is None:
            raise ValueError(f"the model {self.config.name!r} has no point predictor")
        return self.point_predictor(features)

    # ---- boxes

    def detect(self, features: Tensor) -> Detections:
        """Objects by the box decoder (section 10): fused features [B, g, g, C1 + C2] -> boxes and scores."""
        if self.box_decoder is None:
            raise ValueError(f"the model {self.config.name!r} has no box decoder")
        return self.box_decoder(features)

    # ---- masks

    def decode_masks(self, sam: Tensor, image_index: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's mask decoder on prompt tokens.

        Args:
            sam: SAM maps [B, h, h, C2].
            image_index: the picture of each prompt [R] int64.
            sparse: prompt tokens [R, P, D] of `prompt_encoder`.

        Returns:
            Mask logits [R, 4, 4h, 4h] over the padded input and predicted IoU [R, 4]; index 0 is the one mask of an
            unambiguous prompt, 1 to 3 are the alternatives for an ambiguous one.
        """
        if self.mask_decoder is None:
            raise ValueError(f"the model {self.config.name!r} has no mask decoder")
        image_pe = self.prompt_encoder.dense_pe(self.sam_grid, self.sam_grid)
        return self.mask_decoder(sparse, sam[image_index], image_pe, self.prompt_encoder.no_mask())

    def mask(
        self, sam: Tensor, image_index: Tensor, boxes: Tensor, visual: Tensor, text_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The referring mask of a predicted box (section 9); without a mask adapter the box alone prompts the decoder.

        Args:
            sam: SAM maps [B, h, h, C2].
            image_index: the picture of each prompt [R] int64.
            boxes: XYXY px [R, 4], not clipped.
            visual: visual prefix [R, Q, E].
            text_features: features of all text positions, padding included [R, L, E].

        Returns:
            Mask logits [R, 4h, 4h] over the padded input and predicted IoU [R].
        """
        sparse = self.prompt_encoder(*corners(boxes))
        if self.mask_adapter is not None:
            sparse = sparse + self.mask_adapter(visual, text_features)
        masks, iou = self.decode_masks(sam, image_index, sparse)
        return masks[:, 0], iou[:, 0]

    # ---- weights

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values for training from nothing.

        The ViT encoders get the usual truncated normal of 0.02; the two-way transformers and heads, narrow as they are,
        keep the variance instead (Xavier). The text model and TinyViT bring their own.
        """
        for encoder in (self.semantic_encoder, self.sam_encoder):
            if not isinstance(encoder, TinyVit):
                init_vit(encoder)
                nn.init.trunc_normal_(encoder.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.semantic_encoder.cls_token, std=0.02)

        heads = (
            self.prompt_adapter,
            self.visual_projection,
            self.point_predictor,
            self.mask_adapter,
            self.mask_decoder,
        )
        for part in heads:
            if part is not None:
                init_heads(part)
        nn.init.normal_(self.prompt_adapter.output_tokens)
        bound = (6 / sum(self.prompt_adapter.output_weight.shape[1:])) ** 0.5
        nn.init.uniform_(self.prompt_adapter.output_weight, -bound, bound)
        if self.mask_adapter is not None:
            nn.init.normal_(self.mask_adapter.output_tokens)


def _text_head(config: PixelLLMConfig) -> T5 | BertText:
    """Raises ValueError for texts that the head has no positions for."""
    head, longest = config.text, max(config.max_caption_length, config.refer_length, config.context_length)
    if head.max_positions is not None and longest > head.max_positions:
        raise ValueError(
            f"the text head of model {config.name!r} has {head.max_positions} positions, fewer than the {longest} of "
            "the longest text"
        )
    return T5(head) if isinstance(head, T5Config) else BertText(head)
