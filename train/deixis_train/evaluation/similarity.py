"""How alike two phrases are, for the recall of grounded captions (GLaMM specification, section 11.1).

Published figures use BERT. `word_overlap` needs no model; figures made with it are not comparable with published ones,
so reports name the similarity they were made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.gcg import Similarity

Floats = NDArray[np.float64]

WORDS, BERT = "words", "bert"
BERT_TOKENS = 512
FLOOR = 0.2  # of word_overlap: two phrases without a common word


def word_overlap(a: Sequence[str], b: Sequence[str]) -> Floats:
    """0.2 + 0.8 * (common words / all words) of every pair, [len(a), len(b)]. Words stand between white space."""
    return np.array([[_overlap(one, other) for other in b] for one in a], np.float64).reshape(len(a), len(b))


def _overlap(a: str, b: str) -> float:
    first, second = set(a.split()), set(b.split())
    return FLOOR + (1 - FLOOR) * (len(first & second) / max(1, len(first | second)))


class BertSimilarity:
    """Cosine of mean-pooled last hidden states of BERT, [CLS] and [SEP] included. Needs transformers and torch.

    folder: a local copy of bert-base-uncased (config.json, weights, vocabulary); nothing is downloaded.
    Raises EvaluationError when the folder or a library is not there.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise EvaluationError(
                f"{folder}: no BERT there (no config.json); give a folder with bert-base-uncased, or choose '{WORDS}'"
            )
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise EvaluationError(
                f"BERT's similarity needs transformers and torch ({error}); or choose '{WORDS}'"
            ) from None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            self._model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"{folder}: BERT cannot be loaded: {' '.join(str(error).split())}") from None
        self._known: dict[str, Floats] = {}

    def __call__(self, a: Sequence[str], b: Sequence[str]) -> Floats:
        """Cosine of every pair, [len(a), len(b)]."""
        if not a or not b:
            return np.zeros((len(a), len(b)))
        first, second = (np.stack([self._embedding(text) for text in texts]) for texts in (a, b))
        return first @ second.T

    def _embedding(self, text: str) -> Floats:
        """Of length 1, float64 [D]. One text at a time: padding would enter the mean."""
        if text not in self._known:
            import torch

            inputs = self._tokenizer(text, return_tensors="pt", truncation=True, max_length=BERT_TOKENS)
            with torch.inference_mode():
                mean = self._model(**inputs).last_hidden_state[0].mean(0).double().numpy()
            self._known[text] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return self._known[text]


def make_similarity(name: str, bert: Path | None = None) -> Similarity:
    """The similarity called `name`: "words", or "bert" with its folder. Raises EvaluationError."""
    if name == WORDS:
        return word_overlap
    if name != BERT:
        raise EvaluationError(f"there is no text similarity {name!r}; choose '{WORDS}' or '{BERT}'")
    if bert is None:
        raise EvaluationError(f"similarity '{BERT}' needs a folder with bert-base-uncased; or choose '{WORDS}'")
    return BertSimilarity(bert)
