"""The tokenizer of a small GLaMM: whole words of the data and of its questions, characters, and the marks."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from deixis.conversation import IMAGE_END, IMAGE_START, MASK, PHRASE_END, PHRASE_START, REGION
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.training.vocabulary import MARKS, SPACE, WORD_SCORE, words_of

POINT = "<point>"  # published, and never used (section 5.1)
ADDED = (IMAGE_START, IMAGE_END, REGION, POINT, MASK, PHRASE_START, PHRASE_END)


def build_glamm_tokenizer(texts: Iterable[str], questions: Iterable[str], config: GlammConfig) -> Tokenizer:
    """A Unigram tokenizer (lower case, Metaspace) in LLaMA's order: unknown, begin, end, pieces, then the added tokens.

    Words of the texts come first, by how often they are said, then those of the questions, as many as there is room
    for; the rest is spelled by characters. White space beside added tokens is lost, as in the published tokenizer.

    Raises:
        ValueError: the configuration's special ids are not in the published order, or leave no room for characters.
    """
    ids, first = config.ids, config.ids.image_start
    if (ids.unknown, ids.begin, ids.end) != (0, 1, 2) or (
        ids.image_end,
        ids.region,
        ids.mask,
        ids.phrase_start,
        ids.phrase_end,
    ) != (first + 1, first + 2, first + 4, first + 5, first + 6):
        raise ValueError(f"the preset {config.name!r} has no special ids in the published order; name init.tokenizer")
    said: Counter[str] = Counter()
    for text in texts:
        said.update(words_of([text]))
    asked = sorted(words_of(questions))
    words = dict.fromkeys([*(word for word, _ in sorted(said.items(), key=lambda w: (-w[1], w[0]))), *asked])
    always: list[tuple[str, float]] = [(mark, -3.0) for mark in MARKS]
    always += [(SPACE + mark, -3.0) for mark in ".,"]  # what follows an added token begins anew
    always += [(SPACE, -5.0), *((character, -8.0) for character in string.ascii_lowercase + string.digits)]
    room = first - 3 - len(always)
    if room < 0:
        raise ValueError(f"the preset {config.name!r} has no room for characters before its special tokens")
    pieces: list[tuple[str, float]] = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(SPACE + word, WORD_SCORE) for word in list(words)[:room]]
    pieces += always
    pieces += [(f"<unused{number}>", -99.0) for number in range(first - len(pieces))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("\n", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_tokens([AddedToken(text, lstrip=True, rstrip=True, normalized=False) for text in ADDED])
    return tokenizer
