"""METEOR, CIDEr, BLEU and ROUGE-L of texts as the COCO captions are judged, through pycocoevalcap (section 15).

Its tokenizer and METEOR 1.5 are Java programs. CIDEr takes its document frequencies from the references given.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis_train.evaluation.errors import EvaluationError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CaptionScores:
    """Of the whole set, and of each text [N]. METEOR of the set is its own aggregate, not the mean of the texts'."""

    meteor: float
    cider: float
    meteors: Floats
    ciders: Floats


def require_java() -> None:
    """Raise EvaluationError with what to install when there is no Java runtime, or none that works."""
    install = "install one (on Debian and Ubuntu: apt-get install default-jre-headless)"
    java = shutil.which("java")
    if java is None:
        raise EvaluationError(f"METEOR and CIDEr need a Java runtime, and there is no 'java' on the PATH; {install}")
    if subprocess.run([java, "-version"], capture_output=True, check=False).returncode != 0:
        raise EvaluationError(f"METEOR and CIDEr need a Java runtime, and 'java -version' fails ({java}); {install}")


def caption_scores(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Judge N texts, each against its own references.

    Raises EvaluationError: nothing to judge, a text without references, no Java runtime, or one that fails.
    """
    found, wanted = tokenized(predicted, references)
    from pycocoevalcap.cider.cider import Cider

    cider, ciders = Cider().compute_score(wanted, found)
    meteor, meteors = _meteor(wanted, found)
    return CaptionScores(meteor, float(cider), meteors, np.asarray(ciders, np.float64))


def meteor_scores(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """METEOR of each of N texts [N]; errors as in `caption_scores`."""
    found, wanted = tokenized(predicted, references)
    return _meteor(wanted, found)[1]


def overlap_scores(predicted: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and ROUGE-L of N texts as a set, by name; errors as in `caption_scores`."""
    found, wanted = tokenized(predicted, references)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    rouge, _ = Rouge().compute_score(wanted, found)
    return {**{f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}, "ROUGE-L": float(rouge)}


def tokenized(
    predicted: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Both sides by number, through the Penn Treebank tokenizer; errors as in `caption_scores`."""
    if not predicted or len(predicted) != len(references):
        raise EvaluationError(f"{len(predicted)} texts and {len(references)} sets of references cannot be judged")
    for text, texts in zip(predicted, references, strict=True):
        if not texts:
            raise EvaluationError(f"the text {text[:60]!r} has no reference to be judged by")
    require_java()
    if not any(re.search(r"\w", text) for texts in references for text in texts):
        raise EvaluationError("no reference has a word, so there is nothing to judge by")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    sides = []
    for texts in ([[text] for text in predicted], references):
        lines = {i: [{"caption": _line(text)} for text in group] for i, group in enumerate(texts)}
        tokens = tokenizer.tokenize(lines)
        if [len(group) for group in tokens.values()] != [len(group) for group in lines.values()]:
            raise EvaluationError("the Java tokenizer of pycocoevalcap failed; run 'java -version' to see why")
        sides.append(tokens)
    return sides[0], sides[1]


def _line(text: str) -> str:
    """One line without METEOR's field mark. Nothing becomes a full stop, which the tokenizer drops again: it loses
    empty lines."""
    return " ".join(text.replace("|", " ").split()) or "."


def _meteor(wanted: dict[int, list[str]], found: dict[int, list[str]]) -> tuple[float, Floats]:
    from pycocoevalcap.meteor.meteor import Meteor

    judge = Meteor()
    try:
        score, scores = judge.compute_score(wanted, found)
    except (ValueError, OSError) as error:  # what a Java process that has died looks like from here
        if judge.lock.locked():
            judge.lock.release()  # its destructor waits for the lock that the failed call kept
        raise EvaluationError(f"METEOR's Java process failed ({error}); it needs 2 GB of memory") from None
    return float(score), np.asarray(scores, np.float64)
