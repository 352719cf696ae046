"""Models of random weights at preset sizes, for tests and benchmarks. Nothing in them is trained.

The sizes themselves are `PRESETS` of `deixis_train.models.config` and `GLAMM_PRESETS` of
`deixis_train.models.glamm.config`.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deixis_export.presets_glamm import random_glamm, random_glamm_tokenizer
from deixis_export.random_weights import EVERYDAY_WORDS, stir
from deixis_train.models.config import PRESETS, PixelLLMConfig
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.vocabulary import build_tokenizer

EOS_TILT = 2.6  # EOS' mean logit as a share of the best other one
_CHARACTERS = 49  # pieces that are no words: special ids, punctuation, letters and digits


def random_model(config: PixelLLMConfig, seed: int = 0) -> PixelLLM:
    """A model in evaluation mode whose every parameter does something: what starts at zero or one gets noise too.

    Captions end after a few words: the vocabulary matrix is tilted towards EOS.
    """
    torch.manual_seed(seed)
    model = PixelLLM(config).eval()
    with torch.no_grad():
        stir(model, seed)
        _let_captions_end(model)
    return model


def _let_captions_end(model: PixelLLM) -> None:
    """Point EOS' row along the mean feature, so that its logit has a bias as a trained model's has."""
    head, sizes = model.text.vocabulary_head, model.config.text
    ids = torch.arange(2, min(sizes.vocab, 34))[None, : sizes.max_positions].repeat(2, 1)
    visual = torch.randn(2, 4, sizes.emb, generator=torch.Generator().manual_seed(3))
    encoded, valid = model.text.encode(visual)
    _, features = model.text.decode(ids, encoded, valid, with_logits=False)
    mean = features[:, :-1].mean(dim=(0, 1))
    best = head(features[:, :-1]).amax(dim=-1).mean()
    head.weight[model.config.end_token_id] = mean * (EOS_TILT * best / mean.square().sum())


def random_tokenizer(vocab: int) -> str:
    """`tokenizer.json` text of a small Unigram vocabulary: everyday words, then numbered ones up to `vocab` pieces."""
    words = EVERYDAY_WORDS.split()[: vocab - _CHARACTERS]
    words += [f"word{i}" for i in range(vocab - _CHARACTERS - len(words))]
    return build_tokenizer(words, vocab).to_str()


def random_tokenizer_for(config: PixelLLMConfig) -> str:
    """`tokenizer.json` text with the vocabulary size and special ids of a model: Unigram for T5, WordPiece for BERT."""
    if config.bert is None:
        return random_tokenizer(config.t5.vocab)
    names = {0: "[PAD]", config.begin_token_id: "[CLS]", config.end_token_id: "[SEP]", config.unknown_token_id: "[UNK]"}
    characters = string.ascii_lowercase + string.digits + string.punctuation
    # A word must not lack its letters; of the words as many as there is room for.
    pieces = [*characters, *("##" + c for c in string.ascii_lowercase + string.digits)]
    pieces += [word for word in EVERYDAY_WORDS.split() if len(word) > 1]
    pieces += [f"word{i}" for i in range(config.bert.vocab - len(names) - len(pieces))]
    rest = iter(pieces)
    vocabulary = {names[i] if i in names else next(rest): i for i in range(config.bert.vocab)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(names.values()))
    return tokenizer.to_str()


def random_parts(name: str, seed: int = 0) -> tuple[PixelLLM | Glamm, str]:
    """A random model of a preset of any family and its tokenizer's JSON. Raises ValueError for an unknown name."""
    if name in GLAMM_PRESETS:
        sizes = GLAMM_PRESETS[name]
        return random_glamm(sizes, seed), random_glamm_tokenizer(sizes)
    config = preset(name)
    return random_model(config, seed), random_tokenizer_for(config)


def preset(name: str) -> PixelLLMConfig:
    """Sizes of a PixelLLM. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join((*PRESETS, *GLAMM_PRESETS))}")
    return PRESETS[name]
