"""Conversations as ids and labels, for a configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from deixis.bundle import ConversationSpec
from deixis.conversation import IMAGE_SENTENCE, SYSTEM, label_mask
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.training.vocabulary import CachedTokenizer

LONGEST = 961  # ids of a conversation, the picture counted as one (section 9.2)


def conversation_spec(config: GlammConfig) -> ConversationSpec:
    """How the model is spoken to (section 5.2)."""
    ids = config.ids
    return ConversationSpec(
        system=SYSTEM if config.system is None else config.system,
        image_sentence=IMAGE_SENTENCE,
        image_tokens=config.clip.tokens,
        begin_id=ids.begin,
        end_id=ids.end,
        image_start_id=ids.image_start,
        image_end_id=ids.image_end,
        mask_id=ids.mask,
        phrase_start_id=ids.phrase_start,
        phrase_end_id=ids.phrase_end,
        region_id=ids.region if config.region is not None else None,
    )


class Labeller:
    """Ids and labels of conversations. It remembers what it has encoded: questions come again and again."""

    def __init__(self, tokenizer_json: str, config: GlammConfig) -> None:
        self.spec = conversation_spec(config)
        self._tokenizer = CachedTokenizer(Tokenizer.from_str(tokenizer_json))

    def __call__(self, turns: Sequence[tuple[str, str]], longest: int = 0) -> tuple[list[int], list[int]]:
        """Ids, with IMAGE_ID, and labels of the same length, cut at `longest` (0: the published length)."""
        ids, labels = label_mask(self.spec, turns, self._encode)
        return ids[: longest or LONGEST], labels[: longest or LONGEST]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
