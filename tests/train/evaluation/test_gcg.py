"""Grounded captions and referring segmentation judged as the published evaluation of GLaMM does it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis_train.evaluation import masks
from deixis_train.evaluation.captions import caption_scores, overlap_scores, tokenized
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.gcg import (
    Grounded,
    coco_stats,
    gcg_metrics,
    greedy_iou,
    grounded_of_coco,
    iou_matrix,
    match_phrases,
)
from deixis_train.evaluation.res import referring_metrics
from deixis_train.evaluation.similarity import BertSimilarity, make_similarity, word_overlap

GOLDEN = Path(__file__).parents[2] / "golden" / "glamm"
FILE = json.loads((GOLDEN / "gcg_eval.json").read_text())
EXPECTED = FILE["expected"]
IMAGES = [image["id"] for image in FILE["mask_gt"]["images"]]
TRUTH = grounded_of_coco(IMAGES, FILE["mask_gt"]["annotations"], FILE["caption_gt"]["annotations"])
SAID = grounded_of_coco(IMAGES, FILE["mask_pred"], FILE["caption_pred"])


def stripe(left: int, right: int, width: int = 10) -> dict[str, Any]:
    mask = np.zeros((4, width), bool)
    mask[:, left:right] = True
    return masks.encode(mask)


def test_golden_figures() -> None:
    values = gcg_metrics(TRUTH, SAID, word_overlap)
    assert values["mIoU"] == pytest.approx(EXPECTED["miou"], abs=1e-8)
    assert values["recall"] == pytest.approx(EXPECTED["recall"], abs=1e-8)
    assert values["AP50"] == pytest.approx(EXPECTED["coco_stats"][1], abs=1e-9)
    stats = coco_stats([one.masks for one in TRUTH], [one.masks for one in SAID], IMAGES)
    np.testing.assert_allclose(stats, EXPECTED["coco_stats"], atol=1e-9)


@pytest.mark.parametrize("number", range(len(IMAGES)), ids=IMAGES)
def test_golden_pictures(number: int) -> None:
    expected, truth, said = EXPECTED["per_image"][number], TRUTH[number], SAID[number]
    ious = iou_matrix(truth.masks, said.masks)
    np.testing.assert_allclose(ious, np.reshape(expected["iou_matrix_gt_by_pred"], ious.shape), atol=1e-9)
    similarity = word_overlap(truth.phrases, said.phrases)
    np.testing.assert_allclose(similarity, np.reshape(expected["text_sim"], similarity.shape), atol=1e-9)
    assert [list(pair) for pair in match_phrases(ious, similarity)] == expected["matches"]
    assert greedy_iou(ious) == pytest.approx(expected["miou"], abs=1e-9)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs a Java runtime")
def test_golden_captions(capfd: pytest.CaptureFixture[str]) -> None:
    predicted, references = [one.caption for one in SAID], [[one.caption] for one in TRUTH]
    found, wanted = tokenized(predicted, references)
    assert list(found.values()) == [EXPECTED["tokenised"]["pred"][name] for name in IMAGES]
    assert list(wanted.values()) == [EXPECTED["tokenised"]["gt"][name] for name in IMAGES]
    scores = caption_scores(predicted, references)
    assert scores.cider == pytest.approx(EXPECTED["cider"], abs=1e-6)
    assert scores.meteor == pytest.approx(EXPECTED["meteor"], abs=1e-6)
    np.testing.assert_allclose(scores.ciders, EXPECTED["cider_per"], atol=1e-6)
    np.testing.assert_allclose(scores.meteors, EXPECTED["meteor_per"], atol=1e-6)
    overlaps = overlap_scores(predicted, references)
    np.testing.assert_allclose([overlaps[f"BLEU-{n}"] for n in range(1, 5)], EXPECTED["bleu1_4"], atol=1e-6)
    assert overlaps["ROUGE-L"] == pytest.approx(EXPECTED["rouge_l"], abs=1e-6)
    capfd.readouterr()  # the Java programs talk


def test_golden_referring_segmentation() -> None:
    file = np.load(GOLDEN / "res_eval.npz")
    pairs = [
        masks.overlap(logits > 0, wanted > 0)
        for number in range(sum(name.startswith("gt") for name in file.files))
        for logits, wanted in zip(file[f"logits{number}"], file[f"gt{number}"], strict=True)
    ]
    values = referring_metrics(*zip(*pairs, strict=True))
    assert values["cIoU"] == pytest.approx(float(file["ciou"]), abs=1e-6)  # a histogram in float32 there
    assert values["gIoU"] == pytest.approx(float(file["giou"]), abs=1e-6)
    assert any(union == 0 for _, union in pairs)


def test_the_search_ends_with_the_first_pair_that_is_not_good_enough() -> None:
    ious = np.array([[0.9, 0.0], [0.0, 0.8]])
    alike = np.array([[0.1, 0.0], [0.0, 1.0]])
    assert match_phrases(ious, alike) == []  # the second pair would do, but is not looked at
    assert match_phrases(ious, np.eye(2)) == [(0, 0), (1, 1)]
    assert match_phrases(ious * 0.5, np.eye(2)) == []


def test_a_mask_without_a_phrase_costs_the_picture_its_matches() -> None:
    ious = np.array([[0.7, 0.0], [0.0, 0.9]])
    assert match_phrases(ious, np.ones((2, 1))) == []
    # Where its IoU is not good enough the search has ended before.
    assert match_phrases(np.array([[0.7, 0.0], [0.0, 0.4]]), np.ones((2, 1))) == [(0, 0)]


def test_pictures_without_an_answer_count() -> None:
    truth = [Grounded("a mug", ("a mug",), (stripe(0, 5),))] * 2
    said = [Grounded("a mug", ("a mug",), (stripe(0, 5),)), Grounded("nothing", (), ())]
    values = gcg_metrics(truth, said, word_overlap)
    assert values["mIoU"] == pytest.approx(0.5) and values["recall"] == 0.5
    assert values["AP50"] == pytest.approx(0.505, abs=0.01)  # one of two is found: 51 of 101 recall levels
    assert gcg_metrics(truth, [said[1]] * 2, word_overlap) == {"AP50": 0, "mIoU": 0, "recall": 0}


def test_what_cannot_be_judged() -> None:
    nothing = Grounded("a caption", (), ())
    with pytest.raises(ValueError, match="cannot be judged"):
        gcg_metrics([nothing], [], word_overlap)
    with pytest.raises(ValueError, match="no picture has phrases with masks"):
        gcg_metrics([nothing], [nothing], word_overlap)
    with pytest.raises(ValueError, match="no caption of image 7"):
        grounded_of_coco(["7"], [], [])
    with pytest.raises(ValueError, match="no masks"):
        referring_metrics([], [])


def test_similarities_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="needs a folder with bert-base-uncased"):
        make_similarity("bert")
    with pytest.raises(EvaluationError, match="no BERT there"):
        make_similarity("bert", tmp_path)
    with pytest.raises(EvaluationError, match="no text similarity 'letters'"):
        make_similarity("letters")


def test_bert_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "mug", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    alike = BertSimilarity(tmp_path)
    values = alike(["a red mug", "a dog"], ["a dog", "A Red Mug", "mug"])
    assert values.shape == (2, 3) and (np.abs(values) <= 1 + 1e-6).all()
    assert values[0, 1] == pytest.approx(1) and values[1, 0] == pytest.approx(1)
    assert values[0, 0] < 1 - 1e-6
    assert alike([], ["a dog"]).shape == (0, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.randoms(use_true_random=False))
def test_pairs_use_each_mask_once(rows: int, columns: int, random: Any) -> None:
    ious = np.array([[random.random() for _ in range(columns)] for _ in range(rows)]).reshape(rows, columns)
    pairs = match_phrases(ious, np.ones((rows, columns)))
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert all(ious[pair] >= 0.5 for pair in pairs)
    mean = greedy_iou(ious)
    assert 0 <= mean <= (ious.max() if ious.size else 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a dog", "a red mug", "mug", ""]), max_size=4))
def test_word_overlap_is_symmetric(texts: list[str]) -> None:
    other = ["a mug", "the dog", "a red mug"]
    values = word_overlap(texts, other)
    np.testing.assert_array_equal(values, word_overlap(other, texts).T)
    assert ((values >= 0.2) & (values <= 1)).all() and values.shape == (len(texts), 3)
