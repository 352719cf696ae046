"""P@0.5 of a trained model on held-out expressions, whichever way it says locations (section 15)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deixis_train.checkpoint import load_checkpoint
from deixis_train.evaluation.boxes import pair_iou, precision_at_half
from deixis_train.localisation.coding import Localiser
from deixis_train.localisation.generation import say_boxes
from deixis_train.localisation.vocabulary import localiser_of
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.point_head import points_to_box, to_pixels, valid_tokens
from deixis_train.training.auxiliary import Helpers
from deixis_train.training.corpus import Corpus, feeds_of
from deixis_train.training.initial import find_file
from deixis_train.training.micro import Micro
from deixis_train.training.objectives import LAST_WORD, Objective
from deixis_train.training.recipe import Auxiliary, Recipe, RecipeError, SourceSpec, StageSpec
from deixis_train.training.vocabulary import CachedTokenizer

PICTURES = 16  # that run together
ALL_ROWS = 1_000_000


def held_out_expressions(recipe: Recipe) -> tuple[StageSpec, SourceSpec]:
    """The last stage without what only helps to learn, and its first held-out source of expressions, with all rows.

    Raises RecipeError when there is none.
    """
    stage = recipe.stages[-1]
    for spec in stage.held_out:
        if "point" in spec.losses and "text" not in spec.losses:
            bare = replace(stage, auxiliary=Auxiliary(), precision="fp32")
            return bare, replace(spec, rows=ALL_ROWS, instances="", point_prompts=0.0)
    raise RecipeError(f'stages ({stage.name}).held_out: no source of expressions (losses = ["point"]) to measure on')


@torch.inference_mode()
def measure(checkpoint: Path, recipe: Recipe, data: Path, features: Path, device: torch.device) -> dict[str, Any]:
    """Ask a checkpoint for the box of every held-out expression; the words are given, the location is greedy.

    An answer that is no box counts as wrong.

    Returns:
        P@0.5, mean IoU, the number of expressions, the number of answers that were no box, and seconds.

    Raises:
        RecipeError, CheckpointError, DataError, LocalisationError: one line.
    """
    sam = recipe.init.mobile_sam or recipe.init.sam
    loaded = load_checkpoint(checkpoint, find_file(sam, data, checkpoint.parent) if sam else None)
    model = loaded.pixelllm.to(device)
    localiser = localiser_of(recipe.localisation, model, loaded.tokenizer_json)
    stage, spec = held_out_expressions(recipe)
    corpus = Corpus(data, features, lambda line: None)
    names = corpus.names(recipe)
    tokenizer = CachedTokenizer(Tokenizer.from_str(loaded.tokenizer_json))
    [feed] = feeds_of(corpus, model, stage, [spec], tokenizer, names, recipe.seed, writer=True)
    objective = Objective(model, Helpers(model, names).to(device), stage)
    started, malformed = time.monotonic(), 0
    ious: list[float] = []
    for start in range(0, len(feed.samples), PICTURES):
        micro = feed.make(start, min(PICTURES, len(feed.samples) - start)).to(device)
        assert micro.batch is not None
        boxes, good = predict(model, objective, micro, localiser)
        asked = (micro.batch.boxes.amax(-1) > 0).cpu()
        malformed += int((asked & ~good).sum())
        found = pair_iou(boxes[asked].numpy(), micro.batch.boxes.cpu()[asked].numpy())
        ious += np.where(good[asked].numpy(), found, 0.0).tolist()
    if not ious:
        raise RecipeError(f"source {spec.name}: no expression with a box to measure on")
    return {
        "P@0.5": precision_at_half(ious),
        "mean IoU": float(np.mean(ious)),
        "expressions": len(ious),
        "no box": malformed,
        "seconds": round(time.monotonic() - started, 1),
    }


def predict(model: PixelLLM, objective: Objective, micro: Micro, localiser: Localiser | None) -> tuple[Tensor, Tensor]:
    """Boxes [R, 4], px of the network input clipped to the picture, and whether each row gave one [R]; on the CPU.

    Rows that gave none have zeros.
    """
    batch = micro.batch
    assert batch is not None
    features, _ = objective.features(micro)
    visual, _ = objective.prefixes(features, micro)
    context = batch.context if batch.context.shape[1] else None
    valid_hw = batch.valid_hw[batch.picture]
    edge = valid_hw.flip(-1).repeat(1, 2)
    if localiser is not None:
        said = say_boxes(model.t5, visual, context, batch.text, localiser)
        boxes = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in said]) * edge.cpu()
        return boxes, torch.tensor([box is not None for box in said])
    _, states = model.text.decode(batch.text, *model.text.encode(visual, context), with_logits=False)
    last = valid_tokens(batch.text, LAST_WORD, model.config.begin_token_id, model.config.end_token_id)
    boxes = points_to_box(to_pixels(model.locate(states), valid_hw), last).clamp(min=0).minimum(edge)
    good = last.any(dim=1)
    return torch.where(good[:, None], boxes, 0.0).cpu(), good.cpu()
