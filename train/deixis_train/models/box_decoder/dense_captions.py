"""From boxes to captions (section 10): every detection prompts for a caption, and captions may have a say in scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from deixis_train.models.decoding import beam_search, begin_tokens, greedy
from deixis_train.models.prompt_encoder import pixelllm_prompt

if TYPE_CHECKING:
    from deixis_train.models.pixelllm import PixelLLM


class DenseCaptions(NamedTuple):
    """Described boxes of every picture.

    boxes: [B, N, 4] XYXY px of the padded input. scores: [B, N]. num_detections: boxes that are some [B] int64.
    tokens: ids [B, N, L]; behind the first EOS more of them. log_probs: of the captions [B, N].
    """

    boxes: Tensor
    scores: Tensor
    num_detections: Tensor
    tokens: Tensor
    log_probs: Tensor


class RankedBeams(NamedTuple):
    """Pairs of box and beam, best first: score, index of the box and index of the beam, each [B, M]."""

    scores: Tensor
    box: Tensor
    beam: Tensor


def score_with_caption(scores: Tensor, log_probs: Tensor) -> Tensor:
    """Scores of detections joined with those of their greedy captions; the order stays.

    Args:
        scores: of the boxes; what is below 0 counts as 0.
        log_probs: mean log-probability of each caption's tokens, same shape.
    """
    return (scores.clamp(min=0) * log_probs.exp()).sqrt()


def rank_beams(scores: Tensor, beam_scores: Tensor, count: int) -> RankedBeams:
    """The best pairs of box and beam; a box may come several times, or not at all.

    Args:
        scores: of the boxes [B, N]; what is below 0 counts as 0.
        beam_scores: of the beams of each box [B, N, K].
        count: pairs to keep per picture.
    """
    joint = score_with_caption(scores[..., None], beam_scores).flatten(1)
    ordered, index = torch.sort(joint, dim=1, descending=True, stable=True)
    ordered, index = ordered[:, :count], index[:, :count]
    beams = beam_scores.shape[2]
    return RankedBeams(ordered, index // beams, index % beams)


@torch.inference_mode()
def dense_captions(
    model: PixelLLM,
    features: Tensor,
    context: Tensor | None,
    length: int,
    *,
    beams: int = 1,
    per_node: int = 1,
    alpha: float = 0.6,
    join_scores: bool = False,
) -> DenseCaptions:
    """Find and describe the objects of pictures, all boxes of all pictures in one batch.

    Empty slots of the detector are described as well (as a point prompt, section 5), as in the reference;
    `num_detections` says what is real. With beams and `join_scores`, pairs of box and beam are ranked anew.

    Args:
        model: with a box decoder, in evaluation mode.
        features: fused features [B, g, g, C].
        context: ids of the instruction [C], the same for every box; None for none.
        length: of the arrays that captions are decoded in.
        beams: 1 is greedy.
        per_node: candidates per beam, see `beam_search`.
        alpha: exponent of the length penalty of beam search.
        join_scores: let captions' probabilities join the scores.

    Raises:
        ValueError: if the model has no box decoder.
    """
    config, text = model.config, model.text
    found = model.detect(features)
    pictures, count = found.scores.shape
    rows = pictures * count
    image_index = torch.arange(pictures, device=features.device).repeat_interleave(count)
    points, labels = pixelllm_prompt(found.boxes.flatten(0, 1), config.prompt_use_box_rate)
    visual = model.extract_prompt(features, image_index, points, labels)
    encoded, valid = text.encode(visual, None if context is None else context.expand(rows, -1))
    cross = text.cross_kv(encoded)

    def logits_fn(tokens: Tensor, position: int) -> Tensor:
        _, states = text.decode(tokens, None, valid, cross=cross, with_logits=False)
        return text.vocabulary_head(states[:, position])

    begin = begin_tokens(rows, length, config.begin_token_id, config.end_token_id).to(features.device)
    if beams == 1:
        tokens, log_probs = greedy(logits_fn, begin, config.end_token_id)
        tokens, log_probs = tokens[:, None], log_probs[:, None]
    else:
        tokens, log_probs = beam_search(logits_fn, begin, beams, per_node, alpha, config.end_token_id)
    tokens, log_probs = tokens.unflatten(0, (pictures, count)), log_probs.unflatten(0, (pictures, count))

    if not join_scores:
        return DenseCaptions(*found, tokens[:, :, -1], log_probs[:, :, -1])
    if beams == 1:
        scores = score_with_caption(found.scores, log_probs[:, :, 0])
        return DenseCaptions(found.boxes, scores, found.num_detections, tokens[:, :, 0], log_probs[:, :, 0])
    ranked = rank_beams(found.scores, log_probs, count)
    batch = torch.arange(pictures, device=features.device)[:, None]
    return DenseCaptions(
        found.boxes[batch, ranked.box],
        ranked.scores,
        (ranked.scores > 0).sum(dim=1),
        tokens[batch, ranked.box, ranked.beam],
        log_probs[batch, ranked.box, ranked.beam],
    )
