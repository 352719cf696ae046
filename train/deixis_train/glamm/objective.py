"""What a stage of GLaMM's training minimises: its own losses, or the dense objective on CLIP's grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deixis_train.glamm.batches import Pointed
from deixis_train.glamm.features import normalized
from deixis_train.glamm.forward import GlammOutcome, training_outcome
from deixis_train.glamm.mixture import GlammMicro
from deixis_train.glamm.pointing import place_loss, pointing_states, told_boxes
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.training import objectives
from deixis_train.training.cells import CellHeads, Names, cell_figures, cell_losses
from deixis_train.training.micro import Micro
from deixis_train.training.recipe import StageSpec


class GlammHelpers(nn.Module):
    """Read-outs, thrown away afterwards: of the dense objective on CLIP's map, None without names of things, and of
    the boxes that states tell."""

    def __init__(self, model: Glamm, names: Names) -> None:
        super().__init__()
        self.grid = CellHeads(model.config.clip.embed_dim, names) if names.kinds else None
        self.box = nn.Linear(model.config.llama.emb, 4)


class GlammObjective:
    """See `training.family.StageObjective`."""

    def __init__(self, model: Glamm, helpers: GlammHelpers, stage: StageSpec) -> None:
        self.model, self.helpers, self.stage = model, helpers, stage

    def __call__(self, micro: GlammMicro | Micro) -> objectives.Outcome:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            outcome = self._grid(micro) if isinstance(micro, Micro) else self._own(micro)
        outcome.terms = {name: micro.weight * term for name, term in outcome.terms.items()}
        return outcome

    def _grid(self, micro: Micro) -> objectives.Outcome:
        assert micro.small is not None and micro.occupied is not None and micro.targets is not None
        assert self.helpers.grid is not None
        state = self.model.clip(normalized(self.model, micro.small))[-1][:, 1:]
        seen = self.helpers.grid(state.unflatten(1, micro.occupied.shape[1:]))
        terms = cell_losses(seen, micro.occupied, micro.targets)
        return objectives.Outcome(terms, cell_figures(seen, micro.occupied, micro.targets))

    def _own(self, micro: GlammMicro) -> objectives.Outcome:
        weights = self.stage.losses
        with _recomputing(self.model, self.stage.recompute):
            outcome = training_outcome(self.model, micro.batch)
        terms = {"text": weights.text * outcome.ce}
        if outcome.bce is not None and outcome.dice is not None:
            terms |= {"bce": weights.bce * outcome.bce, "dice": weights.dice * outcome.dice}
        if outcome.look is not None:
            terms["look"] = self.stage.auxiliary.look * outcome.look
        figures = _figures(outcome, micro.batch.masks)
        if micro.batch.pointed is not None and outcome.states is not None:
            self._point(micro.batch.pointed, outcome.states, terms, figures)
        return objectives.Outcome(terms, figures)

    def _point(self, pointed: Pointed, states: Tensor, terms: dict[str, Tensor], figures: dict[str, Tensor]) -> None:
        auxiliary, chosen = self.stage.auxiliary, pointing_states(states, pointed)
        if auxiliary.box:
            loss, figures["box_IoU"] = told_boxes(self.helpers.box(chosen), pointed)
            terms["box"] = auxiliary.box * loss
        if auxiliary.place:
            terms["place"] = auxiliary.place * place_loss(self.model, chosen, pointed)


@contextmanager
def _recomputing(model: Glamm, active: bool) -> Iterator[None]:
    """The language model's blocks keep nothing for the backward pass but their inputs."""
    if not (active and torch.is_grad_enabled()):
        yield
        return
    # `forward` is a method of the class: an attribute of the instance goes before it, and is taken away again.
    blocks = [vars(layer) for layer in model.llama.layers]
    for block, layer in zip(blocks, model.llama.layers, strict=True):
        block["forward"] = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block["forward"]


@torch.no_grad()
def _figures(outcome: GlammOutcome, masks: list[Tensor] | None) -> dict[str, Tensor]:
    """Share of next tokens that are right, and the mean IoU of masks."""
    figures: dict[str, Tensor] = {}
    if outcome.logits is not None and outcome.wanted is not None and len(outcome.wanted):
        figures["token_right"] = (outcome.logits.argmax(-1) == outcome.wanted).float().mean()
    ratios = []
    for predicted, wanted in zip(outcome.masks, masks or [], strict=False):
        ours, theirs = predicted > 0, wanted[: len(predicted)] > 0
        union = (ours | theirs).flatten(1).sum(1)
        ratios.append((ours & theirs).flatten(1).sum(1) / union.clamp(min=1))
    if ratios and len(together := torch.cat(ratios)):
        figures["IoU"] = together.mean()
    return figures
