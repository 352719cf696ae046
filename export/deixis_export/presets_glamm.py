"""Random models of the glamm presets, and the tokenizer with their special ids. Nothing in them is trained."""

from __future__ import annotations

import dataclasses
import string

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from deixis.conversation import (
    BEGIN,
    END,
    IMAGE_END,
    IMAGE_SENTENCE,
    IMAGE_START,
    MASK,
    PHRASE_END,
    PHRASE_START,
    REGION,
    SYSTEM,
)
from deixis_export.random_weights import EVERYDAY_WORDS, stir
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.tasks import glamm_tasks

_SPACE, UNKNOWN = "▁", "<unk>"
_BYTES = 256
_WORD, _LONE_SPACE, _CHARACTER, _BYTE = -2.0, -5.0, -8.0, -12.0  # scores: what is longer wins

# A random model's answers follow this loose grammar: from the group of a token to the groups that may come next, by
# weight. Words are dealt to six groups, everything else is "other". Which of them comes is up to what is random.
_GRAMMAR: dict[str, dict[str, float]] = {
    "other": {"words0": 1.0},
    "words0": {"phrase_start": 1.0, "words1": 0.6},
    "words1": {"phrase_start": 1.0},
    "phrase_start": {"words2": 1.0},
    "words2": {"phrase_end": 1.0, "words3": 0.6},
    "words3": {"phrase_end": 1.0},
    "phrase_end": {"mask": 1.3},
    "mask": {"words4": 0.75, "phrase_start": 0.95},
    "words4": {"end": 1.0, "words5": 0.6},
    "words5": {"end": 1.2},
}
_RULE = 8.0  # weight of the grammar in embeddings and logits, against what is random in them
_LIVELY = 4.0  # growth of what blocks add: the text so far and the picture, not the last word alone, say what follows


def random_glamm(config: GlammConfig, seed: int = 0) -> Glamm:
    """A model in evaluation mode whose every parameter does something.

    Its answers mix words with phrases and masks and depend on the picture; nearly all of them end.
    """
    torch.manual_seed(seed)
    model = Glamm(config).eval()
    with torch.no_grad():
        stir(model, seed)
        for name, value in model.llama.layers.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.mul_(_LIVELY)
        _teach_grammar(model, torch.Generator().manual_seed(seed + 2))
    return model


def _groups(config: GlammConfig) -> dict[int, str]:
    """The group of every id that is not in "other"."""
    ids = dataclasses.asdict(config.ids)
    single = {ids[name]: name for name in ("phrase_start", "phrase_end", "mask", "end")}
    words = {i: f"words{i % 6}" for i, (_, score) in enumerate(_vocabulary(config)) if score == _WORD}
    return words | single


def _teach_grammar(model: Glamm, generator: torch.Generator) -> None:
    """Give every group a direction of its own: embeddings carry it, the rows of what may follow look for it."""
    config = model.config
    table = model.llama.embed_tokens.weight
    head = table if model.llama.lm_head is None else model.llama.lm_head.weight
    group_of = _groups(config)
    directions, _ = torch.linalg.qr(torch.randn(config.llama.emb, len(_GRAMMAR), generator=generator))
    direction = dict(zip(_GRAMMAR, directions.T * table.std() * _RULE, strict=True))
    for i in range(config.llama.vocab):
        group = group_of.get(i, "other")
        if group in direction:
            table[i] += direction[group]
        for before, follows in _GRAMMAR.items():
            head[i] += direction[before] * follows.get(group, 0.0)
        if group == "other":
            head[i] *= 0.1


def random_glamm_tokenizer(config: GlammConfig) -> str:
    """`tokenizer.json` text of the LLaMA kind, with the special tokens at the configuration's ids.

    A space before every piece between special tokens, which swallow the spaces around them. Words of the published
    questions and everyday ones are pieces, then printable ASCII and, where there is room, bytes.
    """
    ids, added = config.ids, _added(config)
    vocabulary = _vocabulary(config)
    with_bytes = any(piece == "<0x00>" for piece, _ in vocabulary)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=ids.unknown, byte_fallback=with_bytes))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (BEGIN, END, UNKNOWN)])
    tokenizer.add_special_tokens(
        [AddedToken(text, lstrip=True, rstrip=True, normalized=False) for text in added.values()]
    )
    return tokenizer.to_str()


def _added(config: GlammConfig) -> dict[int, str]:
    ids = config.ids
    return {
        ids.image_start: IMAGE_START,
        ids.image_end: IMAGE_END,
        ids.region: REGION,
        ids.region + 1: "<point>",  # unused, but the published vocabulary has it there
        ids.mask: MASK,
        ids.phrase_start: PHRASE_START,
        ids.phrase_end: PHRASE_END,
    }


def _vocabulary(config: GlammConfig) -> list[tuple[str, float]]:
    """Pieces and scores by id."""
    ids, size = config.ids, config.llama.vocab
    names = _added(config) | {ids.begin: BEGIN, ids.end: END, ids.unknown: UNKNOWN}
    characters = string.digits + string.ascii_letters + string.punctuation + "\n"
    pieces = [(_SPACE, _LONE_SPACE)] + [(character, _CHARACTER) for character in characters]
    if len(names) + len(pieces) + _BYTES < size:
        pieces += [(f"<0x{value:02X}>", _BYTE) for value in range(_BYTES)]
    words = list(dict.fromkeys(_words(config)))
    words += [f"word{i}" for i in range(size)]
    pieces += [(_SPACE + word, _WORD) for word in words[: size - len(names) - len(pieces)]]
    rest = iter(pieces)
    return [(names[i], 0.0) if i in names else next(rest) for i in range(size)]


def _words(config: GlammConfig) -> list[str]:
    """Words of what the model is asked, those first, then everyday ones."""
    asked = [SYSTEM, IMAGE_SENTENCE, "USER ASSISTANT", *(task.instruction for task in glamm_tasks(config).values())]
    cleaned = "".join(c if c.isalpha() or c == " " else " " for c in " ".join(asked))
    return cleaned.split() + EVERYDAY_WORDS.split()
