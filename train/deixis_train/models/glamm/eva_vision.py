"""EVA02 as the global encoder, in place of CLIP: our own choice for the demo, whose PixelLLM has a trained one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deixis_train.models.config import Eva02Config
from deixis_train.models.eva02 import Eva02
from deixis_train.models.glamm.config import ClipConfig
from deixis_train.models.layers import init_vit


class EvaVision(Eva02):
    """EVA02 that gives its hidden states as `ClipVision` does. Its parameters have the names of `Eva02`.

    Raises ValueError unless `select_layer` is the last state: the final norm belongs to that one alone.
    """

    def __init__(self, config: ClipConfig) -> None:
        if config.selected != config.depth:
            raise ValueError(f"EVA02 as the global encoder gives its last state: select_layer {config.select_layer}")
        sizes = Eva02Config(
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            mlp_ratio=config.mlp_dim / config.embed_dim,
            pretrain_img_size=config.image_size,
        )
        super().__init__(sizes, config.image_size)

    def forward(self, image: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hidden states of every depth.

        Args:
            image: normalised [B, s, s, 3], s = `config.image_size`.

        Returns:
            `config.depth` + 1 tensors [B, 1 + T0, C]: of the patches, then after every block, the last one normed. The
            class token comes first, patches follow row by row.
        """
        states = [self.embed(image)]
        for block in self.blocks:
            states.append(block(states[-1], self.rope_cos, self.rope_sin))
        return [*states[:-1], self.norm(states[-1])]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values for training from nothing: truncated normal of 0.02."""
        init_vit(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
