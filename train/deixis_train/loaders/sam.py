"""SAM's published checkpoints (`.pth`; ViT-B, ViT-L, ViT-H) into PixelLLM's SAM parts (section 16.2).

The file keeps three modules under `image_encoder.`, `prompt_encoder.` and `mask_decoder.`; below these, our
modules carry the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from deixis_train.loaders.files import read_tensors
from deixis_train.loaders.report import CheckpointError, LoadReport, fill

IMAGE_ENCODER, PROMPT_ENCODER, MASK_DECODER = "image_encoder.", "prompt_encoder.", "mask_decoder."
# Mask prompts are no part of PixelLLM (section 5), and of other models only where they ask for them.
UNUSED = (PROMPT_ENCODER + "mask_downscaling.",)


def load_sam(
    path: Path,
    sam_encoder: nn.Module | None = None,
    prompt_encoder: nn.Module | None = None,
    mask_decoder: nn.Module | None = None,
) -> LoadReport:
    """Fill the parts given; names of parts not given count as ignored.

    Raises:
        CheckpointError: the file cannot be read or holds nothing of SAM's. That it is of another size (ViT-B for ViT-H,
            say) is told by the report; call its `raise_if_incomplete`.
    """
    parts = {IMAGE_ENCODER: sam_encoder, PROMPT_ENCODER: prompt_encoder, MASK_DECODER: mask_decoder}
    return load_parts(path, "SAM", parts, UNUSED)


def load_parts(path: Path, what: str, parts: Mapping[str, nn.Module | None], unused: tuple[str, ...]) -> LoadReport:
    """Fill several modules from one file, each from the names below its prefix.

    Args:
        path: the checkpoint.
        what: name of the format, for messages.
        parts: prefix -> the module to fill, or None to leave that prefix out.
        unused: prefixes of names that need not be taken; a module that has them is filled all the same.
    """
    tensors = read_tensors(path)
    if not any(name.startswith(tuple(parts)) for name in tensors):
        raise CheckpointError(f"{path}: not a {what} checkpoint: no name begins with {', '.join(parts)}")
    wanted = {prefix + name for prefix, module in parts.items() if module is not None for name in module.state_dict()}
    left_out = unused + tuple(prefix for prefix, module in parts.items() if module is None)
    ignored = {name for name in tensors if name.startswith(left_out) and name not in wanted}
    report = LoadReport(
        unexpected=tuple(sorted(name for name in tensors if not name.startswith((*parts, *unused)))),
        ignored=tuple(sorted(ignored)),
    )
    for prefix, module in parts.items():
        if module is not None:
            below = {n: t for n, t in tensors.items() if n.startswith(prefix) and n not in ignored}
            report += _fill_below(module, prefix, below)
    return report


def _fill_below(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> LoadReport:
    names = {name: prefix + name for name in module.state_dict()}
    # A step counter of training that some files keep; no function depends on it.
    counters = {name for name in (*names.values(), *tensors) if name.endswith(".num_batches_tracked")}
    names = {ours: theirs for ours, theirs in names.items() if theirs not in counters}
    return fill(module, tensors, names, counters)
