"""The whole road through the exported graphs of glamm: pictures, boxes, greedy answers, states, masks.

The graphs run in the runtime itself. Two conversations go in lockstep there and one by one, uncached, in PyTorch; one
of them names boxes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis.bundle import ParityRecord
from deixis.conversation import IMAGE_ID
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.image import fit, pad, square
from deixis_export.cases import example_picture
from deixis_export.cases_glamm import example_boxes
from deixis_export.chain import CHAIN_LENGTH, CHAIN_TOLERANCE, EXACT, INT8_TOLERANCE
from deixis_export.loaded import LoadedBundle
from deixis_export.session import relative_error
from deixis_train.models.glamm import reference
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm

WORDS = 6  # of an example prompt before and behind the picture
BOXES = 2
MASKS = 3  # in the given answer

Picture = NDArray[np.uint8]


@torch.no_grad()
def chain_parity(model: Glamm, bundle: Path, precision: str, seed: int) -> dict[str, ParityRecord]:
    """Compare requests through the bundle with the same requests through the PyTorch model of the same weights.

    Two pictures with a conversation each: vectors of boxes, ids of greedy answers, states of a given answer, and the
    masks of the mask tokens in it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    pictures = [_picture(config, seed + 2 + i, tall=i == 1) for i in range(2)]
    boxes = example_boxes(BOXES, generator) if config.region is not None else torch.zeros(0, 4)
    prompts = [_prompt(config, 0, generator), _prompt(config, len(boxes), generator)]
    given = [_given(config, prompt, generator) for prompt in prompts]
    length = min(config.max_new_tokens, CHAIN_LENGTH)

    int8 = precision == "int8"
    tolerance, exact = (INT8_TOLERANCE, INT8_TOLERANCE) if int8 else (CHAIN_TOLERANCE, EXACT)
    records: dict[str, ParityRecord] = {}

    def record(name: str, actual: NDArray[np.float32], expected: Tensor) -> None:
        error = relative_error({"x": actual}, {"x": expected.numpy()})
        records[f"chain/{name}"] = ParityRecord(error, tolerance, "torch with the same weights")

    with LoadedBundle(bundle, GlammPipeline) as chain:
        scenes = chain.pipeline.encode(pictures)
        inputs = [_as_torch(picture, chain.pipeline) for picture in pictures]
        sides = np.array([pictures[1].shape[1], pictures[1].shape[0]] * 2)
        vectors = chain.pipeline.regions(scenes[1:], [boxes.numpy() * sides])[0] if len(boxes) else None
        visual = [reference.visual_embeddings(model, inputs[0]), reference.visual_embeddings(model, inputs[1], boxes)]
        if vectors is not None:
            record("regions", vectors, visual[1][config.clip.tokens :])

        answers = _answers(chain.pipeline, scenes, prompts, vectors, length)
        wanted = [
            reference.generate(model, prompt, picture, own, length).ids[len(prompt) :].tolist()
            for prompt, picture, own in zip(prompts, inputs, (None, boxes), strict=True)
        ]
        differing = [a != b for found, ids in zip(answers, wanted, strict=True) for a, b in _beside(found, ids)]
        records["chain/greedy_ids"] = ParityRecord(float(np.mean(differing)), exact, "torch, share of ids that differ")

        session = chain.pipeline.session(scenes, len(given[0]) + config.clip.tokens)
        _, states = session.feed(np.array(given), [None, vectors])
        expanded = [reference.expand_ids(ids, config.clip.tokens) for ids in given]
        expected = torch.stack(
            [_states(model, ids, own) for ids, own in zip(expanded, visual, strict=True)],
        )
        record("states", states, expected)
        positions = reference.mask_positions(expanded[0], config.ids.mask)  # the same in both
        flat = np.ascontiguousarray(states[:, positions.numpy()]).reshape(-1, states.shape[-1])
        logits, iou = chain.pipeline.masks(flat, [scene for scene in scenes for _ in positions])
        sam = torch.cat([model.encode_grounding(picture.image, picture.valid_hw) for picture in inputs])
        index = torch.arange(2).repeat_interleave(len(positions))
        wanted_logits, wanted_iou = model.decode_masks(expected[:, positions].flatten(0, 1), sam, index)
        record("masks", logits, wanted_logits)
        record("iou", iou, wanted_iou)
    return records


