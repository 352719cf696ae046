"""What a stage minimises: losses of one micro-batch, by name, and figures to watch.

"text" is the model's own objective (section 12). "grid" and "prompt_grid" are the dense objective of `cells`, on the
semantic encoder's map and on the extractor's image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from deixis_train.data.batches import Batch
from deixis_train.losses.boxes import box_loss, paired_iou
from deixis_train.losses.mask import mask_loss
from deixis_train.losses.point import point_loss
from deixis_train.losses.text import text_loss
from deixis_train.models.box_decoder.training import caption_rows, pad_boxes, proposal_losses
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.point_head import points_to_box, to_pixels, valid_tokens
from deixis_train.models.preprocess import padding_mask
from deixis_train.models.prompt_encoder import pixelllm_prompt
from deixis_train.training.auxiliary import Helpers, look_loss, match_loss, tapped
from deixis_train.training.cells import cell_figures, cell_losses
from deixis_train.training.features import semantic_of_small
from deixis_train.training.flash import fused_encoder
from deixis_train.training.micro import Micro
from deixis_train.training.recipe import Part, StageSpec

# Which positions bear locations (section 8): every word of a trace; in referring, the one that predicts the end.
EVERY_WORD, LAST_WORD = "begin,end,pad", "^end-1"

Terms = dict[str, Tensor]


@dataclass
class Outcome:
    """terms: losses with their weights in them, so that their sum is descended. figures: scalars without gradient."""

    terms: Terms
    figures: Terms


class Objective:
    """The losses of a stage on its model. Call it with micro-batches that lie on the model's device."""

    def __init__(self, model: PixelLLM, helpers: Helpers, stage: StageSpec) -> None:
        self.model, self.helpers, self.stage = model, helpers, stage

    def __call__(self, micro: Micro) -> Outcome:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.stage.precision == "bf16"):
            if self.stage.objective == "grid":
                outcome = self._grid(micro)
            elif self.stage.objective == "prompt_grid":
                outcome = self._prompt_grid(micro)
            else:
                outcome = self._text(micro)
        outcome.terms = {name: micro.weight * term for name, term in outcome.terms.items()}
        return outcome

    def features(self, micro: Micro) -> tuple[Tensor, Tensor | None]:
        """Fused features [B, g, g, C] and, where it was computed, SAM's own map [B, h, h, C2]."""
        model, sam_map = self.model, None
        sam, semantic = micro.sam, micro.semantic
        if semantic is None and micro.small is not None:
            with self._gradient("semantic_encoder"):
                semantic = semantic_of_small(model, micro.small)
        if sam is None or semantic is None:
            assert micro.batch is not None and micro.batch.images is not None
            images, valid_hw = micro.batch.images.float(), micro.batch.valid_hw
            if sam is None:
                with self._gradient("sam_encoder"):
                    sam, sam_map = model.encode_sam(images, valid_hw)
            if semantic is None:
                with self._gradient("semantic_encoder"):
                    semantic = model.encode_semantic(images, valid_hw)
        fused = torch.cat([semantic.float(), sam.float()], dim=-1)
        return (self.helpers.standardize(fused) if self.stage.auxiliary.standardize else fused), sam_map

    def _gradient(self, part: Part) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and part in self.stage.train)

    def _grid(self, micro: Micro) -> Outcome:
        assert micro.small is not None and micro.occupied is not None and micro.targets is not None
        seen = self.helpers.grid(semantic_of_small(self.model, micro.small))
        terms = cell_losses(seen, micro.occupied, micro.targets)
        return Outcome(terms, cell_figures(seen, micro.occupied, micro.targets))

    def _prompt_grid(self, micro: Micro) -> Outcome:
        assert micro.occupied is not None and micro.targets is not None
        prefix = self._whole_prefix(self.features(micro)[0], micro)
        seen = self.helpers.cells(prefix.unflatten(1, micro.occupied.shape[1:]))
        terms = cell_losses(seen, micro.occupied, micro.targets)
        return Outcome(terms, cell_figures(seen, micro.occupied, micro.targets))

    def _whole_prefix(self, features: Tensor, micro: Micro) -> Tensor:
        """Visual prefixes [B, Q, E] of the prompts that mean whole pictures."""
        assert micro.whole is not None
        index = torch.arange(len(micro.whole), device=features.device)
        use_box = self.model.config.prompt_use_box_rate
        return self.model.extract_prompt(features, index, *pixelllm_prompt(micro.whole, use_box))

    def prefixes(self, features: Tensor, micro: Micro) -> tuple[Tensor, Tensor | None]:
        """Visual prefixes of all rows [R, Q, E], and those of whole pictures [B, Q, E] if any row means one.

        Rows that mean whole pictures share the extractor's pass.
        """
        batch = micro.batch
        assert batch is not None
        if micro.points is None or micro.labels is None:
            whole = self._whole_prefix(features, micro)
            return whole[batch.picture], whole
        asked = self.model.extract_prompt(features, batch.picture[~batch.whole], micro.points, micro.labels)
        if len(asked) == len(batch.picture):
            return asked, None
        whole = self._whole_prefix(features, micro)
        place = batch.picture.clone()
        place[~batch.whole] = len(whole) + torch.arange(len(asked), device=place.device)
        return torch.cat([whole, asked])[place], whole

    def _text(self, micro: Micro) -> Outcome:
        batch, losses, auxiliary = micro.batch, self.stage.losses, self.stage.auxiliary
        assert batch is not None
        features, sam_map = self.features(micro)
        terms: Terms = {}
        figures: Terms = {}
        if "proposal" in batch.losses:
            detection, micro = self._detect(features, micro)
            terms |= {name: losses.proposal * term for name, term in detection.items()}
            batch = micro.batch
            if batch is None or batch.losses == {"proposal"}:
                return Outcome(terms, figures)
        visual, whole = self.prefixes(features, micro)
        model, ids = self.model, batch.text
        writes = "text" in batch.losses or micro.said is not None
        with ExitStack() as stack:
            stack.enter_context(self._encoder_attention())
            context = batch.context if batch.context.shape[1] else None
            encoded, valid = model.text.encode(visual, context)
            attention = stack.enter_context(tapped(model.t5)) if micro.look is not None else []
            logits, states = model.text.decode(ids, encoded, valid, with_logits=writes)
        if logits is not None:
            # Where the words are given, only what is said of locations is learned.
            labels = ids if "text" in batch.losses or micro.said is None else ids * micro.said
            terms["text"] = losses.text * text_loss(
                logits, labels, smoothing=losses.smoothing, end_id=model.config.end_token_id
            )
            figures |= _text_figures(logits, labels)
        refer = _referring(batch)
        weight = self._positions(batch, refer, micro.said)
        located = "mask" in batch.losses or ("point" in batch.losses and micro.said is None)
        if located and model.point_predictor is not None:
            with torch.autocast(ids.device.type, enabled=False):  # bfloat16 is too coarse for places
                locations = model.locate(states.float())
            if "point" in batch.losses:
                terms["point"] = losses.point * self._point(locations, batch, weight)
            figures |= self._referring_figures(locations, batch, refer)
            if "mask" in batch.losses:
                terms["mask"] = losses.mask * self._mask(locations, batch, visual, states, sam_map)
        if auxiliary.look and micro.look is not None and "point" in batch.losses:
            terms["look"] = auxiliary.look * look_loss(attention, micro.look, weight)
        if auxiliary.match and micro.meant is not None:
            about = batch.boxes.amax(-1) > 0
            logit = self.helpers.matcher(encoded[about][:, : micro.meant.shape[1]])[..., 0]
            terms["match"] = auxiliary.match * match_loss(logit, micro.meant[about])
        if auxiliary.cells and whole is not None and micro.occupied is not None and micro.targets is not None:
            seen = self.helpers.cells(whole.unflatten(1, micro.occupied.shape[1:]))
            cells = cell_losses(seen, micro.occupied, micro.targets)
            terms["cells"] = auxiliary.cells * torch.stack(list(cells.values())).sum()
        return Outcome(terms, figures)

    @contextmanager
    def _encoder_attention(self) -> Iterator[None]:
        if not self.stage.fused_attention:
            yield
            return
        with fused_encoder(self.model.t5):
            yield

    def _detect(self, features: Tensor, micro: Micro) -> tuple[Terms, Micro]:
        """Losses of the box decoder, and the micro-batch with its proposals in place of the rows' own prompts.

        Its batch is None if no proposal met an object.
        """
        batch, decoder = micro.batch, self.model.box_decoder
        assert batch is not None
        if decoder is None:
            raise ValueError(f"source {batch.source!r} bears the loss proposal, but the model has no box decoder")
        truth = pad_boxes([batch.boxes[batch.picture == b] for b in range(len(batch.valid_hw))])
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 is too coarse for places
            terms, proposals = proposal_losses(decoder, features.float(), truth)
        rows = caption_rows(proposals, batch.picture)
        if not len(rows.row):
            return terms, replace(micro, batch=None)
        points, labels = pixelllm_prompt(rows.boxes, self.model.config.prompt_use_box_rate)
        at = {name: getattr(batch, name)[rows.row] for name in ("picture", "text", "context", "boxes", "points")}
        proposed = replace(batch, **at, prompts=rows.boxes, whole=torch.zeros_like(rows.row, dtype=torch.bool))
        return terms, replace(micro, batch=proposed, points=points, labels=labels)

    def _positions(self, batch: Batch, refer: Tensor, said: Tensor | None) -> Tensor:
        """How much each position's location counts [R, L] float; `refer` [R] says which rows are expressions.

        An expression's box is read from its last word; said in tokens, where the next token is one of those.
        """
        config, ids = self.model.config, batch.text
        words = valid_tokens(ids, EVERY_WORD, config.begin_token_id, config.end_token_id).float()
        last = valid_tokens(ids, LAST_WORD, config.begin_token_id, config.end_token_id)
        if said is not None:
            last = F.pad(said[:, 1:], (0, 1))
        referring = torch.where(last, 1.0, self.stage.losses.before_end * words)
        return torch.where(refer[:, None], referring, words)

    def _point(self, locations: Tensor, batch: Batch, weight: Tensor) -> Tensor:
        valid_hw = batch.valid_hw[batch.picture]
        if self.stage.losses.point_kind == "box":
            exists = (batch.points.abs().amax(-1) > 0).float()
            return box_loss(locations.flatten(-2), _fractions(batch.points, valid_hw), weight * exists)
        target = batch.points.unflatten(-1, (2, 2))
        everywhere = torch.ones_like(weight)
        return point_loss(to_pixels(locations, valid_hw), target, weight == 1, everywhere, kind="l1_nonzero")

    def _mask(self, locations: Tensor, batch: Batch, visual: Tensor, states: Tensor, sam_map: Tensor | None) -> Tensor:
        model, config = self.model, self.model.config
        if batch.masks is None or sam_map is None:
            raise ValueError(f"source {batch.source!r} bears the loss mask, but has no masks or cached SAM features")
        valid_hw = batch.valid_hw[batch.picture]
        last = valid_tokens(batch.text, LAST_WORD, config.begin_token_id, config.end_token_id)
        boxes = points_to_box(to_pixels(locations, valid_hw), last)
        logits, quality = model.mask(sam_map, batch.picture, boxes, visual, states)
        return mask_total(logits, quality, batch.masks, valid_hw)

    @torch.no_grad()
    def _referring_figures(self, locations: Tensor, batch: Batch, refer: Tensor) -> Terms:
        """Share of expressions with IoU > 0.5, and mean IoU, at the position where the box is read."""
        config = self.model.config
        last = valid_tokens(batch.text, LAST_WORD, config.begin_token_id, config.end_token_id) & refer[:, None]
        if not last.any():
            return {}
        valid_hw = batch.valid_hw[batch.picture]
        target = _fractions(batch.boxes[:, None].expand(-1, batch.text.shape[1], -1), valid_hw)
        ratio, _ = paired_iou(locations.flatten(-2)[last], target[last])
        return {"P@0.5": (ratio > 0.5).float().mean(), "IoU": ratio.mean()}


def mask_total(logits: Tensor, quality: Tensor, masks: Tensor, valid_hw: Tensor) -> Tensor:
    """The mask loss of logits [R, h, w] and predicted IoU [R] against masks [R, S, S] (section 12)."""
    real = padding_mask(valid_hw, masks.shape[-1])[..., 0]
    valid = masks.flatten(1).any(1)
    return mask_loss(logits[:, None], quality[:, None], masks, valid, real).total


def _fractions(boxes: Tensor, valid_hw: Tensor) -> Tensor:
    """XYXY px [R, L, 4] -> fractions of the real picture."""
    return boxes / valid_hw.flip(-1).repeat(1, 2)[:, None]


@torch.no_grad()
def _text_figures(logits: Tensor, ids: Tensor) -> Terms:
    labels = F.pad(ids[:, 1:], (0, 1))
    right = (logits.argmax(-1) == labels)[labels > 0]
    return {"token_right": right.float().mean()}


def _referring(batch: Batch) -> Tensor:
    """Which rows [R] look for a thing in the whole picture: referring expressions."""
    return batch.whole & (batch.boxes.amax(-1) > 0)
