"""The language loss: every position predicts the token after it (section 12)."""

from __future__ import annotations

from torch import Tensor

PAD_ID = 0


def text_loss(
    logits: Tensor, ids: Tensor, *, valid: Tensor | None = None, smoothing: float = 0.1, end_id: int = 1
) -> Tensor:
    """Cross-entropy with label smoothing, averaged over the words and ends of all captions.

    The target gives the label 1 - smoothing and shares the rest equally among the other V - 1 tokens. Padding is no
    label, and captions that end at once are left out. What stands in positions that do not count has no influence, NaN
    included.

    Args:
        logits: [..., L, V] float; position t predicts the token at t + 1, so the last position is not used.
        ids: [..., L] integer, BOS w1..wn EOS PAD.. as fed to the decoder.
        valid: [...] bool or 0/1, captions that count, for dense captioning the proposals with an object; None = all.
        smoothing: share of the target that the label gives away.
        end_id: id of EOS.

    Returns:
        float32 scalar.
    """
    labels = ids[..., 1:]
    counts = (labels != PAD_ID) & (ids[..., 1:2] != end_id)
    if valid is not None:
        counts = counts & (valid > 0)[..., None]
    log_probs = logits[..., :-1, :][counts].float().log_softmax(dim=-1)
    of_label = log_probs.gather(-1, labels[counts][:, None].long())[:, 0]
    of_others = (log_probs.sum(dim=-1) - of_label) / (log_probs.shape[-1] - 1)
    total = -((1 - smoothing) * of_label + smoothing * of_others).sum()
    return total / counts.sum().clamp(min=1)
