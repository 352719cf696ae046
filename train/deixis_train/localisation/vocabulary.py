"""A larger vocabulary for a model that exists already."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from deixis_train.models.pixelllm import PixelLLM


@torch.no_grad()
def extend_vocabulary(model: PixelLLM, extra: int, generator: torch.Generator | None = None) -> int:
    """Append `extra` tokens to the vocabulary, in place: rows of the embedding and of the output matrix.

    Known tokens keep their rows, so that nothing changes but the share of probability that goes to new ones. New rows
    are drawn with the mean and spread that the known ones have, column by column. The configuration is changed as well,
    so that a checkpoint of the model loads.

    Returns:
        the id of the first new token.
    """
    if extra < 1:
        raise ValueError(f"the vocabulary must grow, not by {extra}")
    text = model.text
    first = text.config.vocab
    embedder, logits = text.token_embedder, text.decoder.logits_dense
    grown_embedder = nn.Embedding(first + extra, text.config.emb)
    grown_logits = nn.Linear(text.config.emb, first + extra, bias=False)
    for old, new in ((embedder.weight, grown_embedder.weight), (logits.weight, grown_logits.weight)):
        new.requires_grad_(old.requires_grad)
        new.data = _grown(old, extra, generator)
    text.token_embedder = grown_embedder
    text.decoder.logits_dense = grown_logits
    text.config = dataclasses.replace(text.config, vocab=first + extra)
    model.config = dataclasses.replace(model.config, t5=text.config)
    return first


def _grown(old: Tensor, extra: int, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(extra, old.shape[1], generator=generator).to(old)
    spread = old.std(dim=0, correction=0)
    return torch.cat([old, old.mean(dim=0) + noise * spread])
