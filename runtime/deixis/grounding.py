"""Places of given text and masks of prompts: refer, trace, segment (sections 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deixis.batching import SceneFeatures, group_indices, pad_ids, pick
from deixis.bundle import TaskSpec
from deixis.errors import EngineError, TextTooLongError
from deixis.geometry import Geometry
from deixis.masks import refer_mask, segment_mask
from deixis.options import Check, DecodeOptions
from deixis.pipeline import Pipeline, stack_tokens
from deixis.prompts import Prompt, corner_tokens, mask_tokens, prompt_tokens
from deixis.readout import box_of_points, make_words, valid_positions
from deixis.results import Box, Grounding, Mask, Segment, Trace
from deixis.tokenizer import Encoded, words_of

Floats = NDArray[np.float32]


def refer_batch(
    pipeline: Pipeline, scenes: Sequence[SceneFeatures], texts: Sequence[str], mask: bool, options: DecodeOptions
) -> list[Grounding]:
    """Box, and mask where asked for, of each phrase in its scene; the result is that of one at a time."""
    check = options.start()
    task = pipeline.task("refer")
    if mask:
        pipeline.require_masks()
    encoded = [_encode(pipeline, task, text) for text in texts]
    found: list[Grounding] = []
    for chunk in pipeline.chunks(scenes):
        found += _refer(pipeline, task, pick(scenes, chunk), pick(texts, chunk), pick(encoded, chunk), mask, check)
    return found


def trace_batch(
    pipeline: Pipeline, scenes: Sequence[SceneFeatures], texts: Sequence[str], options: DecodeOptions
) -> list[Trace]:
    """The place of every word of each given text in its scene; the result is that of one at a time."""
    check = options.start()
    task = pipeline.task("trace")
    encoded = [_encode(pipeline, task, text) for text in texts]
    found: list[Trace] = []
    for chunk in pipeline.chunks(scenes):
        rows, given = pick(scenes, chunk), pick(encoded, chunk)
        ids = _ids(pipeline, task, given)
        _, _, locations = _forced(pipeline, task, rows, pick(texts, chunk), ids, check)
        valid = valid_positions(ids, task.points_at, pipeline.manifest.tokenizer)
        for row, index in enumerate(chunk):
            pieces = slice(1, len(given[row].ids) + 1)
            words = words_of(texts[index], given[row].spans)
            places = make_words(
                texts[index], words, locations[row, pieces], valid[row, pieces], None, rows[row].geometry
            )
            found.append(Trace(texts[index], places))
    return found


def segment_batch(
    pipeline: Pipeline,
    scenes: Sequence[SceneFeatures],
    prompts: Sequence[Prompt],
    multimask: bool,
    options: DecodeOptions,
) -> list[tuple[Segment, ...]]:
    """Masks of each prompt.

    One, or with `multimask` SAM's alternatives, best first; the result is that of one at a time.
    """
    check = options.start()
    pipeline.require("segment")
    tokens = [
        pipeline.checked(mask_tokens(prompt, scene.geometry)) for scene, prompt in zip(scenes, prompts, strict=True)
    ]
    found: list[tuple[Segment, ...]] = [()] * len(prompts)
    for group in group_indices(len(t.labels) for t in tokens):
        for chunk in pipeline.chunks(pick(scenes, group)):
            rows = pick(group, chunk)
            points, labels = stack_tokens(pick(tokens, rows))
            check()
            logits, scores = pipeline.masks(pick(scenes, rows), points, labels)
            for row, maps, values in zip(rows, logits, scores, strict=True):
                # Token 0 is for a single answer, the others are alternatives.
                order = [0] if not multimask else [1 + int(i) for i in np.argsort(-values[1:], kind="stable")]
                found[row] = tuple(_segment(pipeline, maps[i], values[i], scenes[row].geometry) for i in order)
    return found


def _segment(pipeline: Pipeline, logits: Floats, score: np.float32, geometry: Geometry) -> Segment:
    mask = Mask.from_array(segment_mask(logits, geometry, pipeline.manifest.mask.threshold))
    return Segment(mask, float(score), mask.box)


def _encode(pipeline: Pipeline, task: TaskSpec, text: str) -> Encoded:
    """Pieces of a given text.

    Raises PromptError, and TextTooLongError when it does not fit in decoder or instruction.
    """
    encoded = pipeline.tokenizer.encode(text)
    most = task.max_length - 2
    if "{text}" in task.instruction:  # a phrase that the instruction would lose must not look understood
        around = task.instruction.replace("{text}", "").strip()
        used = len(pipeline.tokenizer.encode(around).ids) if around else 0
        most = min(most, task.instruction_tokens - 1 - used)
    if len(encoded.ids) > most:
        raise TextTooLongError(f"the text has {len(encoded.ids)} tokens, the model takes at most {most}; shorten it")
    return encoded


def _ids(pipeline: Pipeline, task: TaskSpec, encoded: Sequence[Encoded]) -> NDArray[np.int64]:
    """[N, L]: BOS, the pieces, EOS, zeros up to the task's fixed length."""
    spec = pipeline.manifest.tokenizer
    return pad_ids([[spec.begin_id, *e.ids, spec.end_id] for e in encoded], task.max_length)


