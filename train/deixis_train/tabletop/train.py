"""Stage 3: captions with traces, region captions and referring expressions, on frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import pixelllm_prompt
from deixis_train.models.t5 import T5
from deixis_train.tabletop.cells import CellHeads, Names, cell_figures, cell_losses
from deixis_train.tabletop.losses import box_loss, iou
from deixis_train.tabletop.rows import Row, SceneData, decoder_arrays, pad_ids
from deixis_train.tabletop.run import Stage, adamw, cosine, set_learning_rate

REFERS, REGIONS = 3, 1  # rows of a scene in a batch, beside one caption
SMOOTHING = 0.1
TRAINED = ("prompt_adapter", "visual_projection", "text", "point_predictor")  # parts of the model


@dataclass
class Batch:
    """Rows of several scenes; `prompt` says which visual prefix a row reads (0..B-1 whole pictures, then regions)."""

    features: Tensor  # [B, g, g, C]
    whole: Tensor  # boxes of the whole pictures [B, 4], px
    region_points: Tensor  # [K, P, 2] px
    region_labels: Tensor  # [K, P]
    region_picture: Tensor  # [K]
    rows: list[Row]
    prompt: Tensor  # [R]
    row_owner: Tensor  # [R, g * g], the object that owns each cell of the row's picture, -1 for none
    occupied: Tensor  # [B, g, g] and
    cell_targets: Tensor  # [B, g, g, 6], see `CellTargets`


def draw_batch(data: SceneData, index: np.ndarray, rng: np.random.Generator, cell_px: int) -> Batch:
    rows: list[Row] = []
    prompt, cells, points, labels, pictures = [], [], [], [], []
    as_points = rng.random() < 0.3  # prompts of one call have the same number of tokens, so a batch asks one way
    for b, i in enumerate(index):
        scene, owner = data.scenes[i], data.owner[i]
        chosen = [(row, b) for row in _pick(scene.captions, 1, rng) + _pick(scene.refers, REFERS, rng)]
        for row in _pick(scene.regions, REGIONS, rng):
            chosen.append((row, len(index) + len(points)))
            place = _inside(scene.boxes[row.thing], owner == row.thing, cell_px, rng)
            box = _jitter(scene.boxes[row.thing], scene.width, scene.height, rng)
            points.append([place, (0.0, 0.0)] if as_points else [box[:2], box[2:]] + [(0.0, 0.0)] * 3)
            labels.append([1, -1] if as_points else [2, 3, -2, -2, -2])
            pictures.append(b)
        for row, which in chosen:
            rows.append(row)
            prompt.append(which)
            cells.append(owner)
    return Batch(
        data.features(index),
        data.whole(index),
        torch.tensor(points, dtype=torch.float32),
        torch.tensor(labels),
        torch.tensor(pictures),
        rows,
        torch.tensor(prompt),
        torch.from_numpy(np.stack(cells)).flatten(1).long(),
        *(torch.from_numpy(array) for array in data.cells[index]),
    )


def _pick(rows: list[Row], count: int, rng: np.random.Generator) -> list[Row]:
    if not rows:
        return []
    return [rows[i] for i in rng.permutation(len(rows))[:count]]


def _inside(box: tuple[float, ...], cells: np.ndarray, cell_px: int, rng: np.random.Generator) -> tuple[float, float]:
    """A place on the object: in one of its cells and its box, px."""
    found = np.argwhere(cells)
    if not len(found):
        return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    row, column = found[rng.integers(len(found))]
    x, y = (column + rng.random()) * cell_px, (row + rng.random()) * cell_px
    return float(np.clip(x, box[0], box[2])), float(np.clip(y, box[1], box[3]))


def _jitter(box: tuple[float, ...], width: int, height: int, rng: np.random.Generator) -> tuple[float, ...]:
    """The box as a person would draw it: each side moved by up to 6 % of its length."""
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    moved = np.array(box) + rng.uniform(-0.06, 0.06, 4) * sides
    return tuple(float(v) for v in np.clip(moved, 0, [width, height, width, height]))


@dataclass
class Outputs:
    prefix: Tensor  # visual prefixes of the whole pictures [B, Q, E]
    encoded: Tensor  # visual tokens behind the text encoder [R, Q, E]
    logits: Tensor  # [R, L, V]
    locations: Tensor  # [R, L, 4]
    attention: list[Tensor]  # of the decoder to the encoder, per layer [R, H, L, E]


@contextmanager
def tapped(text: T5) -> Iterator[list[Tensor]]:
    """Keep the cross-attention weights of the decoder's layers, which the model itself does not return."""
    kept: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        kept.append(F.softmax(query @ key.transpose(-1, -2) + bias, dim=-1))
        return kept[-1] @ value

    # `attend` is a method of the class: an attribute of the instance goes before it, and is taken away again.
    modules = [vars(layer.get_submodule("encoder_decoder_attention")) for layer in text.decoder.layers]
    for module in modules:
        module["attend"] = attend
    try:
        yield kept
    finally:
        for module in modules:
            del module["attend"]


