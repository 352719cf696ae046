"""Dense object captioning: every object found becomes a prompt, and all of them are described together (section 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from deixis.batching import SceneFeatures, pick
from deixis.bundle import TaskSpec
from deixis.captioning import decode_rules, make_caption, start_decoder
from deixis.decoding import Decoded, DecodeRules, beam_search, collect_beam, greedy
from deixis.detection import Detections, join_scores, rank_beams
from deixis.errors import PromptError
from deixis.geometry import Geometry
from deixis.options import Check, DecodeOptions
from deixis.pipeline import Pipeline
from deixis.prompts import PromptTokens, region_tokens
from deixis.results import Box, DenseCaption

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class DenseChoice:
    """Which objects come out: see `Scene.dense_captions`. Raises PromptError when a value makes no sense."""

    limit: int | None = None
    min_score: float | None = None
    join_scores: bool | None = None

    def __post_init__(self) -> None:
        limit, least, join = self.limit, self.min_score, self.join_scores
        if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
            raise PromptError(f"limit must be a whole number from 1 on, found {limit!r}")
        if least is not None and (not isinstance(least, Real) or isinstance(least, bool) or not 0 <= least <= 1):
            raise PromptError(f"min_score must be a number from 0 to 1, found {least!r}")
        if join is not None and not isinstance(join, bool):
            raise PromptError(f"join_scores must be True, False or None, found {join!r}")


@dataclass(frozen=True)
class _Objects:
    """What is to be described in one picture, best first: scores [n], prompts, and boxes in pixels of the picture."""

    scores: Floats
    tokens: list[PromptTokens]
    boxes: list[Box]


def dense_captions_batch(
    pipeline: Pipeline, scenes: Sequence[SceneFeatures], choice: DenseChoice, options: DecodeOptions
) -> list[tuple[DenseCaption, ...]]:
    """Described objects of every scene, best first; the result is that of one at a time."""
    check = options.start()
    task = pipeline.task("dense_captions")
    rules = decode_rules(pipeline, task, options)
    join = pipeline.detection.join_scores if choice.join_scores is None else choice.join_scores
    limit = min(choice.limit or pipeline.detection.max_detections, pipeline.detection.max_detections)
    least = np.float32(choice.min_score or 0.0)
    pipeline.chunks(scenes, rules.beams)  # refuses too many beams before anything has run

    found = pipeline.detect(scenes, check)
    objects = [
        _choose(pipeline, scene.geometry, boxes, limit, least, join) for scene, boxes in zip(scenes, found, strict=True)
    ]
    owners = [index for index, of_scene in enumerate(objects) for _ in of_scene.boxes]
    tokens = [token for of_scene in objects for token in of_scene.tokens]
    texts = _describe(pipeline, pick(scenes, owners), tokens, task, rules, check)

    results: list[tuple[DenseCaption, ...]] = []
    start = 0
    for scene, of_scene in zip(scenes, objects, strict=True):
        own = texts[start : start + len(of_scene.boxes)]
        start += len(own)
        ranked = _ranked(of_scene.scores, own, limit, join)
        results.append(
            tuple(
                _dense_caption(pipeline, task, scene.geometry, of_scene, box, own[box][beam], float(score))
                for score, box, beam in ranked
                if score > 0 and score >= least
            )
        )
    return results


def _choose(
    pipeline: Pipeline, geometry: Geometry, found: Detections, limit: int, least: np.float32, join: bool
) -> _Objects:
    """The objects worth describing.

    Left out is what lies in the padding, and what cannot reach the least score: a caption's probability is at most 1.
    """
    scores: list[np.float32] = []
    tokens: list[PromptTokens] = []
    boxes: list[Box] = []
    height, width = geometry.original
    for box, score in zip(found.boxes[: found.count], found.scores, strict=False):
        reachable = np.sqrt(score) if join else score
        left, top, right, bottom = geometry.to_original(box.reshape(2, 2)).clip((0, 0), (width, height)).ravel()
        if reachable < least or right <= left or bottom <= top:
            continue
        original = (float(left), float(top), float(right), float(bottom))
        scores.append(score)
        boxes.append(original)
        # The prompt is the detector's own box, as in training, also where it reaches into the padding.
        tokens.append(pipeline.checked(region_tokens(box, original, pipeline.prompts)))
        if len(boxes) == limit:
            break
    return _Objects(np.array(scores, np.float32), tokens, boxes)


def _describe(
    pipeline: Pipeline,
    scenes: Sequence[SceneFeatures],
    tokens: Sequence[PromptTokens],
    task: TaskSpec,
    rules: DecodeRules,
    check: Check,
) -> list[list[Decoded]]:
    """All hypotheses of every prompt, the best last; prompts decode together, as many as the bundle allows."""
    texts: list[list[Decoded]] = []
    for chunk in pipeline.chunks(scenes, rules.beams):
        decoder = start_decoder(pipeline, pick(scenes, chunk), pick(tokens, chunk), task, rules, check)
        if rules.beams == 1:
            texts += [[text] for text in greedy(decoder, len(chunk), rules, check)]
        else:
            beams = beam_search(decoder, len(chunk), rules, check)
            texts += [[collect_beam(beams, row, k, rules) for k in range(rules.beams)] for row in range(len(chunk))]
    return texts


def _ranked(
    scores: Floats, texts: Sequence[Sequence[Decoded]], limit: int, join: bool
) -> list[tuple[np.float32, int, int]]:
    """(score, box, hypothesis) of what comes out, best first; boxes have scores [n] and K hypotheses each."""
    if not len(scores):
        return []
    if not join:
        return [(score, box, -1) for box, score in enumerate(scores)]
    log_probs = np.array([[text.score for text in of_box] for of_box in texts], np.float32)
    if log_probs.shape[1] == 1:
        joint = join_scores(scores, log_probs[:, 0])
        return [(np.float32(joint[box]), int(box), 0) for box in np.argsort(-joint, kind="stable")]
    return [
        (score, int(box), int(beam)) for score, box, beam in zip(*rank_beams(scores, log_probs, limit), strict=True)
    ]


def _dense_caption(
    pipeline: Pipeline, task: TaskSpec, geometry: Geometry, objects: _Objects, box: int, text: Decoded, score: float
) -> DenseCaption:
    caption = make_caption(pipeline, task, text, geometry, objects.boxes[box])
    return DenseCaption(
        box=objects.boxes[box],
        text=caption.text,
        words=caption.words,
        score=score,
        detection_score=float(objects.scores[box]),
        caption_score=caption.score,
        ids=caption.ids,
        finished=caption.finished,
    )
