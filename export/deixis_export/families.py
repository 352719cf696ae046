"""The model families that can be exported, and what the export needs to know of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from torch import nn

from deixis.bundle import Manifest, ParityRecord, TaskSpec
from deixis_export import (
    cases,
    cases_glamm,
    chain,
    chain_glamm,
    graphs,
    graphs_glamm,
    manifest,
    manifest_glamm,
)
from deixis_export.cases import Case
from deixis_export.graph_spec import GraphSpec, M
from deixis_export.manifest import Contents, Overrides
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.tiny_vit import TinyVit


@dataclass(frozen=True)
class Family(Generic[M]):
    """How a model of one family becomes a bundle.

    graph_specs: the graphs, by role. shared_roles: those that share one file of weights. make_cases: inputs by role at
    given sizes, of which `sizes` are two. fold: in place, what is constant at inference. task_table: of a configuration
    with a checkpoint's settings; raises ExportError for those that the model cannot have. chain_parity compares a
    request through the bundle with the model; its arguments are the model, the bundle, the lowest precision of a graph,
    and a seed.
    """

    graph_specs: Callable[[M], dict[str, GraphSpec[M]]]
    shared_roles: Callable[[M], tuple[str, ...]]
    make_cases: Callable[[M, Any, int], dict[str, Case]]
    sizes: tuple[Any, Any]
    fold: Callable[[M], None]
    task_table: Callable[[Any, Overrides], Mapping[str, TaskSpec]]
    make_manifest: Callable[[M, Overrides, Contents], Manifest]
    chain_parity: Callable[[M, Path, str, int], dict[str, ParityRecord]]

    def cases(self, model: M, seed: int) -> tuple[dict[str, Case], dict[str, Case]]:
        """Inputs by role at both sizes: the first for golden vectors, the second for tracing."""
        golden, other = self.sizes
        return self.make_cases(model, golden, seed), self.make_cases(model, other, seed + 1)


def _fold_pixelllm(model: PixelLLM) -> None:
    model.text.merge_lora()
    _fold_batchnorm(model.sam_encoder)


def _fold_glamm(model: Glamm) -> None:
    model.llama.merge_lora()
    _fold_batchnorm(model.sam_encoder)


def _fold_batchnorm(encoder: nn.Module) -> None:
    if isinstance(encoder, TinyVit):
        encoder.fuse_batchnorm()


PIXELLLM: Family[PixelLLM] = Family(
    graph_specs=graphs.graph_specs,
    shared_roles=graphs.shared_roles,
    make_cases=cases.make_cases,
    sizes=(cases.GOLDEN, cases.OTHER),
    fold=_fold_pixelllm,
    task_table=manifest.task_table,
    make_manifest=manifest.make_manifest,
    chain_parity=chain.chain_parity,
)

GLAMM: Family[Glamm] = Family(
    graph_specs=graphs_glamm.graph_specs,
    shared_roles=lambda model: (),  # no two graphs hold the same weights
    make_cases=cases_glamm.make_cases,
    sizes=(cases_glamm.GOLDEN, cases_glamm.OTHER),
    fold=_fold_glamm,
    task_table=manifest_glamm.task_table,
    make_manifest=manifest_glamm.make_manifest,
    chain_parity=chain_glamm.chain_parity,
)


def family_of(model: PixelLLM | Glamm) -> Family[Any]:
    """The family that a model belongs to."""
    return GLAMM if isinstance(model, Glamm) else PIXELLLM
