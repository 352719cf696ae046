"""Asking a model that says locations where a given text points."""

from __future__ import annotations

import torch
from torch import Tensor

from deixis_train.data.samples import Box
from deixis_train.localisation.coding import END, PAD, Localiser
from deixis_train.models.t5 import T5


@torch.inference_mode()
def continue_text(text: T5, visual: Tensor, context: Tensor | None, ids: Tensor, steps: int) -> list[list[int]]:
    """What the model says after given texts, greedily, up to its first EOS or for `steps` tokens.

    Unlike captions, a location may say the same token twice in a row ("11", or x = y), so nothing is banned here.

    Args:
        visual: [R, Q, E] visual prefixes.
        context: [R, C] ids padded with 0, or None.
        ids: [R, L] BOS w1..wn, then EOS or PAD; whatever comes from the first of them on is not looked at.
        steps: most tokens to say.

    Returns:
        new ids of every row, without EOS.
    """
    encoded, valid = text.encode(visual, context)
    cross = text.cross_kv(encoded)
    rows = torch.arange(len(ids), device=ids.device)
    stops = (ids[:, 1:] == PAD) | (ids[:, 1:] == END)
    given = torch.where(stops.any(dim=1), stops.int().argmax(dim=1), stops.shape[1]) + 1  # BOS and words
    # EOS behind everything: a position is active only if the token after it is not padding.
    tokens = torch.full((len(ids), ids.shape[1] + steps + 1), END, dtype=torch.int64, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    tokens[:, : ids.shape[1]] = torch.where(places < given[:, None], ids, END)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(steps):
        _, features = text.decode(tokens, None, valid, cross=cross, with_logits=False)
        chosen = text.vocabulary_head(features[rows, given + step - 1]).argmax(dim=-1)
        chosen = torch.where(ended, END, chosen)
        tokens[rows, given + step] = chosen
        ended |= chosen == END
        if bool(ended.all()):
            break
    said = []
    for row, start in zip(tokens.tolist(), given.tolist(), strict=True):
        new = row[start : start + steps]
        said.append(new[: new.index(END)] if END in new else new)
    return said


def say_boxes(text: T5, visual: Tensor, context: Tensor | None, ids: Tensor, localiser: Localiser) -> list[Box | None]:
    """Boxes that the model says after given expressions, in fractions of the real picture; None where it says no box.

    A location must be followed by the end: what goes on is malformed. Arguments as in `continue_text`.
    """
    said = continue_text(text, visual, context, ids, localiser.length + 1)
    return [localiser.read(new) for new in said]
