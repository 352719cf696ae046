"""EVA02 with the hidden LayerNorm (base and large) into `models.eva02.Eva02` (section 16.2).

Two namings are about: that of the original files (`attn.q_bias`, `mlp.w1`) and timm's, which folds the biases into the
projections and calls the gated MLP `fc1_g`, `fc1_x`, `norm`, `fc2`. Names are first brought to the original's.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from deixis_train.loaders.files import read_tensors
from deixis_train.loaders.report import CheckpointError, LoadReport, fill
from deixis_train.models.eva02 import Eva02

# Pattern over a whole name -> its name here. `fc_norm` is what timm calls the final norm of a classifier that pools.
RENAMED = (
    (r"(blocks\.\d+\.attn)\.([qv])_proj\.bias", r"\1.\2_bias"),
    (r"(blocks\.\d+\.mlp)\.fc1_g\.(weight|bias)", r"\1.w1.\2"),
    (r"(blocks\.\d+\.mlp)\.fc1_x\.(weight|bias)", r"\1.w2.\2"),
    (r"(blocks\.\d+\.mlp)\.norm\.(weight|bias)", r"\1.ffn_ln.\2"),
    (r"(blocks\.\d+\.mlp)\.fc2\.(weight|bias)", r"\1.w3.\2"),
    (r"fc_norm\.(weight|bias)", r"norm.\1"),
)
# Rotary buffers (ours follow the grid), the token of masked pre-training, and the heads.
IGNORED = re.compile(r"(.*\.)?rope\..*|mask_token|(lm_)?head\..*")


def canonical_name(name: str) -> str:
    """A name of either naming, in the original's."""
    for pattern, replacement in RENAMED:
        renamed, count = re.subn(rf"^{pattern}$", replacement, name)
        if count:
            return renamed
    return name


def load_eva02(path: Path, model: Eva02) -> LoadReport:
    """Fill the encoder from safetensors or a plain PyTorch state dict. The report speaks in the original's names.

    The small EVA02 sizes (tiny, small) are published without the LayerNorm on the hidden units and with fused
    projections: they are other functions, and the report lists what they lack.

    Raises:
        CheckpointError: unreadable, no EVA02, or the same parameter under both namings.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(path).items():
        ours = canonical_name(name)
        if ours in tensors:
            raise CheckpointError(f"{path}: {ours} is there twice, under two names")
        tensors[ours] = tensor
    if "patch_embed.proj.weight" not in tensors or "blocks.0.norm1.weight" not in tensors:
        raise CheckpointError(f"{path}: not an EVA02 checkpoint: no patch_embed.proj.weight or no blocks")
    names = {name: name for name in model.state_dict()}
    return fill(model, tensors, names, [name for name in tensors if IGNORED.fullmatch(name)])