def _picture(config: GlammConfig, seed: int, tall: bool) -> Picture:
    """An RGB picture [H, W, 3], whose sides differ and are none of the model's."""
    image = example_picture(config.image_size, 1, seed)[0][0].numpy().astype(np.uint8)
    image = image[: image.shape[0] * 5 // 8, : image.shape[1] * 7 // 8]
    return np.ascontiguousarray(image.transpose(1, 0, 2) if tall else image)


def _as_torch(picture: Picture, pipeline: GlammPipeline) -> reference.Picture:
    """The picture as both models get it; how it is resized is not what is compared here."""
    resized, geometry = fit(picture, pipeline.manifest.image)
    whole = square(picture, pipeline.global_image).astype(np.float32)
    return reference.Picture(
        torch.from_numpy(whole)[None],
        torch.from_numpy(pad(resized, pipeline.manifest.image))[None],
        torch.tensor([geometry.valid], dtype=torch.float32),
    )


def _words(config: GlammConfig, count: int, generator: torch.Generator) -> list[int]:
    """Random ids without a meaning of their own."""
    special = set(dataclasses.asdict(config.ids).values())
    plain = torch.tensor([i for i in range(config.llama.vocab) if i not in special])
    return plain[torch.randint(0, len(plain), (count,), generator=generator)].tolist()


def _prompt(config: GlammConfig, regions: int, generator: torch.Generator) -> list[int]:
    """Ids of a prompt that mentions a picture and so many regions, of one length whatever their number."""
    ids = config.ids
    before, behind = (_words(config, WORDS, generator) for _ in range(2))
    behind[:regions] = [ids.region] * regions
    return [ids.begin, *before, ids.image_start, IMAGE_ID, ids.image_end, *behind]


def _given(config: GlammConfig, prompt: list[int], generator: torch.Generator) -> list[int]:
    """A prompt and an answer with masks, always at the same places."""
    phrases = [[*_words(config, 2, generator), config.ids.mask] for _ in range(MASKS)]
    return [*prompt, *(i for phrase in phrases for i in phrase)]


def _answers(
    pipeline: GlammPipeline,
    scenes: list[GlammFeatures],
    prompts: list[list[int]],
    vectors: NDArray[np.float32] | None,
    length: int,
) -> list[list[int]]:
    """Greedy answers of at most `length` ids, each with its end id if it ended."""
    session = pipeline.session(scenes, len(prompts[0]) + pipeline.conversation.image_tokens + length)
    top, _ = session.feed(np.array(prompts), [None, vectors])
    end = pipeline.manifest.tokenizer.end_id
    chosen = [top.ids[:, 0].copy()]
    for _ in range(length - 1):
        top, _ = session.step(chosen[-1])
        chosen.append(top.ids[:, 0].copy())
    rows = np.stack(chosen, axis=1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def _beside(found: list[int], wanted: list[int]) -> list[tuple[int, int]]:
    """Pairs of ids; what only one of them has is paired with -1."""
    longest = max(len(found), len(wanted))
    return list(zip(found + [-1] * (longest - len(found)), wanted + [-1] * (longest - len(wanted)), strict=True))


def _states(model: Glamm, expanded: Tensor, visual: Tensor) -> Tensor:
    """States [L, D] of a whole text."""
    config = model.config
    index = reference.embed_index(expanded, config.ids.region, len(visual) - config.clip.tokens)
    return model.llama(model.splice(expanded[None], visual, index[None]))[0]
