"""GLaMM put together (section 1). Every method is one stage of a request, so an export wraps one method per graph.

Letters in shapes: B pictures, s and S sides of CLIP's and of the grounding encoder's input, g side and T0 = g * g
tokens of CLIP's grid, C its width, h, w the grounding encoder's grid, P its width, D width of the language model,
R rows of text, K boxes, V visual embeddings, M masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deixis_train.models.config import SamVitConfig
from deixis_train.models.glamm.clip import ClipVision
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.eva_vision import EvaVision
from deixis_train.models.glamm.llama import Llama
from deixis_train.models.glamm.region_encoder import RegionEncoder
from deixis_train.models.layers import init_heads, init_vit
from deixis_train.models.mask import MaskDecoder
from deixis_train.models.preprocess import Preprocess
from deixis_train.models.prompt_encoder import PromptEncoder
from deixis_train.models.sam_vit import SamVit
from deixis_train.models.tiny_vit import TinyVit


class Glamm(nn.Module):
    """The whole model. `region_encoder` is None where the configuration has none."""

    region_encoder: RegionEncoder | None
    clip_mean: Tensor
    clip_std: Tensor

    def __init__(self, config: GlammConfig) -> None:
        super().__init__()
        self.config = config
        dim, width, prompt_dim = config.llama.emb, config.clip.embed_dim, config.prompt_embed_dim
        self.clip = EvaVision(config.clip) if config.clip.architecture == "eva02" else ClipVision(config.clip)
        self.projector = nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))
        self.region_layers = config.region_layers
        self.region_encoder = None
        if config.region is not None:
            self.region_encoder = RegionEncoder(config.region, width, config.clip.grid, dim, config.clip.patch_size)
        self.llama = Llama(config.llama)
        self.mask_projection = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, prompt_dim))
        if isinstance(config.sam, SamVitConfig):
            self.sam_encoder: SamVit | TinyVit = SamVit(config.sam, config.image_size)
        else:
            self.sam_encoder = TinyVit(config.sam, config.image_size)
        self.prompt_encoder = PromptEncoder(prompt_dim, config.image_size, config.mask_prompt_channels)
        self.mask_decoder = MaskDecoder(config.mask_decoder, prompt_dim)
        self.sam_preprocess = Preprocess(
            config.image_size, config.image_size, config.pixel_mean_sam, config.pixel_std_sam
        )
        self.register_buffer("clip_mean", torch.tensor(config.pixel_mean_clip), persistent=False)
        self.register_buffer("clip_std", torch.tensor(config.pixel_std_clip), persistent=False)
        self.init_weights()

    # ---- pictures

    def encode_global(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the language model sees of a picture (section 3).

        Args:
            image: [B, s, s, 3] float32 RGB 0..255, already resized and cut to the centre.

        Returns:
            Projected features [B, T0, D], row by row, and the hidden states for the region encoder [B, g, g, C],
            shallow first; none without one.
        """
        states = self.clip((image - self.clip_mean) / self.clip_std)
        grid = self.config.clip.grid
        levels = [states[i][:, 1:].unflatten(1, (grid, grid)) for i in self.region_layers]
        return self.projector(states[-1][:, 1:]), levels

    def encode_regions(self, levels: list[Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        """Embeddings of boxes (section 4).

        Args:
            levels: [B, g, g, C] each, of `encode_global`.
            boxes: XYXY as fractions of the whole picture's width and height, also where CLIP sees only its centre
                (quirk Q3): [K, 4].
            image_index: the picture of each box [K] int64.

        Returns:
            [K, D]. Raises ValueError if the model has no region encoder.
        """
        if self.region_encoder is None:
            raise ValueError(f"the model {self.config.name!r} has no region encoder")
        return self.region_encoder(levels, boxes, image_index)

    def encode_grounding(self, image: Tensor, valid_hw: Tensor) -> Tensor:
        """The map that masks are decoded from (section 6.3).

        Args:
            image: [B, S, S, 3] float32 RGB 0..255, padded right and bottom.
            valid_hw: real height and width [B, 2] in pixels of `image`.

        Returns:
            [B, h, w, P].
        """
        return self.sam_encoder(self.sam_preprocess(image, valid_hw))

    # ---- text

    def splice(self, ids: Tensor, visual: Tensor, embed_index: Tensor) -> Tensor:
        """Embeddings of text with those of pictures and regions in it (section 5.4).

        Args:
            ids: [R, S] integer, already expanded; what stands where `embed_index` says otherwise does not matter.
            visual: [V, D], V at least 1.
            embed_index: [R, S] int64: a row of `visual`, or -1 for the embedding of the id.

        Returns:
            [R, S, D].
        """
        words = self.llama.embed(ids.clamp(min=0))
        return torch.where((embed_index >= 0)[..., None], visual[embed_index.clamp(min=0)].to(words.dtype), words)

    # ---- masks

    def decode_masks(self, states: Tensor, sam: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of states of the language model (sections 6.2 to 6.5).

        Args:
            states: [M, D], after the final norm, at the positions that predict the mask token (quirk Q4).
            sam: [B, h, w, P] of `encode_grounding`.
            image_index: the picture of each mask [M] int64.

        Returns:
            Mask logits [M, 4h, 4w] over the padded input and predicted IoU [M].
        """
        sparse = self.mask_projection(states)[:, None]
        image_pe = self.prompt_encoder.dense_pe(*sam.shape[1:3])
        masks, iou = self.mask_decoder(sparse, sam[image_index], image_pe, self.prompt_encoder.no_mask())
        return masks[:, 0], iou[:, 0]

    # ---- weights

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values for training from nothing. The language model brings its own, and so does TinyViT."""
        self.clip.init_weights()
        if isinstance(self.sam_encoder, SamVit):
            init_vit(self.sam_encoder)
            nn.init.trunc_normal_(self.sam_encoder.pos_embed, std=0.02)
        for part in (self.projector, self.mask_projection, self.mask_decoder):
            init_heads(part)
