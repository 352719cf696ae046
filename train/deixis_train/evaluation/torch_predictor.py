"""Answers of the PyTorch PixelLLM of a checkpoint, prepared and read exactly as the runtime does it for a bundle."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis.bundle import TaskSpec
from deixis.errors import TaskError
from deixis_train.checkpoint import Checkpoint, load_checkpoint
from deixis_train.data.preparation.geometry import fit_long, resize_bilinear
from deixis_train.evaluation.boxes import to_picture
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.masks import mask_of_logits, segment_of_logits
from deixis_train.evaluation.model_tasks import DETECTION_CHOICES, model_tasks
from deixis_train.evaluation.predictor import Box, Described, GroundedAnswer, Image, Masks, PlacedWord, Predictor
from deixis_train.evaluation.texts import Pieces, TextEncoder
from deixis_train.evaluation.torch_glamm import TorchGlammPredictor
from deixis_train.loaders.report import CheckpointError
from deixis_train.models import decoding
from deixis_train.models.box_decoder.dense_captions import rank_beams, score_with_caption
from deixis_train.models.pixelllm import Scene
from deixis_train.models.prompt_encoder import corners, pixelllm_prompt

ROWS = 32  # prompts that run together


class TorchPredictor:
    """A `Predictor`. `device`: where the model runs, "cpu" or what torch calls others."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self._model = checkpoint.pixelllm.to(device).eval()
        self._device = torch.device(device)
        self._config = self._model.config
        self._tasks = model_tasks(self._config, checkpoint.tasks)
        self._texts = TextEncoder(checkpoint.tokenizer_json, self._config)
        self._last: tuple[Image, Scene, tuple[int, int]] | None = None
        chosen = checkpoint.tasks.get("dense_captions", {})
        self._join_scores = bool(chosen.get("join_scores", False))
        if self._model.box_decoder is not None:
            own = {key: chosen[key] for key in DETECTION_CHOICES if key in chosen and key != "join_scores"}
            self._model.box_decoder.config = replace(self._model.box_decoder.config, **own)

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset(self._tasks) | (frozenset() if self._model.mask_decoder is None else {"segment"})

    @torch.inference_mode()
    def refer(
        self, picture: Image, texts: Sequence[str], masks: bool = True
    ) -> tuple[list[Box | None], list[NDArray[np.bool_] | None] | None]:
        task, pieces = self._given("refer", texts)
        if masks and self._model.mask_decoder is None:
            raise TaskError(f"checkpoint {self._config.name!r} makes no masks: it has no mask decoder")
        scene, valid = self._encode(picture)
        original = picture.shape[:2]
        boxes: list[Box | None] = []
        found: list[NDArray[np.bool_] | None] = []
        for start in range(0, len(texts), ROWS):
            rows = slice(start, start + ROWS)
            visual, features, ids = self._forced(scene, valid, task, texts[rows], pieces[rows])
            end = (ids == self._config.end_token_id).long().argmax(1)
            points = self._model.locate(features)[torch.arange(len(ids)), end - 1]
            points = points * torch.tensor([valid[1], valid[0]], dtype=points.dtype, device=self._device)
            places = torch.cat([points.amin(1), points.amax(1)], dim=1)  # [R, 4], not clipped, as in training
            boxes += [_box(box) for box in to_picture(places.double().cpu().numpy(), valid, original)]
            if masks:
                logits, _ = self._model.mask(scene.sam, self._zeros(len(ids)), places, visual, features)
                found += [mask_of_logits(one, valid, self._config.image_size, original) for one in logits.cpu().numpy()]
        return boxes, found if masks else None

    @torch.inference_mode()
    def trace(self, picture: Image, text: str) -> list[PlacedWord]:
        task, [pieces] = self._given("trace", [text])
        scene, valid = self._encode(picture)
        _, features, _ = self._forced(scene, valid, task, [text], [pieces])
        points = self._model.locate(features)[0, 1 : len(pieces.ids) + 1].double().cpu().numpy()
        points *= [picture.shape[1], picture.shape[0]]
        words = []
        for word, own in pieces.words():
            places = points[own].reshape(-1, 2)
            box = _box(np.concatenate([places.min(0), places.max(0)])) if own else None
            words.append(PlacedWord(word, box))
        return words

    def caption(self, picture: Image) -> str:
        _, valid = self._encode(picture)
        return self._generate("caption", picture, torch.tensor([[0, 0, valid[1], valid[0]]], dtype=torch.float32))[0]

    def region_captions(self, picture: Image, boxes: Sequence[Box]) -> list[str]:
        return self._generate("region_caption", picture, self._to_input(picture, boxes)) if len(boxes) else []

    @torch.inference_mode()
    def dense_captions(self, picture: Image) -> list[Described]:
        task = self._task("dense_captions")
        scene, valid = self._encode(picture)
        found = self._model.detect(self._model.features(scene))
        places = to_picture(found.boxes[0].double().cpu().numpy(), valid, picture.shape[:2])
        # Described is what the runtime describes: objects, empty slots aside, that reach into the picture itself.
        inside = torch.from_numpy((places[:, 2:] > places[:, :2]).all(axis=1)).to(self._device)
        objects = torch.nonzero(inside & (found.scores[0] > 0))[:, 0]
        if not len(objects):
            return []
        parts = [self._hypotheses(scene, part, task) for part in self._parts(found.boxes[0, objects], task)]
        tokens, log_probs = (torch.cat(values) for values in zip(*parts, strict=True))
        scores = found.scores[0, objects]
        order, beam = torch.arange(len(objects), device=self._device), torch.full_like(objects, task.beams - 1)
        if self._join_scores and task.beams == 1:
            scores, order = torch.sort(score_with_caption(scores, log_probs[:, 0]), descending=True, stable=True)
        elif self._join_scores:
            ranked = rank_beams(scores[None], log_probs[None], found.scores.shape[1])
            scores, order, beam = ranked.scores[0], ranked.box[0], ranked.beam[0]
        return [
            Described(_box(places[int(objects[box])]), self._said(tokens[box, one].tolist()), float(score))
            for score, box, one in zip(scores, order.tolist(), beam.tolist(), strict=True)
            if score > 0
        ]

    @torch.inference_mode()
    def segment(self, picture: Image, boxes: Sequence[Box]) -> Masks:
        if self._model.mask_decoder is None:
            raise TaskError(f"checkpoint {self._config.name!r} makes no masks: it has no mask decoder")
        scene, valid = self._encode(picture)
        found: Masks = []
        for part in self._to_input(picture, boxes).split(ROWS) if len(boxes) else ():
            points, labels = corners(part.to(self._device))
            # SAM's padding point belongs to points only; a box is its two corners
            sparse = self._model.prompt_encoder(points, labels)
            logits, _ = self._model.decode_masks(scene.sam, self._zeros(len(part)), sparse)
            found += [
                segment_of_logits(one, valid, self._config.image_size, picture.shape[:2])
                for one in logits[:, 0].cpu().numpy()
            ]
        return found

    def grounded_caption(self, picture: Image) -> GroundedAnswer:
        raise TaskError(f"checkpoint {self._config.name!r} is a PixelLLM, which cannot make grounded captions")

    def answer(self, picture: Image, question: str) -> str:
        raise TaskError(f"checkpoint {self._config.name!r} is a PixelLLM, which cannot answer questions")

    # ---- the way of a request

    @torch.inference_mode()
    def _encode(self, picture: Image) -> tuple[Scene, tuple[int, int]]:
        """Features of a picture, and its (height, width) in the network input."""
        if self._last is None or self._last[0] is not picture:
            padded, valid = prepare(picture, self._config.image_size)
            image = torch.from_numpy(padded)[None].to(self._device)
            sizes = torch.tensor([valid], dtype=torch.float32, device=self._device)
            self._last = (picture, self._model.encode_image(image, sizes), valid)
        return self._last[1], self._last[2]

    def _to_input(self, picture: Image, boxes: Sequence[Box]) -> Tensor:
        """Boxes [R, 4] clipped to the picture, in px of the network input."""
        _, valid = self._encode(picture)
        height, width = picture.shape[:2]
        clipped = np.asarray(boxes, np.float64).reshape(-1, 4).clip(0, [width, height, width, height])
        return torch.from_numpy((clipped * ([valid[1] / width, valid[0] / height] * 2)).astype(np.float32))

    def _given(self, name: str, texts: Sequence[str]) -> tuple[TaskSpec, list[Pieces]]:
        task = self._task(name)
        return task, [self._texts.given(text, task) for text in texts]

    def _task(self, name: str) -> TaskSpec:
        if name not in self._tasks:
            part = "box decoder" if name == "dense_captions" else "point predictor"
            raise TaskError(f"checkpoint {self._config.name!r} cannot {name}: it has no {part}")
        return self._tasks[name]

    def _prefix(self, scene: Scene, boxes: Tensor) -> Tensor:
        points, labels = pixelllm_prompt(boxes.to(self._device), self._config.prompt_use_box_rate)
        return self._model.extract_prompt(self._model.features(scene), self._zeros(len(boxes)), points, labels)

    def _forced(
        self, scene: Scene, valid: tuple[int, int], task: TaskSpec, texts: Sequence[str], pieces: Sequence[Pieces]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Visual prefix [R, Q, E], features [R, L, E] and ids [R, L] of given texts about the whole picture."""
        whole = torch.tensor([[0, 0, valid[1], valid[0]]] * len(texts), dtype=torch.float32)
        visual = self._prefix(scene, whole)
        contexts = [self._texts.context(task, text) for text in texts]
        context = self._ids(contexts, max(1, task.instruction_tokens))
        begin, end = self._config.begin_token_id, self._config.end_token_id
        ids = self._ids([[begin, *p.ids, end] for p in pieces], task.max_length)
        encoded, mask = self._model.text.encode(visual, context)
        _, features = self._model.text.decode(ids, encoded, mask, with_logits=False)
        return visual, features, ids

    @torch.inference_mode()
    def _generate(self, name: str, picture: Image, boxes: Tensor) -> list[str]:
        """A text for each box [R, 4] px of the network input."""
        task = self._task(name)
        scene, _ = self._encode(picture)
        best = [self._hypotheses(scene, part, task)[0][:, -1] for part in self._parts(boxes, task)]
        return [self._said(row) for tokens in best for row in tokens.tolist()]

    def _parts(self, boxes: Tensor, task: TaskSpec) -> tuple[Tensor, ...]:
        return boxes.split(max(1, ROWS // task.beams))

    def _said(self, tokens: list[int]) -> str:
        """The text of tokens [L], without BOS, EOS and what follows."""
        ids, end = tokens[1:-1], self._config.end_token_id
        return self._texts.decode(ids[: ids.index(end)] if end in ids else ids)

    def _hypotheses(self, scene: Scene, boxes: Tensor, task: TaskSpec) -> tuple[Tensor, Tensor]:
        """Texts about boxes [R, 4] px of the network input: ids [R, beams, L] and scores [R, beams], best last."""
        visual = self._prefix(scene, boxes)
        ids = self._texts.context(task, "")
        context = self._ids([ids] * len(boxes), len(ids)) if ids else None
        text, end = self._model.text, self._config.end_token_id
        encoded, mask = text.encode(visual, context)
        cross = text.cross_kv(encoded)
        begin = decoding.begin_tokens(len(visual), task.max_length, self._config.begin_token_id, end).to(self._device)
        cache = text.empty_cache(len(visual), task.max_length)
        done = 0  # positions in the cache: greedy rows only grow

        def grown(tokens: Tensor, position: int) -> Tensor:
            nonlocal cache, done
            at = torch.tensor([done], device=self._device)
            logits, _, cache = text.step(tokens[:, done : position + 1], at, cache, cross, mask)
            done = position + 1
            return logits

        def whole(tokens: Tensor, position: int) -> Tensor:
            empty = text.empty_cache(len(tokens), position + 1)
            at = torch.tensor([0], device=self._device)
            return text.step(tokens[:, : position + 1], at, empty, cross, mask)[0]

        if task.beams == 1:
            tokens, scores = decoding.greedy(grown, begin, end)
            return tokens[:, None], scores[:, None]
        return decoding.beam_search(whole, begin, task.beams, task.beams_per_node, task.alpha, end)

    def _ids(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self._device)

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=self._device)


def load_predictor(
    directory: str | os.PathLike[str],
    frozen_from: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> tuple[Predictor, dict[str, str]]:
    """The predictor of a checkpoint of either family, and what reports say of it: name, folder and hash of its weights.

    Raises EvaluationError with the checkpoint's own complaint, or for a device that torch does not have.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        checkpoint = load_checkpoint(directory, frozen_from)
        predictor = (TorchGlammPredictor if checkpoint.family == "glamm" else TorchPredictor)(checkpoint, device)
    except (CheckpointError, RuntimeError, AssertionError) as error:
        raise EvaluationError(str(error)) from None
    return predictor, {"name": checkpoint.config.name, "source": checkpoint.source, "device": device}


def prepare(picture: Image, size: int) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """The network input float32 [size, size, 3] of a picture, and the (height, width) that it takes there (section 2).

    Resized by plain bilinear interpolation without anti-aliasing, zero padded right and bottom.
    """
    valid = fit_long((picture.shape[0], picture.shape[1]), size)
    padded = np.zeros((size, size, 3), np.float32)
    padded[: valid[0], : valid[1]] = resize_bilinear(picture.astype(np.float32), valid)
    return padded, valid


def _box(values: NDArray[np.float64]) -> Box:
    left, top, right, bottom = (float(v) for v in values)
    return left, top, right, bottom
