"""Example inputs of every graph, taken from a request that runs through the PyTorch model.

It runs at two sizes: parity is measured on both, GOLDEN goes into the bundle as golden vectors, and graphs are traced
on OTHER.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deixis_export.graphs import graph_specs, run_torch
from deixis_train.models.pixelllm import PixelLLM

# In the golden file arrays above this many values are stored in fewer bits.
_COMPACT_VALUES = 4096
_SAMPLED_VALUES = 4096  # of a larger output only every k-th value is kept, k odd, so that about this many are
_COARSE_LEVELS = 16


@dataclass(frozen=True)
class Sizes:
    """Values of the symbolic dimensions; K is beams per prompt, R = N * K, O boxes per picture."""

    B: int
    N: int
    K: int
    P: int
    C: int
    S: int
    T: int
    L: int
    position: int = 3
    O: int = 6  # noqa: E741


GOLDEN = Sizes(B=1, N=1, K=2, P=5, C=5, S=2, T=9, L=7)
OTHER = Sizes(B=2, N=3, K=2, P=6, C=4, S=5, T=12, L=8, position=4, O=7)

Case = dict[str, Tensor]


def example_picture(size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, S, S, 3] of coloured blocks, 0..255, and their real (height, width) [B, 2]; zero outside."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, 8, 8, 3))
    cells = (np.arange(size) * 8) // size
    image = blocks[:, cells][:, :, cells].astype(np.float32)
    valid = np.array([(size * 3 // 4, size) if i % 2 == 0 else (size, size * 5 // 8) for i in range(count)], np.float32)
    for i, (height, width) in enumerate(valid.astype(int)):
        image[i, height:] = 0
        image[i, :, width:] = 0
    return torch.from_numpy(image), torch.from_numpy(valid)


def compact(x: Tensor) -> Tensor:
    """Round inputs to values that fp16 holds, large maps to few levels, so that golden vectors are exact and small."""
    if x.numel() > _COMPACT_VALUES:
        step = 2.0 ** torch.ceil(torch.log2(x.abs().max() / _COARSE_LEVELS))
        x = torch.round(x / step) * step
    return x.half().float()


@torch.no_grad()
def make_cases(model: PixelLLM, sizes: Sizes, seed: int = 0) -> dict[str, Case]:
    """Inputs by role and logical name, from a seeded request of the given sizes."""
    config, specs = model.config, graph_specs(model)
    generator = torch.Generator().manual_seed(seed)
    side, rows = config.image_size, sizes.N * sizes.K
    cases: dict[str, Case] = {}

    def run(role: str) -> dict[str, Tensor]:
        return run_torch(specs[role], model, cases[role])

    def ids(*shape: int) -> Tensor:
        return torch.randint(2, config.text.vocab, shape, generator=generator)

    image, valid = example_picture(side, sizes.B, seed)
    cases["semantic_encoder"] = cases["sam_encoder"] = {"image": image, "valid_hw": valid}
    maps = run("semantic_encoder") | run("sam_encoder")
    index = torch.arange(rows) % sizes.B
    points = torch.floor(torch.rand(rows, sizes.P, 2, generator=generator) * side)
    kinds = [[2, 3] + [-2] * (sizes.P - 2), [1] * (sizes.P - 1) + [-1], [0, 1] * (sizes.P // 2) + [-1] * (sizes.P % 2)]
    labels = torch.tensor([kinds[i % 3][: sizes.P] for i in range(rows)])
    features = compact(torch.cat([maps["semantic"], maps["sam_on_grid"]], dim=-1))
    cases["prompt_extractor"] = {"features": features, "image_index": index, "points": points, "labels": labels}
    prefix = compact(run("prompt_extractor")["visual_prefix"])

    context = ids(sizes.N, sizes.C)
    context[0, -2:] = 0  # a shorter instruction than its neighbours
    cases["text_encoder"] = {"visual_prefix": prefix[: sizes.N], "context_ids": context}
    cross = {name: compact(value) for name, value in run("text_encoder").items()}

    cache_shape = (rows, config.text.heads, sizes.T, config.text.head_dim)
    own = {
        f"self_{part}.{layer}": torch.zeros(cache_shape)
        for layer in range(config.text.layers)
        for part in ("key", "value")
    }
    banned = torch.tensor([-1, 5])[torch.arange(rows) % 2]
    prefill = {"ids": ids(rows, sizes.position), "position": torch.tensor([0]), "banned": banned, **cross, **own}
    cases["decoder_step"] = prefill
    written = run("decoder_step")
    own = {name: compact(written[name.replace(".", "_out.")]) for name in own}
    place = torch.tensor([sizes.position])
    cases["decoder_step"] = {"ids": ids(rows, sizes.S), "position": place, "banned": banned, **cross, **own}

    words = ids(sizes.N, sizes.L)
    words[:, 0] = config.begin_token_id
    words[0, -3], words[0, -2:] = config.end_token_id, 0
    cases["decoder_pass"] = {"ids": words, **cross}

    features = compact(run("decoder_pass")["features"])
    if "mask_adapter" in specs:
        cases["mask_adapter"] = {"visual_prefix": prefix[: sizes.N], "features": features}
    if "mask_decoder" in specs:
        delta = torch.randn(rows, sizes.P, config.prompt_embed_dim, generator=generator) * 0.1
        cases["mask_decoder"] = {
            "sam": compact(maps["sam"]),
            "image_index": index,
            "points": points,
            "labels": labels,
            "prompt_delta": compact(delta),
        }
    if "box_proposals" in specs:
        cases["box_proposals"] = {"features": cases["prompt_extractor"]["features"]}
        maps = run("box_proposals")
        levels = {name: compact(level) for name, level in maps.items() if name not in ("heatmap", "boxes")}
        cases["box_refine"] = {**levels, "boxes": example_boxes(side, sizes.B, sizes.O, generator)}
    return cases


def example_boxes(size: int, pictures: int, count: int, generator: torch.Generator) -> Tensor:
    """Boxes [pictures, count, 4] of all sizes and shapes in a square input of `size` px.

    Widths and heights are odd multiples of a half, so that no area is that of the border between two levels, where
    rounding would decide.
    """
    corners = torch.floor(torch.rand(pictures, count, 2, generator=generator) * (size - 2))
    room = size - 1 - corners
    extent = torch.floor(torch.rand(pictures, count, 2, generator=generator) * room) + 0.5
    return torch.cat([corners, corners + extent], dim=-1)


def golden_arrays(role: str, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays for the golden file.

    Inputs are exact in fewer bits; large outputs are rounded to fp16 (5e-4 of a value), and sampled when very large.
    Outputs of integers are left out: the ids of likeliest words, whose log-probabilities are there; where those are
    almost equal, another device may exchange the ids.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        arrays[f"{role}/in/{name}"] = _smallest_exact(value)
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.integer):
            continue
        stored = value.astype(np.float16) if value.dtype == np.float32 and value.size > _COMPACT_VALUES else value
        stride = -(-value.size // _SAMPLED_VALUES) | 1
        if stride == 1:
            arrays[f"{role}/out/{name}"] = stored
        else:
            arrays[f"{role}/out[::{stride}]/{name}"] = stored.ravel()[::stride]
    return arrays


def _smallest_exact(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.float32:
        return value
    for kind in (np.uint8, np.float16):
        with np.errstate(over="ignore", invalid="ignore"):
            small = value.astype(kind)
        if np.array_equal(small.astype(np.float32), value):
            return small
    return value
