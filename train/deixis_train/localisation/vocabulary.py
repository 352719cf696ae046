"""The ways to say locations by name, and a larger vocabulary for those that need it."""

from __future__ import annotations

import dataclasses

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from deixis_train.localisation.coding import DIGIT_BINS, ExtraTokens, LocalisationError, Localiser, WrittenDigits
from deixis_train.models.pixelllm import PixelLLM

WAYS = ("regression", "text", "tokens")


def add_location_tokens(way: str, model: PixelLLM, seed: int) -> None:
    """Prepare a model that is to learn a way to say locations: "tokens" needs tokens of its own, at the end."""
    if way == "tokens":
        extend_vocabulary(model, DIGIT_BINS, torch.Generator().manual_seed(seed))


def localiser_of(way: str, model: PixelLLM, tokenizer_json: str) -> Localiser | None:
    """How a model says locations, one of `WAYS`; None for "regression", which says nothing.

    Raises LocalisationError when the vocabulary cannot, ValueError for another way.
    """
    if way not in WAYS:
        raise ValueError(f"unknown localisation {way!r}; known are {', '.join(WAYS)}")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    if way == "text":
        return WrittenDigits(tokenizer)
    if way == "tokens":
        first, pieces = model.config.t5.vocab - DIGIT_BINS, tokenizer.get_vocab_size()
        if pieces > first:
            raise LocalisationError(
                f"the tokenizer has {pieces} pieces, which leaves no room for {DIGIT_BINS} location tokens among the "
                f"{model.config.t5.vocab} of the model: it was not trained to say locations by tokens"
            )
        return ExtraTokens(first)
    return None


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
    text = model.t5
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