def run_rows(model: PixelLLM, batch: Batch, ids: Tensor) -> Outputs:
    """Run the rows, teacher-forced on `ids` [R, L]."""
    prefix = whole_prefix(model, batch.features, batch.whole)
    if len(batch.region_points):
        region = model.extract_prompt(batch.features, batch.region_picture, batch.region_points, batch.region_labels)
        prefix = torch.cat([prefix, region])
    visual = prefix[batch.prompt]
    encoded, valid = model.text.encode(visual, pad_ids([row.context for row in batch.rows]))
    with tapped(model.text) as attention:
        logits, features = model.text.decode(ids, encoded, valid)
    assert logits is not None
    with torch.autocast("cpu", enabled=False):  # bfloat16 is too coarse for places
        locations = model.locate(features.float()).flatten(-2)
    return Outputs(prefix[: len(batch.whole)], encoded[:, : visual.shape[1]], logits.float(), locations, attention)


class Helpers(nn.Module):
    """What only helps to learn: read-outs that are thrown away, and the scale of the features.

    SAM's features are ten times smaller than the semantic ones, and an optimizer that moves all weights alike would
    learn from them ten times slower. So the extractor is trained on standardised features; `fold_scale` gives the scale
    to its weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, channels: int, names: Names) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.matcher = nn.Linear(width, 1)  # is this cell part of the object meant?
        self.cells = CellHeads(width, names)

    def measure(self, features: Tensor) -> None:
        """Take mean and spread of every channel from sample features [B, g, g, C]."""
        self.mean.copy_(features.mean(dim=(0, 1, 2)))
        self.std.copy_(features.std(dim=(0, 1, 2)).clamp(min=1e-4))

    def standardize(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std

    @torch.no_grad()
    def fold_scale(self, projection: nn.Linear) -> None:
        """Make `projection`, trained on standardised features, take the features as they are."""
        projection.weight.div_(self.std)
        projection.bias.sub_(projection.weight @ self.mean)


def warm_up_extractor(
    model: PixelLLM, data: SceneData, out: Path, names: Names, *, steps: int = 2400, batch: int = 32, rate: float = 3e-3
) -> dict[str, Tensor]:
    """Teach the extractor alone the dense objective on its image tokens: the text model then starts on tokens that tell
    something. Resumes from `out`; returns the state of the helpers.
    """
    helpers = make_helpers(model, names)
    trained = nn.ModuleDict({name: getattr(model, name) for name in ("prompt_adapter", "visual_projection")})
    optimizer = adamw([trained, helpers.cells], weight_decay=0.01)
    stage = Stage(out, "extractor", {"model": trained, "helpers": helpers}, optimizer)
    first = stage.resume()
    if first == 0:
        helpers.measure(data.features(np.arange(0, len(data), max(1, len(data) // 256))))
    for step in range(first, steps):
        rng = np.random.default_rng((5, step))
        index = rng.choice(len(data), batch, replace=False)
        occupied, targets = (torch.from_numpy(array) for array in data.cells[index])
        set_learning_rate(optimizer, cosine(step, steps, rate, warmup=50))
        with torch.autocast("cpu", torch.bfloat16):
            prefix = whole_prefix(model, helpers.standardize(data.features(index)), data.whole(index))
            seen = helpers.cells(prefix.unflatten(1, occupied.shape[1:]))
        parts = cell_losses(seen, occupied, targets)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_([*trained.parameters(), *helpers.cells.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            figures = cell_figures(seen, occupied, targets)
            stage.report(step + 1, steps, {name: loss.item() for name, loss in parts.items()} | figures)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            stage.save(step + 1)
    return helpers.state_dict()


def make_helpers(model: PixelLLM, names: Names) -> Helpers:
    config = model.config
    return Helpers(config.t5.emb, config.semantic.embed_dim + config.sam.out_chans, names)


def whole_prefix(model: PixelLLM, features: Tensor, whole: Tensor) -> Tensor:
    """Visual prefixes [B, Q, E] of the prompts that mean whole pictures [B, 4]."""
    return model.extract_prompt(features, torch.arange(len(whole)), *pixelllm_prompt(whole, 1.0))


def looking_loss(attention: list[Tensor], batch: Batch, weight: Tensor) -> Tensor:
    """-log of the attention that the later decoder layers pay to the cells of the thing a token points at.

    weight [R, L]. Without it, telling which cells a phrase means hardly starts: at first every position looks
    everywhere.
    """
    things = torch.full(weight.shape, -1)
    for r, row in enumerate(batch.rows):
        things[r, 1 : len(row.things) + 1] = torch.tensor(row.things)
    wanted = (batch.row_owner[:, None, :] == things[..., None]) & (things[..., None] >= 0)
    weight = weight * wanted.any(-1)
    total = weight.new_zeros(())
    later = attention[1:] or attention
    for weights in later:
        seen = (weights.float().mean(1)[..., : wanted.shape[-1]] * wanted).sum(-1)
        total = total - (torch.log(seen + 1e-6) * weight).sum() / weight.sum().clamp(min=1)
    return total / len(later)


def losses(model: PixelLLM, helpers: Helpers, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    ids, boxes, has_box = decoder_arrays(batch.rows)
    out = run_rows(model, replace(batch, features=helpers.standardize(batch.features)), ids)
    refer = torch.tensor([row.task == "refer" for row in batch.rows])
    # The box of an expression is read where the end is predicted (section 8); the words before only help to learn.
    last = F.pad(ids[:, 1:] == 1, (0, 1))
    refer_weight = has_box * refer[:, None] * torch.where(last, 1.0, 0.2)
    labels = F.pad(ids[:, 1:], (0, 1)).masked_fill(refer[:, None], 0)
    text = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=0, label_smoothing=SMOOTHING)
    things = torch.tensor([row.thing for row in batch.rows])
    meant = (batch.row_owner == things[:, None]) & (things[:, None] >= 0)
    match = F.binary_cross_entropy_with_logits(
        helpers.matcher(out.encoded[refer])[..., 0].float(), meant[refer].float(), pos_weight=torch.tensor(5.0)
    )
    seen = helpers.cells(out.prefix.unflatten(1, batch.occupied.shape[1:]))
    cell = cell_losses(seen, batch.occupied, batch.cell_targets)
    parts = {
        "text": text,
        "trace": box_loss(out.locations, boxes, has_box * ~refer[:, None]),
        "refer": 2 * box_loss(out.locations, boxes, refer_weight),
        "match": 2 * match,
        "look": looking_loss(out.attention, batch, torch.where(refer[:, None], refer_weight, has_box)),
        "cells": torch.stack(list(cell.values())).sum(),
    }
    with torch.no_grad():
        at_end = (refer_weight == 1.0) & last
        ratio, _ = iou(out.locations[at_end], boxes[at_end])
        figures = {"P@0.5": (ratio > 0.5).float().mean().item(), "IoU": ratio.mean().item()}
    return parts, figures | cell_figures(seen, batch.occupied, batch.cell_targets)


@torch.inference_mode()
def held_out(model: PixelLLM, helpers: Helpers, data: SceneData, limit: int) -> dict[str, float]:
    """P@0.5 and mean IoU over every expression of the first `limit` scenes, in torch."""
    ratios = []
    for i in range(min(limit, len(data))):
        scene = data.scenes[i]
        if not scene.refers:
            continue
        index = np.array([i])
        empty = torch.zeros(0, 5, 2), torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        prompt, cells = torch.zeros(len(scene.refers), dtype=torch.long), torch.zeros(0)
        features = helpers.standardize(data.features(index))
        batch = Batch(features, data.whole(index), *empty, scene.refers, prompt, cells, cells, cells)
        ids, boxes, _ = decoder_arrays(scene.refers)
        locations = run_rows(model, batch, ids).locations
        last = F.pad(ids[:, 1:] == 1, (0, 1))
        ratios.append(iou(locations[last], boxes[last])[0])
    every = torch.cat(ratios)
    return {"val_P@0.5": (every > 0.5).float().mean().item(), "val_IoU": every.mean().item()}


def train(
    model: PixelLLM,
    tokenizer: Tokenizer,
    data: tuple[Path, Path],
    held: tuple[Path, Path],
    out: Path,
    names: Names,
    *,
    steps: int,
    batch: int = 10,
    rate: float = 1e-3,
) -> None:
    """Train extractor, text model and location head; `data` and `held` are (scenes, cache). Resumes from `out`."""
    scenes, held_scenes = SceneData(*data, tokenizer, names), SceneData(*held, tokenizer, names)
    model.eval()  # no dropout: it costs a third of a step, and the run is too short to over-fit
    helpers = make_helpers(model, names)
    helpers.load_state_dict(warm_up_extractor(model, scenes, out, names))
    trained = nn.ModuleDict({name: getattr(model, name) for name in TRAINED})
    # The extractor has learned already; the text model's first, blind gradients would spoil it at full pace.
    extractor = [model.prompt_adapter, model.visual_projection]
    rest = [getattr(model, name) for name in TRAINED if getattr(model, name) not in extractor]
    optimizer = adamw([*rest, helpers], weight_decay=0.01, slow=extractor)
    stage = Stage(out, "train", {"model": trained, "helpers": helpers}, optimizer)
    first = stage.resume()
    if first >= steps:
        return
    cell_px = model.config.image_size // model.grid
    for step in range(first, steps):
        rng = np.random.default_rng((11, step))
        drawn = draw_batch(scenes, rng.choice(len(scenes), batch, replace=False), rng, cell_px)
        set_learning_rate(optimizer, cosine(step, steps, rate, warmup=100))
        with torch.autocast("cpu", torch.bfloat16):
            parts, figures = losses(model, helpers, drawn)
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_([*trained.parameters(), *helpers.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            stage.report(step + 1, steps, {name: loss.item() for name, loss in parts.items()} | figures)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            stage.report(step + 1, steps, held_out(model, helpers, held_scenes, 40))
            stage.save(step + 1)
