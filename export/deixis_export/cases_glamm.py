"""Example inputs of the graphs of glamm, taken from a conversation that runs through the PyTorch model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deixis_export.cases import Case, compact, example_picture
from deixis_export.graph_spec import run_torch
from deixis_export.graphs_glamm import empty_caches, graph_specs
from deixis_train.models.glamm.glamm import Glamm

BOX_STEPS = 64  # coordinates of example boxes are multiples of 1 / 64, which fewer bits hold exactly


@dataclass(frozen=True)
class Sizes:
    """Values of the symbolic dimensions: B pictures, R rows, K boxes, M masks, S new positions behind `position` that
    are filled, T capacity of the caches, V visual rows."""

    B: int
    R: int
    K: int
    M: int
    S: int
    T: int
    V: int
    position: int = 3


GOLDEN = Sizes(B=1, R=2, K=3, M=2, S=2, T=9, V=3)
OTHER = Sizes(B=2, R=3, K=4, M=5, S=6, T=12, V=7, position=4)


def example_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Boxes XYXY [count, 4] as fractions of the picture, at least an eighth wide and high."""
    smallest = BOX_STEPS // 8
    low = torch.randint(0, BOX_STEPS - smallest, (count, 2), generator=generator)
    extent = smallest + torch.rand(count, 2, generator=generator) * (BOX_STEPS - smallest - low)
    return torch.cat([low, low + extent.floor()], dim=1) / BOX_STEPS


@torch.no_grad()
def make_cases(model: Glamm, sizes: Sizes, seed: int = 0) -> dict[str, Case]:
    """Inputs by role and logical name, from a seeded request of the given sizes."""
    config, specs = model.config, graph_specs(model)
    generator = torch.Generator().manual_seed(seed)
    cases: dict[str, Case] = {}

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(2, config.llama.vocab, shape, generator=generator)

    def run(role: str) -> dict[str, torch.Tensor]:
        return run_torch(specs[role], model, cases[role])

    whole, _ = example_picture(config.clip.image_size, sizes.B, seed)
    cases["global_encoder"] = {"image": whole}
    maps = {name: compact(value) for name, value in run("global_encoder").items()}
    visual = maps.pop("features").flatten(0, 1)[: sizes.V]
    if config.region is not None:
        index = torch.arange(sizes.K) % sizes.B
        cases["region_encoder"] = {**maps, "boxes": example_boxes(sizes.K, generator), "image_index": index}
        visual = torch.cat([visual[:-1], compact(run("region_encoder")["regions"][:1])])

    def words(length: int, spliced: int) -> Case:
        """Rows of ids, in which every row's first `spliced` places are visual ones."""
        embed_index = torch.full((sizes.R, length), -1)
        embed_index[:, :spliced] = torch.randint(0, len(visual), (sizes.R, spliced), generator=generator)
        return {"ids": ids(sizes.R, length), "visual": visual, "embed_index": embed_index}

    banned = torch.tensor([-1, 5])[torch.arange(sizes.R) % 2]
    empty = empty_caches(config.llama, sizes.R, sizes.T)
    begin = {**words(sizes.position, sizes.position - 1), "position": torch.tensor([0]), "banned": banned}
    cases["decoder_step"] = {**begin, **empty}
    written = run("decoder_step")
    own = {name: compact(written[name.replace(".", "_out.")]) for name in empty}
    place = torch.tensor([sizes.position])
    cases["decoder_step"] = {**words(sizes.S, 1), "position": place, "banned": banned, **own}
    states = compact(run("decoder_step")["states"]).flatten(0, 1)[: sizes.M]

    image, valid = example_picture(config.image_size, sizes.B, seed + 1)
    cases["grounding_encoder"] = {"image": image, "valid_hw": valid}
    sam = compact(run("grounding_encoder")["sam"])
    cases["pixel_decoder"] = {"states": states, "sam": sam, "image_index": torch.arange(len(states)) % sizes.B}
    return cases
