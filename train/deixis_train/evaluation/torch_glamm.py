"""Answers of the PyTorch GLaMM of a checkpoint, asked and read as the runtime does it for a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from deixis.bundle import TaskSpec
from deixis.conversation import parse_answer_ids, prompt_ids, render, reserved_marks
from deixis.errors import PromptError, TaskError, TextTooLongError
from deixis_train.checkpoint import Checkpoint
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.masks import box_of_mask, segment_of_logits
from deixis_train.evaluation.predictor import Box, Described, GroundedAnswer, Image, Masks, PlacedWord
from deixis_train.glamm.conversations import conversation_spec
from deixis_train.glamm.pictures import global_input, grounding_input
from deixis_train.models.glamm.reference import embed_index, expand_ids
from deixis_train.tasks import glamm_tasks


class _Seen:
    """What the encoders gave for a picture; the grounding encoder runs when a mask is first wanted."""

    def __init__(self, features: Tensor, levels: list[Tensor]) -> None:
        self.features, self.levels = features, levels
        self.sam: Tensor | None = None
        self.valid: tuple[int, int] = (0, 0)


class TorchGlammPredictor:
    """A `Predictor`. `device`: where the model runs, "cpu" or what torch calls others."""

    name = "torch"

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self._model = checkpoint.glamm.to(device).eval()
        self._device = torch.device(device)
        self._config = self._model.config
        self._spec = conversation_spec(self._config)
        self._tasks = glamm_tasks(self._config)
        known = {field.name for field in fields(TaskSpec)}
        for name, values in checkpoint.tasks.items():
            if name not in self._tasks or not set(values) <= known:
                raise EvaluationError(f"the checkpoint sets {dict(values)} for task {name!r}, which is not known here")
            self._tasks[name] = replace(self._tasks[name], **values)
        self._tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
        self._last: tuple[Image, _Seen] | None = None

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset(self._tasks)

    def refer(
        self, picture: Image, texts: Sequence[str], masks: bool = True
    ) -> tuple[list[Box | None], list[NDArray[np.bool_] | None] | None]:
        task = self._tasks["refer"]
        for text in texts:
            self._check(text)
        found = [self._first_mask(picture, task.instruction.replace("{text}", text), task) for text in texts]
        boxes = [None if mask is None or not mask.any() else _box(mask) for mask in found]
        return boxes, found if masks else None

    def caption(self, picture: Image) -> str:
        task = self._tasks["caption"]
        return self._said(picture, task.instruction, task)

    def region_captions(self, picture: Image, boxes: Sequence[Box]) -> list[str]:
        if "region_caption" not in self._tasks:
            raise TaskError(f"checkpoint {self._config.name!r} takes no boxes: it has no region encoder")
        task = self._tasks["region_caption"]
        return [self._said(picture, task.instruction, task, [box]) for box in boxes]

    def grounded_caption(self, picture: Image) -> GroundedAnswer:
        task = self._tasks["grounded_caption"]
        ids, states = self._generate(picture, task.instruction, task)
        parsed = parse_answer_ids(ids, self._decode, self._spec)
        masks = self._masks(picture, states)
        phrases = tuple((p.text, None if p.mask_index is None else masks[p.mask_index]) for p in parsed.phrases)
        return GroundedAnswer(parsed.text, phrases, tuple(masks[index] for index in parsed.loose_masks))

    def answer(self, picture: Image, question: str) -> str:
        self._check(question)
        task = self._tasks["ask"]
        return self._said(picture, task.instruction.replace("{text}", question), task)

    def trace(self, picture: Image, text: str) -> list[PlacedWord]:
        raise self._cannot("trace")

    def dense_captions(self, picture: Image) -> list[Described]:
        raise self._cannot("make dense captions")

    def segment(self, picture: Image, boxes: Sequence[Box]) -> Masks:
        raise self._cannot("segment boxes")

    # ---- the way of a request

    def _cannot(self, what: str) -> TaskError:
        return TaskError(f"checkpoint {self._config.name!r} is a GLaMM, which cannot {what}")

    def _check(self, text: str) -> None:
        """Raise PromptError for texts that the runtime refuses."""
        if not text.strip():
            raise PromptError("the text is empty")
        if marks := reserved_marks(text):
            raise PromptError(f"the text holds {marks[0]}, which is a control token of the conversation")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._config.ids.unknown in encoding.ids:
            raise PromptError("the text has characters that the model does not know")

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _said(self, picture: Image, question: str, task: TaskSpec, boxes: Sequence[Box] = ()) -> str:
        ids, _ = self._generate(picture, question, task, boxes)
        return parse_answer_ids(ids, self._decode, self._spec).text

    def _first_mask(self, picture: Image, question: str, task: TaskSpec) -> NDArray[np.bool_] | None:
        _, states = self._generate(picture, question, task, until_mask=True)
        return self._masks(picture, states)[0] if len(states) else None

    @torch.inference_mode()
    def _see(self, picture: Image) -> _Seen:
        if self._last is None or self._last[0] is not picture:
            clip = self._config.clip
            square = torch.from_numpy(global_input(picture, clip.image_size, clip.fit)).float()[None]
            features, levels = self._model.encode_global(square.to(self._device))
            self._last = (picture, _Seen(features[0], levels))
        return self._last[1]

    @torch.inference_mode()
    def _masks(self, picture: Image, states: list[Tensor]) -> Masks:
        """The mask bool [H, W] of each state [D]."""
        if not states:
            return []
        seen, size = self._see(picture), self._config.image_size
        if seen.sam is None:
            padded, seen.valid = grounding_input(picture, size)
            valid = torch.tensor([seen.valid], dtype=torch.float32, device=self._device)
            seen.sam = self._model.encode_grounding(torch.from_numpy(padded).float()[None].to(self._device), valid)
        index = torch.zeros(len(states), dtype=torch.int64, device=self._device)
        logits, _ = self._model.decode_masks(torch.stack(states), seen.sam, index)
        original = (picture.shape[0], picture.shape[1])
        return [segment_of_logits(one, seen.valid, size, original) for one in logits.float().cpu().numpy()]

    @torch.inference_mode()
    def _generate(
        self, picture: Image, question: str, task: TaskSpec, boxes: Sequence[Box] = (), until_mask: bool = False
    ) -> tuple[list[int], list[Tensor]]:
        """Ids of the greedy answer, its end left out, and the state [D] of each mask token in it."""
        model, config = self._model, self._config
        asked = len(self._encode(question))
        if asked > task.instruction_tokens:
            raise TextTooLongError(
                f"the question has {asked} tokens, the model takes at most {task.instruction_tokens}"
            )
        ids = prompt_ids(render(self._spec, [(question, None)]), self._encode, self._spec)
        visual = torch.cat([self._see(picture).features, *self._regions(picture, boxes)])
        expanded = expand_ids(ids, config.clip.tokens)
        index = embed_index(expanded, config.ids.region, len(boxes))
        embeds = model.splice(expanded[None].to(self._device), visual, index[None].to(self._device))
        cache = model.llama.empty_cache(1, len(expanded) + task.max_length)
        answer: list[int] = []
        states: list[Tensor] = []
        position = 0
        while len(answer) < task.max_length:
            hidden, cache = model.llama.step(embeds, torch.tensor([position], device=self._device), cache)
            position += embeds.shape[1]
            chosen = int(model.llama.head(hidden[0, -1]).argmax())
            if chosen == config.ids.end:
                break
            answer.append(chosen)
            if chosen == config.ids.mask:
                states.append(hidden[0, -1])
                if until_mask:
                    break
            embeds = model.llama.embed(torch.tensor([[chosen]], device=self._device))
        return answer, states

    def _regions(self, picture: Image, boxes: Sequence[Box]) -> list[Tensor]:
        """Embeddings of boxes, px of the picture: nothing, or one tensor [k, D]."""
        if not len(boxes):
            return []
        height, width = picture.shape[:2]
        sides = np.array([width, height, width, height])
        shares = (np.asarray(boxes, np.float64).reshape(-1, 4).clip(0, sides) / sides).astype(np.float32)
        index = torch.zeros(len(shares), dtype=torch.int64, device=self._device)
        return [self._model.encode_regions(self._see(picture).levels, torch.from_numpy(shares).to(self._device), index)]


def _box(mask: NDArray[np.bool_]) -> Box:
    left, top, right, bottom = (float(v) for v in box_of_mask(mask))
    return left, top, right, bottom
