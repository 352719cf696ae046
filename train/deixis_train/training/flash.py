"""A faster encoder for training, where it spends most of its time: torch's fused attention.

Its kernel takes the additive bias as a constant, so the table of relative distances must be frozen. Nothing changes for
export and inference: the model's own, plain attention comes back when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional as F

from deixis_train.models.t5 import T5, EncoderLayer


def fused_attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """As `Attention.attend` without dropout, in one kernel. Scores are not scaled (section 7)."""
    rows, heads = query.shape[:2]
    mask = bias.to(query.dtype).expand(rows, heads, -1, -1)
    return F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), attn_mask=mask, scale=1.0)


@contextmanager
def fused_encoder(text: T5) -> Iterator[None]:
    """Within the block the encoder of `text` attends through `fused_attend`.

    Raises:
        ValueError: the encoder's distance table still learns, or it has dropout to apply: the kernel can do neither.
    """
    if text.encoder.relpos_bias.rel_embedding.requires_grad:
        raise ValueError("fused attention needs a frozen distance table: set text.encoder.relpos_bias apart as frozen")
    modules = [layer.attention for layer in text.encoder.layers if isinstance(layer, EncoderLayer)]
    if any(module.training and module.dropout.p > 0 for module in modules):
        raise ValueError("fused attention has no dropout: set the dropout of the text model to 0")
    # `attend` is a method of the class: an attribute of the instance goes before it, and is taken away again.
    for module in modules:
        vars(module)["attend"] = fused_attend
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["attend"]
