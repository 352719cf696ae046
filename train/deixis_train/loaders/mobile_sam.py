"""MobileSAM's checkpoint (`mobile_sam.pt`): a TinyViT encoder beside SAM's own prompt encoder and mask decoder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deixis_train.loaders.report import LoadReport
from deixis_train.loaders.sam import IMAGE_ENCODER, MASK_DECODER, PROMPT_ENCODER, UNUSED, load_parts
from deixis_train.models.tiny_vit import TinyVit

# The ImageNet classifier the encoder was once trained with.
CLASSIFIER = (IMAGE_ENCODER + "norm_head.", IMAGE_ENCODER + "head.")


def load_mobile_sam(
    path: Path,
    sam_encoder: TinyVit | None = None,
    prompt_encoder: nn.Module | None = None,
    mask_decoder: nn.Module | None = None,
) -> LoadReport:
    """Fill the parts given; names of parts not given count as ignored. The encoder must not be fused yet.

    Raises:
        CheckpointError: the file cannot be read or holds nothing of SAM's.
    """
    parts = {IMAGE_ENCODER: sam_encoder, PROMPT_ENCODER: prompt_encoder, MASK_DECODER: mask_decoder}
    return load_parts(path, "MobileSAM", parts, UNUSED + CLASSIFIER)
