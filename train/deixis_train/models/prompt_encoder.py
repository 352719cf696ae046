"""SAM's prompt encoder and the way PixelLLM forms prompts from boxes (section 5). Parameter names are SAM's own.

Masks as prompts: GLaMM specification, section 6.4. Neither model gives any by itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deixis_train.models.layers import LayerNorm2d

# Labels of prompt points. 0 to 3 are SAM's; the two negative ones replace the whole code of the point.
NO_MASK, NOT_A_POINT, NEGATIVE, POSITIVE, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -2, -1, 0, 1, 2, 3


class FourierCode(nn.Module):
    """Random Fourier features of a place in the unit square. The matrix is fixed, not trained."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, dim // 2))

    def forward(self, places: Tensor) -> Tensor:
        """Places (x, y) in 0..1 [..., 2] -> codes [..., dim]."""
        phase = 2 * math.pi * ((2 * places - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Turns labelled points into prompt tokens. Coordinates are pixels of the square, padded network input.

    mask_channels: width inside the part that takes masks as prompts, 16 in SAM; 0 leaves that part out.
    """

    mask_downscaling: nn.Sequential | None

    def __init__(self, dim: int, image_size: int, mask_channels: int = 0) -> None:
        super().__init__()
        self.image_size = image_size
        self.pe_layer = FourierCode(dim)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.no_mask_embed = nn.Embedding(1, dim)
        self.mask_downscaling = None
        if mask_channels:
            self.mask_downscaling = nn.Sequential(
                nn.Conv2d(1, mask_channels // 4, 2, stride=2),
                LayerNorm2d(mask_channels // 4, eps=1e-6),
                nn.GELU(),
                nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
                LayerNorm2d(mask_channels, eps=1e-6),
                nn.GELU(),
                nn.Conv2d(mask_channels, dim, 1),
            )

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """Encode prompts (section 5).

        Args:
            points: (x, y) pixels [R, P, 2] float32.
            labels: [R, P] int64: 0 negative, 1 positive, 2 top-left and 3 bottom-right of a box, -1 padding by "not a
                point", -2 padding by the "no mask" vector. The coordinates of the last two do not matter.

        Returns:
            Tokens [R, P, D].
        """
        kinds = [self.no_mask_embed, self.not_a_point_embed, *self.point_embeddings]
        table = torch.cat([kind.weight for kind in kinds])  # row = label + 2
        code = self.pe_layer((points + 0.5) / self.image_size)
        return code * (labels >= 0).to(code.dtype)[..., None] + table[labels + 2]

    def dense_pe(self, height: int, width: int) -> Tensor:
        """Codes of the centres of a grid that covers the whole input: [height, width, D]."""
        like = self.pe_layer.positional_encoding_gaussian_matrix
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self.pe_layer(places)

    def no_mask(self) -> Tensor:
        """The dense prompt that stands for "no mask given": [1, D], for every place of the grid."""
        return self.no_mask_embed.weight

    def embed_masks(self, masks: Tensor) -> Tensor:
        """The dense prompts of given masks, in place of `no_mask`.

        Args:
            masks: logits [R, 4h, 4w] over the padded network input, of the size that the mask decoder gives.

        Returns:
            [R, h, w, D]. Raises ValueError if the encoder has no part for masks.
        """
        if self.mask_downscaling is None:
            raise ValueError("this prompt encoder takes no masks")
        return self.mask_downscaling(masks[:, None]).permute(0, 2, 3, 1)


def _labels(boxes: Tensor, row: list[int]) -> Tensor:
    return torch.tensor(row, dtype=torch.int64, device=boxes.device).expand(boxes.shape[0], -1)


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """A box as SAM itself prompts with it: boxes XYXY [R, 4] -> points [R, 2, 2], labels [R, 2]."""
    return boxes.unflatten(1, (2, 2)), _labels(boxes, [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])


def box_prompt(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The box variant: two corners, filled up to five by the "no mask" vector.

    Boxes XYXY px [R, 4] -> points [R, 5, 2], labels [R, 5].
    """
    points = torch.cat([boxes.unflatten(1, (2, 2)), boxes.new_zeros(boxes.shape[0], 3, 2)], dim=1)
    return points, _labels(boxes, [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, NO_MASK, NO_MASK, NO_MASK])


def corner_prompt(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The point variant: the four corners as positive points, row by row, and SAM's padding point.

    Boxes XYXY px [R, 4] -> points [R, 5, 2], labels [R, 5].
    """
    points = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(1, (4, 2))
    points = torch.cat([points, boxes.new_zeros(boxes.shape[0], 1, 2)], dim=1)
    return points, _labels(boxes, [POSITIVE] * 4 + [NOT_A_POINT])


def pixelllm_prompt(boxes: Tensor, use_box_rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """PixelLLM's prompt for a box: the box variant where any coordinate is above 0, the point variant elsewhere.

    `use_box_rate` = 0 gives the point variant throughout.
    Boxes XYXY px [R, 4] -> points [R, 5, 2], labels [R, 5].
    """
    point_places, point_labels = corner_prompt(boxes)
    if use_box_rate <= 0:
        return point_places, point_labels
    box_places, box_labels = box_prompt(boxes)
    as_box = (boxes.amax(dim=1) > 0)[:, None]
    return torch.where(as_box[..., None], box_places, point_places), torch.where(as_box, box_labels, point_labels)