def _forced(
    pipeline: Pipeline,
    task: TaskSpec,
    scenes: Sequence[SceneFeatures],
    texts: Sequence[str],
    ids: NDArray[np.int64],
    check: Check,
) -> tuple[Floats, Floats, Floats]:
    """Visual prefix [N, Q, D], features [N, L, D] and locations [N, L, points, 2] of given ids over whole pictures."""
    whole = [prompt_tokens(Prompt(), scene.geometry, pipeline.prompts) for scene in scenes]
    contexts = [pipeline.context_ids(task, text) for text in texts]
    check()
    prefix = pipeline.prefix(scenes, whole)
    check()
    cross = pipeline.cross(prefix, contexts, max(1, task.instruction_tokens))
    check()
    features, locations = pipeline.teacher_forced(cross, ids)
    return prefix, features, locations


def _refer(
    pipeline: Pipeline,
    task: TaskSpec,
    scenes: Sequence[SceneFeatures],
    texts: Sequence[str],
    encoded: Sequence[Encoded],
    mask: bool,
    check: Check,
) -> list[Grounding]:
    ids = _ids(pipeline, task, encoded)
    prefix, features, locations = _forced(pipeline, task, scenes, texts, ids, check)
    valid = valid_positions(ids, task.points_at, pipeline.manifest.tokenizer)
    boxes = np.stack([_input_box(*row) for row in zip(locations, valid, scenes, strict=True)])
    originals = [_clipped(box, scene.geometry) for box, scene in zip(boxes, scenes, strict=True)]
    if not mask:
        return [Grounding(text, box) for text, box in zip(texts, originals, strict=True)]
    corners = [corner_tokens(box) for box in boxes]  # of the unclipped box, as in training
    points, labels = np.stack([p for p, _ in corners]), np.stack([label for _, label in corners])
    check()
    delta = pipeline.prompt_delta(prefix, features)
    check()
    logits, scores = pipeline.masks(scenes, points, labels, delta)
    spec = pipeline.manifest.mask
    return [
        Grounding(
            text,
            box,
            Mask.from_array(refer_mask(maps[spec.token], scene.geometry, spec.threshold)),
            float(score[spec.token]),
        )
        for text, box, maps, score, scene in zip(texts, originals, logits, scores, scenes, strict=True)
    ]


def _input_box(locations: Floats, valid: NDArray[np.bool_], scene: SceneFeatures) -> NDArray[np.float64]:
    """Bounds [4] of the counting points, in pixels of the network input, not clipped."""
    height, width = scene.geometry.valid
    box = box_of_points(locations * np.array([width, height], np.float32), valid)
    if not np.isfinite(box).all():
        raise EngineError("the decoder gave a box that is not finite; verify the bundle, or use a higher precision")
    return box


def _clipped(box: NDArray[np.float64], geometry: Geometry) -> Box:
    height, width = geometry.original
    corners = geometry.to_original(box.reshape(2, 2)).clip((0, 0), (width, height))
    left, top, right, bottom = (float(v) for v in corners.ravel())
    return left, top, right, bottom
