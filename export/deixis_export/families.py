"""The model families that can be exported, and what the export needs to know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from torch import nn

from deixis.bundle import Manifest, ParityRecord
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
    two sizes, the first for golden vectors, the second for tracing. fold: in place, what is constant at inference.
    check_tasks raises ExportError for settings of tasks that the model cannot have. chain_parity compares a request
    through the bundle with the model; its arguments are the model, the bundle, whether rounded activations (int8) make
    exact answers impossible, and a seed.
    """

    graph_specs: Callable[[M], dict[str, GraphSpec[M]]]
    shared_roles: Callable[[M], tuple[str, ...]]
    make_cases: Callable[[M, int], tuple[dict[str, Case], dict[str, Case]]]
    fold: Callable[[M], None]
    check_tasks: Callable[[M, Overrides], Any]
    make_manifest: Callable[[M, Overrides, Contents], Manifest]
    chain_parity: Callable[[M, Path, str, int], dict[str, ParityRecord]]


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
    make_cases=lambda model, seed: (
        cases.make_cases(model, cases.GOLDEN, seed),
        cases.make_cases(model, cases.OTHER, seed + 1),
    ),
    fold=_fold_pixelllm,
    check_tasks=lambda model, overrides: manifest.task_table(model.config, overrides),
    make_manifest=manifest.make_manifest,
    chain_parity=chain.chain_parity,
)

GLAMM: Family[Glamm] = Family(
    graph_specs=graphs_glamm.graph_specs,
    shared_roles=lambda model: (),  # no two graphs hold the same weights
    make_cases=lambda model, seed: (
        cases_glamm.make_cases(model, cases_glamm.GOLDEN, seed),
        cases_glamm.make_cases(model, cases_glamm.OTHER, seed + 1),
    ),
    fold=_fold_glamm,
    check_tasks=lambda model, overrides: manifest_glamm.task_table(model.config, overrides),
    make_manifest=manifest_glamm.make_manifest,
    chain_parity=chain_glamm.chain_parity,
)


def family_of(model: PixelLLM | Glamm) -> Family[Any]:
    """The family that a model belongs to."""
    return GLAMM if isinstance(model, Glamm) else PIXELLLM
