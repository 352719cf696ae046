"""The box decoder: two stages, cut where an export cuts them (section 10).

`dense` and `roi` are plain networks. `select` and `finish`, between and behind them, are the irregular part: sorting
and suppression. Letters in shapes: B pictures, g side of the fused grid, C its channels, D channels of the pyramid,
T places of all levels, K proposals, N detections. Boxes are XYXY px of the padded network input.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deixis_train.models.box_decoder.centernet import CenterNetHead, boxes_at
from deixis_train.models.box_decoder.proposals import (
    Proposals,
    by_score,
    clip_boxes,
    peaks,
    suppress,
)
from deixis_train.models.box_decoder.pyramid import FeaturePyramid
from deixis_train.models.box_decoder.roi import RoiHead, apply_deltas, roi_align, roi_levels
from deixis_train.models.config import BoxDecoderConfig


class DenseMaps(NamedTuple):
    """What the first stage predicts everywhere.

    pyramid: maps [B, D, h, w] of P3 to P7. heatmap: logits [B, T]. regression: distances from each place to the sides
    (left, top, right, bottom) in strides of its level [B, T, 4].
    """

    pyramid: list[Tensor]
    heatmap: Tensor
    regression: Tensor

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each level; their places make up T."""
        return [(level.shape[2], level.shape[3]) for level in self.pyramid]


class Detections(NamedTuple):
    """Objects found, best first.

    boxes: [B, N, 4], inside the padded input; zeros where a slot is empty. scores: [B, N]; above 0 for detections, -1
    for boxes that scored too little, 0 for empty slots. num_detections: per picture [B] int64.
    """

    boxes: Tensor
    scores: Tensor
    num_detections: Tensor


def nominal_strides(image_size: int, grid: int, levels: int = 5) -> tuple[int, ...]:
    """Strides of P3 to P7 for a grid over a picture, px: P4 is the grid, with its stride rounded up to a power of two.

    A grid of 27 over 384 px has 14.2 px and counts as 16, so the levels are 8, 16, 32, 64 and 128.
    """
    of_grid = 1 << max(1, math.ceil(math.log2(image_size / grid)))
    return tuple((of_grid // 2) << level for level in range(levels))


class BoxDecoder(nn.Module):
    """Finds objects in fused features [B, g, g, C].

    Attributes:
        strides: nominal strides of P3 to P7, px.
        image_size: side of the padded network input, px; boxes are clipped to it.
    """

    def __init__(self, config: BoxDecoderConfig, dim_in: int, image_size: int, grid: int) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.strides = config.strides or nominal_strides(image_size, grid)
        self.pyramid = FeaturePyramid(dim_in, config.up_channels, config.channels)
        self.head = CenterNetHead(config.channels, config.tower_channels, len(self.strides))
        self.roi_head = RoiHead(config.channels, config.fc_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Start values for training from nothing."""
        for module in self.pyramid.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head.init_weights()
        self.roi_head.init_weights()

    def dense(self, features: Tensor) -> DenseMaps:
        """The first stage everywhere: fused features [B, g, g, C] -> pyramid, heatmap and regression."""
        pyramid = self.pyramid(features)
        return DenseMaps(pyramid, *self.head(pyramid))

    def boxes(self, maps: DenseMaps) -> Tensor:
        """The box that each place predicts, not clipped: [B, T, 4]."""
        return boxes_at(maps.regression, maps.shapes, self.strides)

    def select(self, maps: DenseMaps, training: bool = False) -> Proposals:
        """The most promising boxes of the first stage, clipped to the input.

        Args:
            maps: output of `dense`.
            training: take the larger numbers of candidates and of proposals that training samples from.

        Returns:
            K proposals per picture: `post_nms_train` or `post_nms_test` of the configuration. They carry no gradient.
        """
        config = self.config
        before, after = (
            (config.pre_nms_train, config.post_nms_train) if training else (config.pre_nms_test, config.post_nms_test)
        )
        with torch.no_grad():
            boxes, scores = peaks(self.boxes(maps), maps.heatmap.float(), before)
            boxes, scores = suppress(boxes, scores, config.proposal_iou, after)
            return Proposals(clip_boxes(boxes, self.image_size), scores)

    def roi(self, pyramid: list[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The second stage on given boxes [B, K, 4]: logits (background, object) [B, K, 2], deltas [B, K, 4]."""
        return self.roi_head(roi_align(pyramid, boxes, roi_levels(boxes, self.strides), self.strides))

    def finish(self, proposals: Proposals, logits: Tensor, deltas: Tensor) -> Detections:
        """Detections from proposals and what `roi` says of them.

        The score is the geometric mean of both stages' scores.
        """
        config = self.config
        boxes = clip_boxes(apply_deltas(proposals.boxes, deltas.float()), self.image_size)
        scores = (logits.float().softmax(dim=-1)[..., 1] * proposals.scores).sqrt()
        scores = torch.where(scores > config.score_threshold, scores, -1.0)
        boxes, scores = by_score(boxes, scores, scores.shape[1])
        boxes, scores = suppress(boxes, scores, config.detection_iou, config.max_detections)
        boxes = torch.where((scores == 0)[..., None], 0.0, boxes)
        return Detections(boxes, scores, (scores > 0).sum(dim=1))

    def forward(self, features: Tensor) -> Detections:
        """Fused features [B, g, g, C] -> the N = `max_detections` best boxes of each picture."""
        maps = self.dense(features)
        proposals = self.select(maps)
        return self.finish(proposals, *self.roi(maps.pyramid, proposals.boxes))
