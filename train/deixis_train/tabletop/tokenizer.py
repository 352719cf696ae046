"""See `deixis_train.training.vocabulary`."""

from deixis_train.training.vocabulary import build_tokenizer

__all__ = ["build_tokenizer"]
