"""Comparisons of the language model, of splicing, and of whole answers with their masks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deixis.masks import decode_counts
from deixis_export.parity.glamm.backend import Answer, Floats, Prepared, Reading, TorchGlamm, as_floats, as_ids
from deixis_export.parity.glamm.cases_modules import check_masks
from deixis_export.parity.glamm.context import GlammContext, size_of
from deixis_export.parity.report import CHAIN_TOLERANCE, EXACT, Array, GoldenFile, Report
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.reference import postprocess

Case = Callable[[GlammContext, GoldenFile, Report], None]


def llm_text(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """Padded rows run without their padding; what stands there means nothing."""
    hidden = sorted(int(name[6:]) for name in file if re.fullmatch(r"hidden\d+", name)) or [0]

    def padded(name: str, rows: Callable[[], list[Array]]) -> Callable[[], Array]:
        """Rows at the places that are valid, what the file says elsewhere."""

        def run() -> Array:
            whole = np.array(file[name])
            for row, (valid, values) in enumerate(zip(file["attention_mask"] > 0, rows(), strict=True)):
                whole[row, valid] = values
            return whole

        return run

    @lru_cache(maxsize=1)
    def read() -> list[Reading]:
        rows = [ids[valid] for ids, valid in zip(file["input_ids"], file["attention_mask"] > 0, strict=True)]
        return [context.backend.read([int(i) for i in row], None, None, range(len(row))) for row in rows]

    def layer(model: Glamm, number: int) -> Tensor:
        embeds = model.llama.embed(as_ids(file["input_ids"]))
        states = model.llama(embeds, as_ids(file["attention_mask"]) > 0, layers=number)
        return torch.where((as_ids(file["attention_mask"]) > 0)[..., None], states, as_floats(file[f"hidden{number}"]))

    report.check(file, "logits", padded("logits", lambda: [one.logits for one in read()]))
    for number in hidden[:-1]:
        report.check(file, f"hidden{number}", context.in_torch(lambda m, n=number: layer(m, n)))
    report.check(file, f"hidden{hidden[-1]}", padded(f"hidden{hidden[-1]}", lambda: [one.states for one in read()]))


def splice(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """Prompts named by letters: the first is about the first picture, and so on."""
    prompts = sorted(name.removesuffix("_input_ids") for name in file if name.endswith("_input_ids"))
    for number, prompt in enumerate(prompts):
        _spliced(context, file, report, prompt, number)


def _spliced(context: GlammContext, file: GoldenFile, report: Report, prompt: str, number: int) -> None:
    def ids() -> list[int]:
        return [int(i) for i in file[f"{prompt}_input_ids"][0]]

    def positions() -> list[int]:
        return [int(i) for i in file[f"{prompt}_pos"]]

    @lru_cache(maxsize=1)
    def visual() -> tuple[Floats, Floats | None]:
        """Features of the picture and vectors of the boxes."""
        image = context.nth(number).global_image
        features, levels = context.backend.encode_global(image[None])
        if f"{prompt}_boxes" not in file:
            return features[0], None
        boxes = file[f"{prompt}_boxes"]
        return features[0], context.backend.encode_regions(levels, boxes, np.zeros(len(boxes), np.int64))

    @lru_cache(maxsize=1)
    def read() -> Reading:
        return context.backend.read(ids(), *visual(), positions())

    def embeds(model: Glamm) -> Tensor:
        return TorchGlamm(model).embeds(ids(), *visual())

    report.check(file, f"{prompt}_len", lambda: len(read().states), EXACT)
    report.check(file, f"{prompt}_embeds_at_pos", context.in_torch(lambda m: embeds(m)[positions()]))
    for name in sorted(name for name in file if re.fullmatch(rf"{prompt}_layer\d+_hidden_at_pos", name)):
        layers = int(name.split("_layer")[1].split("_")[0])
        run = context.in_torch(lambda m, n=layers: m.llama(embeds(m)[None], layers=n)[0, positions()])
        report.check(file, name, run)
    report.check(file, f"{prompt}_final_hidden_at_pos", lambda: read().states[positions()])
    report.check(file, f"{prompt}_logits_at_pos", lambda: read().logits)


def generation(context: GlammContext, file: GoldenFile, report: Report) -> None:
    for case in sorted(name.removesuffix("_output_ids") for name in file if name.endswith("_output_ids")):
        _generated(context, file, report, case)


def _generated(context: GlammContext, file: GoldenFile, report: Report, case: str) -> None:
    with_boxes = f"{case}_boxes" in file

    @lru_cache(maxsize=1)
    def picture() -> Prepared:
        # Cases with boxes are about the second picture.
        return context.picture_of(size_of(file[f"{case}_orig_hw"]), 1 if with_boxes else 0)

    @lru_cache(maxsize=1)
    def answer() -> Answer:
        ids, prompt = file[f"{case}_output_ids"], int(file[f"{case}_prompt_len"])
        boxes = file[f"{case}_boxes"] if with_boxes else None
        return context.backend.generate([int(i) for i in ids[:prompt]], picture(), boxes, len(ids) - prompt)

    def fitting(value: Callable[[Answer], Array]) -> Callable[[], Array]:
        return lambda: value(answer())

    def logits() -> Array:
        return answer().logits if len(answer().logits) else file[f"{case}_low_res"][:, 0]

    report.check(file, f"{case}_output_ids", fitting(lambda a: a.ids), EXACT)
    report.check(file, f"{case}_seg_expanded_pos", fitting(lambda a: a.positions), EXACT)
    report.check(file, f"{case}_seg_hidden", fitting(lambda a: a.states), CHAIN_TOLERANCE)
    projected = context.in_torch(lambda m: m.mask_projection(as_floats(answer().states)))
    report.check(file, f"{case}_seg_prompt_embed", projected, CHAIN_TOLERANCE)
    report.check(file, f"{case}_low_res", lambda: logits()[:, None], CHAIN_TOLERANCE)
    report.check(file, f"{case}_iou", fitting(lambda a: a.iou[:, None]), CHAIN_TOLERANCE)
    report.check(file, f"{case}_resize_hw", lambda: np.array(picture().valid), EXACT)
    report.check(file, f"{case}_orig_hw", lambda: np.array(picture().original.shape[:2]), EXACT)

    def sizes() -> tuple[tuple[int, int], tuple[int, int]]:
        return picture().valid, size_of(file[f"{case}_orig_hw"])

    whole = context.in_torch(lambda m: postprocess(as_floats(logits()), *sizes()))
    report.check(file, f"{case}_pred_masks", whole, CHAIN_TOLERANCE)

    def masks() -> Array:
        return context.backend.masks(logits(), *sizes())

    check_masks(report, file, f"{case}_pred_masks", masks)
    if f"{case}_rle_json" in file:
        _run_lengths(file, report, case, masks)
    file.skip(f"{case}_kvcache_hidden_maxdiff")


def _run_lengths(file: GoldenFile, report: Report, case: str, masks: Callable[[], Array]) -> None:
    """The file's own run lengths stand for the sign of its logits: our code has to read them as those masks."""

    def decoded() -> Array:
        rles = json.loads(str(file[f"{case}_rle_json"]))
        return np.array([decode_counts(rle["counts"], tuple(rle["size"])) for rle in rles])

    def signed() -> Array:
        return np.where(decoded(), 1.0, -1.0) if len(file[f"{case}_pred_masks"]) else np.empty(masks().shape)

    check_masks(report, file, f"{case}_pred_masks", lambda: signed() > 0, label=" (run lengths)")


def teacher_forced(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """Given conversations about the second picture, a row each."""

    @lru_cache(maxsize=1)
    def answers() -> list[Answer]:
        picture = context.picture_of(file["pred_masks"].shape[1:], 1)
        return [context.backend.teacher_forced([int(i) for i in row], picture) for row in file["input_ids"]]

    def logits() -> Floats:
        return np.concatenate([answer.logits for answer in answers()])

    def sizes() -> tuple[tuple[int, int], tuple[int, int]]:
        return size_of(file["resize"]), file["pred_masks"].shape[1:]

    whole = context.in_torch(lambda m: postprocess(as_floats(logits()), *sizes()))
    report.check(file, "pred_masks", whole, CHAIN_TOLERANCE)
    check_masks(report, file, "pred_masks", lambda: context.backend.masks(logits(), *sizes()))
    report.check(file, "resize", lambda: np.array(context.picture_of(sizes()[1], 1).valid), EXACT)


CASES: dict[str, Case] = {
    "llm_text.npz": llm_text,
    "splice_and_llm.npz": splice,
    "e2e_generate.npz": generation,
    "res_teacher_forced.npz": teacher_forced,
}
