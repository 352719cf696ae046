"""The detector of dense object captioning (section 10): from fused features to boxes, and from boxes to captions."""

from deixis_train.models.box_decoder.box_decoder import BoxDecoder, DenseMaps, Detections
from deixis_train.models.box_decoder.proposals import Proposals

__all__ = ["BoxDecoder", "DenseMaps", "Detections", "Proposals"]
