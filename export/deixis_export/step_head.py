"""What `decoder_step` adds to its logits, for both families: a ban, and the likeliest ids with their log-probabilities.

Search needs no more, so a reader touches nothing that is as wide as the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deixis.bundle import Reductions
from deixis.caches import CANDIDATES
from deixis.decoding import REPEAT_CEILING
from deixis_export.graph_spec import TensorSpec

BANNED = TensorSpec("banned", ("R",), "int64")


def reductions(vocabulary: int) -> Reductions:
    """What the manifest says of them."""
    return Reductions(min(CANDIDATES, vocabulary), float(REPEAT_CEILING))


def top_specs(vocabulary: int) -> tuple[TensorSpec, TensorSpec]:
    """The outputs `top_ids` and `top_log_probs`, each [R, K]."""
    dims = ("R", reductions(vocabulary).candidates)
    return TensorSpec("top_ids", dims, "int64"), TensorSpec("top_log_probs", dims)


def top_of(logits: Tensor, banned: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest ids [R, K] of logits [R, V] and their log-probabilities [R, K], best first.

    banned [R]: an id whose logit is lowered to REPEAT_CEILING at most; -1 for none. Of equally likely ids ONNX takes
    the lower one; PyTorch promises nothing.
    """
    chosen = banned.clamp(min=0)[:, None]
    own = logits.gather(1, chosen)
    lowered = torch.where(banned[:, None] < 0, own, own.clamp(max=float(REPEAT_CEILING)))
    log_probs = torch.log_softmax(logits.scatter(1, chosen, lowered), dim=-1)
    found = log_probs.topk(min(CANDIDATES, logits.shape[-1]))
    return found.indices, found.values
