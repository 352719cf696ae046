"""The sum that training descends (section 12)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

# The location loss is in px of the network input, which is why its weight is small.
WEIGHTS: Mapping[str, float] = MappingProxyType({"text": 1.0, "detection": 1.0, "point": 0.1, "mask": 1.0})


def total_loss(
    terms: Mapping[str, Tensor],
    task_masks: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> Tensor:
    """Weighted sum of the terms, each multiplied by the mean of its task's mask over the batch where one is given.

    A term of weight 0 or whose task is on for no picture counts 0, even if it is NaN.

    Args:
        terms: float scalars by name.
        task_masks: [B] bool or 0/1 by name of the term: pictures whose data bear it. A term without one counts fully.
        weights: by name of the term.

    Returns:
        float32 scalar.

    Raises:
        ValueError: for no terms, or a term or mask without a counterpart in `weights` or `terms`.
    """
    if not terms:
        raise ValueError("no loss terms to add up")
    if unknown := sorted((terms.keys() - weights.keys()) | ((task_masks or {}).keys() - terms.keys())):
        raise ValueError(f"no weight or no term for {', '.join(unknown)}; terms are {', '.join(sorted(terms))}")
    total = torch.zeros((), device=next(iter(terms.values())).device)
    for name, term in terms.items():
        weight = torch.as_tensor(weights[name], dtype=torch.float32, device=term.device)
        if task_masks is not None and name in task_masks:
            weight = weight * task_masks[name].to(term.device, torch.float32).mean()
        total = total + torch.where(weight > 0, weight * term.float(), 0.0)
    return total
