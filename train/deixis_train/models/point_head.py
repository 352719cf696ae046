"""Where each word is: the per-token location head and what is read from its points (section 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.config import PointPredictorConfig
from deixis_train.models.layers import MLP

PAD_ID = 0
VALID_RULES = ("begin", "end", "pad", "end-1", "text")


class PointPredictor(nn.Module):
    """Two points per text position. Each point has two coordinates and two spare channels that nothing trains."""

    def __init__(self, config: PointPredictorConfig, text_dim: int) -> None:
        super().__init__()
        self.points = config.num_output_points
        self.norm = nn.LayerNorm(text_dim, eps=1e-6)
        self.mlp = MLP(text_dim, config.hidden_dim, self.points * 4, config.depth, F.gelu)

    def _raw(self, features: Tensor) -> Tensor:
        return self.mlp(self.norm(features)).unflatten(-1, (self.points, 4))

    def forward(self, features: Tensor) -> Tensor:
        """Text features [..., L, E] -> points (x, y) [..., L, points, 2] as fractions of the real width and height.

        Not clamped: a point may lie outside 0..1.
        """
        return (self._raw(features)[..., :2] + 1) / 2

    def spare(self, features: Tensor) -> Tensor:
        """The two spare channels of every point [..., L, points, 2]. The model does not use them; parity checks do."""
        return self._raw(features)[..., 2:]


def to_pixels(points: Tensor, valid_hw: Tensor) -> Tensor:
    """Fractions [R, L, points, 2] -> pixels of the network input, given its real (height, width) [R, 2]."""
    return points * valid_hw.flip(-1)[:, None, None, :]


def valid_tokens(tokens: Tensor, rule: str, begin: int, end: int) -> Tensor:
    """Positions whose points count (section 8): boolean, of the shape of `tokens` [..., L].

    `rule` lists what to drop, separated by commas: `begin`, `end`, `pad`; `end-1` is the position whose next token is
    `end`; `text` is everything that is none of begin, end and pad. A leading `^` negates the result. An empty
    rule keeps every position.

    Raises:
        ValueError: for a word that is not in `VALID_RULES`.
    """
    following = torch.cat([tokens[..., 1:], torch.zeros_like(tokens[..., :1])], dim=-1)
    special = (tokens == begin) | (tokens == end) | (tokens == PAD_ID)
    dropped = {
        "begin": tokens == begin,
        "end": tokens == end,
        "pad": tokens == PAD_ID,
        "end-1": following == end,
        "text": ~special,
    }
    valid = torch.ones_like(tokens, dtype=torch.bool)
    for word in filter(None, rule.removeprefix("^").split(",")):
        if word not in dropped:
            raise ValueError(
                f"unknown word {word!r} in the valid-token rule {rule!r}; known are {', '.join(VALID_RULES)}"
            )
        valid &= ~dropped[word]
    return ~valid if rule.startswith("^") else valid


def points_to_box(points: Tensor, valid: Tensor) -> Tensor:
    """The box around the valid points of each caption (section 8), not clipped.

    A caption without any valid position gets an inverted box, (max + 1, max + 1, min - 1, min - 1) over all its points.

    Args:
        points: (x, y) [..., L, points, 2], in any unit.
        valid: boolean [..., L].

    Returns:
        XYXY [..., 4] in the unit of `points`.
    """
    flat = points.flatten(-3, -2)
    keep = valid[..., None].expand(points.shape[:-1]).flatten(-2)[..., None]
    lowest = torch.where(keep, flat, flat.amax(dim=-2, keepdim=True) + 1).amin(dim=-2)
    highest = torch.where(keep, flat, flat.amin(dim=-2, keepdim=True) - 1).amax(dim=-2)
    return torch.cat([lowest, highest], dim=-1)
