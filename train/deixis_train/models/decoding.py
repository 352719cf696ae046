"""The reference decoders, as plain functions without caches (section 11).

A decoder here calls `logits_fn(tokens, position)` with whole rows [B, L] and gets the logits [B, V] at one position.
That is slow and easy to check; the runtime has fast decoders of its own, which are compared with these.

Everything is float32, as in the reference: at -1e7 float32 has steps of 1, so penalised scores tie, and ties decide.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LogitsFn = Callable[[Tensor, int], Tensor]

NEG = -1e7  # penalty that keeps a hypothesis out of the live or the finished set
REPEAT_CEILING = -1e4  # the logit of the previous token is lowered to this at most


def begin_tokens(rows: int, length: int, begin_id: int = 0, end_id: int = 1) -> Tensor:
    """[rows, length] int64 start array: BOS, then EOS everywhere."""
    tokens = torch.full((rows, length), end_id, dtype=torch.int64)
    tokens[:, 0] = begin_id
    return tokens


def greedy(logits_fn: LogitsFn, begin: Tensor, end_id: int = 1) -> tuple[Tensor, Tensor]:
    """Greedy decoding that never repeats the previous token (section 11).

    Args:
        logits_fn: called with [B, L] tokens and the position to read.
        begin: [B, L] integer start array. Indices 1 to L - 2 are written, the last never is.
        end_id: id of EOS.

    Returns:
        tokens [B, L] int64, and log-probabilities [B]: the mean over words, the EOS step counted in the sum only.
    """
    tokens = begin.long().clone()
    total = torch.zeros(len(tokens), device=tokens.device)
    for index in range(1, tokens.shape[1] - 1):
        logits = logits_fn(tokens, index - 1).float().clone()
        previous = tokens[:, index - 1]
        at_previous = logits.gather(1, previous[:, None])
        logits.scatter_(1, previous[:, None], at_previous.clamp(max=REPEAT_CEILING))
        best, chosen = torch.log_softmax(logits, dim=-1).max(dim=-1)
        ended = previous == end_id
        if bool(ended.all()):
            break
        tokens[:, index] = torch.where(ended, end_id, chosen)
        total += torch.where(ended, 0.0, best)
    words = (tokens != end_id).sum(dim=1) - 1  # BOS does not count
    return tokens, total / words.clamp(min=1)


def beam_search(
    logits_fn: LogitsFn, begin: Tensor, beams: int, per_node: int = 1, alpha: float = 0.6, end_id: int = 1
) -> tuple[Tensor, Tensor]:
    """Beam search with brevity penalty (section 11).

    Args:
        logits_fn: called with [B * beams, L] tokens, the beams of a row adjacent, and the position to read.
        begin: [B, L] integer start array.
        beams: hypotheses kept.
        per_node: beams * per_node candidates are looked at in each step.
        alpha: exponent of the length penalty ((5 + length) / 6) ** alpha.
        end_id: id of EOS.

    Returns:
        tokens [B, beams, L] int64 and scores [B, beams], best last. Slots that no hypothesis filled are all zero with
        score NEG; a row that finished nothing gives its live hypotheses with plain log-probabilities.
    """
    rows, length = begin.shape
    live = begin.long()[:, None].repeat(1, beams, 1)
    live_log_probs = torch.tensor([0.0] + [NEG] * (beams - 1), device=live.device).repeat(rows, 1)
    finished = torch.zeros_like(live)
    finished_scores = torch.full((rows, beams), NEG, device=live.device)
    is_finished = torch.zeros(rows, beams, dtype=torch.bool, device=live.device)

    for index in range(1, length - 1):
        best_possible = live_log_probs[:, -1:] / _penalty(length, alpha)
        if bool((is_finished & (finished_scores.min(dim=1, keepdim=True).values > best_possible)).all()):
            break
        logits = logits_fn(live.flatten(0, 1), index - 1).float()
        log_probs = torch.log_softmax(logits, dim=-1).unflatten(0, (rows, beams)) + live_log_probs[:, :, None]
        vocabulary = log_probs.shape[-1]
        log_probs, flat = _top(log_probs.flatten(1), beams * per_node)
        candidates = _rows(live, flat // vocabulary)
        candidates[:, :, index] = flat % vocabulary
        ended = candidates[:, :, index] == end_id

        live_log_probs, kept = _top(log_probs + ended * NEG, beams)
        live_log_probs, live = live_log_probs.flip(1), _rows(candidates, kept.flip(1))

        scores = log_probs / _penalty(index, alpha) + ~ended * NEG
        finished_scores, kept = _top(torch.cat([finished_scores, scores], dim=1), beams)
        kept = kept.flip(1)
        finished_scores = finished_scores.flip(1)
        finished = _rows(torch.cat([finished, candidates], dim=1), kept)
        is_finished = torch.cat([is_finished, ended], dim=1).gather(1, kept)

    some = is_finished.any(dim=1)
    tokens = torch.where(some[:, None, None], finished, live)
    return tokens, torch.where(some[:, None], finished_scores, live_log_probs)


def _penalty(length: int, alpha: float) -> Tensor:
    """Computed in float32 as everything here; a 0-dimensional CPU tensor goes with any device."""
    return torch.tensor((5.0 + length) / 6.0).pow(alpha)


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest `count` per row, descending; of equal values the lowest index first (torch.topk promises no order)."""
    ordered, indices = torch.sort(values, dim=1, descending=True, stable=True)
    return ordered[:, :count], indices[:, :count]


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Sequences x [B, K, L] picked by indices [B, M] -> [B, M, L]."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))


def zero_after_end(tokens: Tensor, end_id: int = 1) -> Tensor:
    """Tokens [..., L] with everything behind the first EOS set to 0 (section 8, inference order)."""
    is_end = (tokens == end_id).long()
    return torch.where(is_end.cumsum(-1) - is_end > 0, 0, tokens)
