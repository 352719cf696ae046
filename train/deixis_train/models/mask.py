"""Referring masks: the mask adapter and SAM's mask decoder (section 9). The decoder's parameter names are SAM's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deixis_train.models.config import MaskAdapterConfig, MaskDecoderConfig
from deixis_train.models.layers import MLP, LayerNorm2d
from deixis_train.models.two_way import TwoWayTransformer


class MaskAdapter(nn.Module):
    """What the words and the visual prefix change about the two corner tokens of a box prompt (section 9.2).

    The gate starts at 0, so an untrained adapter leaves SAM as it is.
    """

    def __init__(self, config: MaskAdapterConfig, dim: int, text_dim: int) -> None:
        super().__init__()
        self.output_tokens = nn.Parameter(torch.zeros(config.num_outputs, dim))
        self.gate = nn.Parameter(torch.zeros(config.num_outputs, dim)) if config.gating else None
        self.visual_projection = nn.Sequential(nn.LayerNorm(text_dim, eps=1e-6), nn.Linear(text_dim, dim))
        self.textual_projection = nn.Sequential(nn.LayerNorm(text_dim, eps=1e-6), nn.Linear(text_dim, dim))
        self.transformer = TwoWayTransformer(config.depth, dim, config.num_heads, config.mlp_dim)

    def forward(self, visual: Tensor, text_features: Tensor) -> Tensor:
        """Visual prefix [R, Q, E], features of all text positions [R, L, E] -> [R, 2, D] to add to the corners."""
        keys = torch.cat([self.visual_projection(visual), self.textual_projection(text_features)], dim=1)
        tokens = self.output_tokens.expand(keys.shape[0], -1, -1)
        delta, _ = self.transformer(keys, 0.0, tokens)
        return delta if self.gate is None else delta * self.gate.tanh()


class MaskDecoder(nn.Module):
    """SAM's mask decoder (section 9.3). It always computes all masks; the caller chooses among them."""

    HYPERNETWORK_DEPTH = 3

    def __init__(self, config: MaskDecoderConfig, dim: int) -> None:
        super().__init__()
        self.num_masks = config.num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_masks, dim)
        self.transformer = TwoWayTransformer(config.transformer_depth, dim, config.num_heads, config.mlp_dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        hidden = config.mask_head_hidden_dim or config.iou_head_hidden_dim  # all the same in the published SAM
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(dim, hidden, dim // 8, self.HYPERNETWORK_DEPTH) for _ in range(self.num_masks)
        )
        self.iou_prediction_head = MLP(dim, config.iou_head_hidden_dim, self.num_masks, config.iou_head_depth)

    def forward(self, sparse: Tensor, image: Tensor, image_pe: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the masks of every prompt.

        Args:
            sparse: prompt tokens [R, P, D].
            image: SAM map of every prompt's image [R, h, w, D].
            image_pe: position code of the grid [h, w, D].
            dense: dense prompt [1, D].

        Returns:
            Mask logits [R, 4, 4h, 4w] and predicted IoU [R, 4]. Index 0 is the mask for an unambiguous prompt (PixelLLM
            uses only that); 1 to 3 are the alternatives for an ambiguous one.
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        tokens, places = self.transformer((image + dense).flatten(1, 2), image_pe.flatten(0, 1), tokens)
        places = places.transpose(1, 2).unflatten(2, image.shape[1:3])  # channels first for the convolutions
        fine = self.output_upscaling(places)  # [R, D / 8, 4h, 4w]
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = (torch.stack(weights, dim=1) @ fine.flatten(2)).unflatten(2, fine.shape[2:])
        return masks, self.iou_prediction_head(tokens[:, 0])
