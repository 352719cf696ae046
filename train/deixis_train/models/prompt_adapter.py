"""The prompt extractor: reads out of the fused features what a prompt asks for (section 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deixis_train.models.config import PromptAdapterConfig
from deixis_train.models.two_way import TwoWayTransformer


class PromptAdapter(nn.Module):
    """Learned query tokens and the prompt's tokens look at the image together; the former become the visual prefix.

    Every query has an output Linear of its own; they are kept as one batched matrix.
    """

    def __init__(self, config: PromptAdapterConfig, prompt_dim: int, image_dim: int) -> None:
        super().__init__()
        dim = config.transformer_dim
        self.output_tokens = nn.Parameter(torch.zeros(config.num_outputs, dim))
        self.image_projection = nn.Linear(image_dim, dim)
        same = prompt_dim == dim  # then prompts and position codes are taken as they are
        self.image_pe_projection = nn.Identity() if same else nn.Linear(prompt_dim, dim)
        self.prompt_projection = nn.Identity() if same else nn.Linear(prompt_dim, dim)
        self.transformer = TwoWayTransformer(config.depth, dim, config.num_heads, config.mlp_dim)
        self.output_weight = nn.Parameter(torch.zeros(config.num_outputs, dim, config.output_dim))
        self.output_bias = nn.Parameter(torch.zeros(config.num_outputs, config.output_dim))
        self.dense_output_projection = nn.Linear(dim, config.output_dim)  # read only when `prompt_fuse` is dense

    def _run(
        self, features: Tensor, image_index: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor]:
        image = (self.image_projection(features) + self.prompt_projection(dense)).flatten(1, 2)
        queries = self.output_tokens.expand(sparse.shape[0], -1, -1)
        tokens = torch.cat([queries, self.prompt_projection(sparse)], dim=1)
        image_code = self.image_pe_projection(image_pe).flatten(0, 1)
        return self.transformer(image[image_index], image_code, tokens)

    def forward(self, features: Tensor, image_index: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor) -> Tensor:
        """Extract one prefix per prompt.

        Args:
            features: fused maps [B, h, w, image_dim].
            image_index: which image a prompt belongs to, [R] int64.
            image_pe: position code of the grid [h, w, prompt_dim].
            sparse: prompt tokens [R, P, prompt_dim].
            dense: dense prompt [1, prompt_dim], the same everywhere.

        Returns:
            [R, num_outputs, output_dim].
        """
        tokens, _ = self._run(features, image_index, image_pe, sparse, dense)
        count = self.output_tokens.shape[0]
        out = tokens[:, :count].transpose(0, 1) @ self.output_weight + self.output_bias[:, None]
        return out.transpose(0, 1)

    def dense_output(
        self, features: Tensor, image_index: Tensor, image_pe: Tensor, sparse: Tensor, dense: Tensor
    ) -> Tensor:
        """The image side of the same run, [R, h, w, output_dim]. The prefix of models whose `prompt_fuse` is dense."""
        _, image = self._run(features, image_index, image_pe, sparse, dense)
        return self.dense_output_projection(image).unflatten(1, features.shape[1:3])


class VisualProjection(nn.Sequential):
    """From the extractor's width to the language model's: Linear and LayerNorm."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(nn.Linear(dim_in, dim_out), nn.LayerNorm(dim_out, eps=1e-5))
