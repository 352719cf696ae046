"""Models of random weights at preset sizes, for tests and benchmarks. Nothing in them is trained.

The sizes themselves are `PRESETS` of `deixis_train.models.config`.
"""

from __future__ import annotations

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deixis_train.models.config import PRESETS, PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.vocabulary import build_tokenizer

_WORDS = (
    "a an and are at ball behind big black blue book bottle box brown can caption cat chair cup dark fork "
    "front green grey image in is it knife large left light long mug near next object of on orange pear "
    "picture pink plate purple red right round small spoon table the there to toy two under upside where "
    "which white with yellow"
)
EOS_TILT = 2.6  # EOS' mean logit as a share of the best other one
_CHARACTERS = 49  # pieces that are no words: special ids, punctuation, letters and digits


def random_model(config: PixelLLMConfig, seed: int = 0) -> PixelLLM:
    """A model in evaluation mode whose every parameter does something: what starts at zero or one gets noise too.

    Captions end after a few words: the vocabulary matrix is tilted towards EOS.
    """
    torch.manual_seed(seed)
    model = PixelLLM(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            flat = bool((value == value.flatten()[0]).all())
            if flat and value.numel() > 1:
                scale = 0.5 if name.endswith("gate") else 0.05
                value.add_(torch.randn(value.shape, generator=generator) * scale)
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
    words = _WORDS.split()[: vocab - _CHARACTERS]
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
    pieces += [word for word in _WORDS.split() if len(word) > 1]
    pieces += [f"word{i}" for i in range(config.bert.vocab - len(names) - len(pieces))]
    rest = iter(pieces)
    vocabulary = {names[i] if i in names else next(rest): i for i in range(config.bert.vocab)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(names.values()))
    return tokenizer.to_str()


def preset(name: str) -> PixelLLMConfig:
    """Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
