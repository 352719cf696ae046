"""What happens to the picture inside the network (section 2): normalise, zero the padding, shrink to a branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deixis_train.models.resample import Resize


def padding_mask(valid_hw: Tensor, size: int) -> Tensor:
    """1 on real pixels, 0 on padding: float32 [B, size, size, 1] from the real (height, width) [B, 2] in pixels."""
    index = torch.arange(size, device=valid_hw.device, dtype=torch.float32)
    valid = valid_hw.to(torch.float32)
    rows = (index < valid[:, :1]).to(torch.float32)
    columns = (index < valid[:, 1:]).to(torch.float32)
    return (rows[:, :, None] * columns[:, None, :])[..., None]


def normalize(image: Tensor, valid_hw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(image - mean) / std with the padding exactly 0 afterwards (section 2).

    Args:
        image: RGB [B, S, S, 3] float32, 0..255, padded right and bottom.
        valid_hw: real height and width [B, 2] in pixels of `image`.
        mean, std: [3], on the 0..255 scale.

    Returns:
        [B, S, S, 3] float32.
    """
    return (image - mean) / std * padding_mask(valid_hw, image.shape[1])


class Preprocess(nn.Module):
    """`normalize`, then the bilinear antialiased resize from `image_size` to the `branch_size` of one encoder."""

    mean: Tensor
    std: Tensor

    def __init__(self, image_size: int, branch_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if branch_size > image_size:
            raise ValueError(f"an encoder input of {branch_size} px would enlarge the {image_size} px image")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        self.resize = Resize(image_size, branch_size, "linear")

    def forward(self, image: Tensor, valid_hw: Tensor) -> Tensor:
        """[B, image_size, image_size, 3] float32 0..255 -> [B, branch_size, branch_size, 3] normalised."""
        return self.resize(normalize(image, valid_hw, self.mean, self.std))
