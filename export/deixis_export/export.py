"""Export: a PyTorch model becomes a bundle, graph by graph, each compared with the model before the next begins."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deixis.bundle import Bundle, ParityRecord, PrecisionSearch, open_bundle, write_manifest
from deixis.errors import ExportError
from deixis_export.bundle_parts import (
    GRAPH_TOLERANCE,
    GRAPHS,
    ROUNDED_TOLERANCE,
    TEXT_GRAPHS,
    Beside,
    ExportOptions,
    Written,
    compared_with,
    describe_graph,
    finish,
    graph_tolerance,
    new_bundle,
    require,
    save_golden,
    to_numpy,
)
from deixis_export.cases import Case, golden_arrays
from deixis_export.families import Family, family_of
from deixis_export.graph_spec import GraphSpec, M, run_torch
from deixis_export.islands import HALF_TOLERANCE, WHOLE_GRAPH, find_islands
from deixis_export.quantize import quantize_blocks, quantize_int8
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.trace import TracedGraph, trace
from deixis_export.weights import (
    EXTERNAL_LIMIT_BYTES,
    PRECISIONS,
    ROUNDED,
    WEIGHT_ONLY,
    PrecisionName,
    WeightFile,
    has_low,
    round_to_fp16,
    store_fp16,
    total_bytes,
    write_graph,
)
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM

log = logging.getLogger(__name__)

# How far lowering the precision may move a graph from the fp32 model.
DRIFT_TOLERANCE = {"fp32": GRAPH_TOLERANCE, "fp16": 5e-2, **ROUNDED_TOLERANCE}

DECODER_WEIGHTS = "decoder.data"


def export_bundle(
    model: PixelLLM | Glamm,
    destination: Path,
    *,
    tokenizer_json: str,
    options: ExportOptions | None = None,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    documents: Mapping[str, str] | None = None,
    source: str = "",
    force: bool = False,
    evidence: PrecisionSearch | None = None,
) -> Bundle:
    """Export a model. It is changed: LoRA and BatchNorm are folded, weights rounded to the stored precision.

    Args:
        model: in float32.
        destination: the bundle's directory; it appears only when everything is written and checked.
        tokenizer_json: text of the tokenizer file.
        options: precision and the like.
        tasks: overrides of the task table (`deixis_train.tasks`).
        documents: MODEL_CARD.md and NOTICE by name.
        source: where the weights come from, for the manifest.
        force: replace an existing bundle.
        evidence: how the precisions were chosen, for the manifest.

    Raises:
        ExportError: a graph or the chain differs from the model beyond tolerance, a wrong option, a full disk.
            Nothing is left.
        FileExistsError: the destination exists and `force` is False, or is not a bundle.
    """
    options, tasks = options or ExportOptions(), tasks or {}
    family = family_of(model)
    specs = family.graph_specs(model)
    _check_options(specs, options)
    family.task_table(model.config, tasks)
    with new_bundle(destination, force) as work:
        written = _write_graphs(family, model.eval(), work, options)
        beside = Beside(tokenizer_json, documents or {}, source, options.licence)
        manifest = finish(
            work, written, beside, lambda contents: family.make_manifest(model, tasks, contents), evidence
        )
        # Where any graph rounds activations, the chain can only be recorded.
        lowest = "int8" if any(options.of(role) in ROUNDED for role in specs) else options.precision
        records = family.chain_parity(model, work, lowest, options.seed)
        for name, record in records.items():
            require(name, record)
        written.records.update(records)
        write_manifest(work, manifest)
    return open_bundle(destination)


def _check_options(specs: Mapping[str, GraphSpec[Any]], options: ExportOptions) -> None:
    for precision in (options.precision, *options.precision_of.values()):
        if precision not in PRECISIONS:
            raise ExportError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    unknown = set(options.precision_of) - set(specs)
    if unknown:
        raise ExportError(f"this model has no graph {sorted(unknown)[0]!r}; it has {', '.join(specs)}")
    for role, precision in options.precision_of.items():
        if precision in WEIGHT_ONLY and role not in TEXT_GRAPHS:
            raise ExportError(
                f"{precision} is for graphs of text ({', '.join(r for r in TEXT_GRAPHS if r in specs)}); "
                f"store {role} in fp16 or int8"
            )


def _write_graphs(family: Family[Any], model: nn.Module, work: Path, options: ExportOptions) -> Written:
    specs = family.graph_specs(model)
    cases = family.cases(model, options.seed)
    before = {role: to_numpy(run_torch(spec, model, cases[0][role])) for role, spec in specs.items()}
    with torch.no_grad():
        family.fold(model)
    round_weights(model, specs, options)
    result, folder = Written(), work / GRAPHS
    golden: Arrays = {}
    with ExitStack() as stack:
        decoder = stack.enter_context(WeightFile(folder / DECODER_WEIGHTS))
        for role, spec in specs.items():
            start, precision = time.perf_counter(), options.of(role)
            expected = [to_numpy(run_torch(spec, model, case[role])) for case in cases]
            shared = decoder if role in family.shared_roles(model) else None
            traced = trace(spec, model, cases[1][role])
            islands: tuple[str, ...] = ()
            if precision == "fp16":
                islands = _islands(role, traced, [to_numpy(case[role]) for case in cases], expected, result)
            external = write_lowered(traced, role, folder, shared, precision)
            with GraphSession(folder / f"{role}.onnx") as session:
                actual = [session.run(to_numpy(case[role])) for case in cases]
            error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
            record = ParityRecord(error, graph_tolerance(precision), compared_with(precision))
            result.records[f"graph/{role}"] = record
            require(f"graph/{role}", record)
            if precision != "fp32":
                drift = ParityRecord(relative_error(actual[0], before[role]), DRIFT_TOLERANCE[precision])
                result.records[f"drift/{role}"] = drift
                require(f"drift/{role}", drift)
            # What a user's device has to give: the model's numbers, or those of the graph itself where it rounds.
            truth = actual[0] if precision in ROUNDED else expected[0]
            golden |= golden_arrays(role, to_numpy(cases[0][role]), truth)
            result.graphs[role] = describe_graph(spec, external, precision, islands)
            log.info("%s: %.1f s, error %.1e", role, time.perf_counter() - start, error)
    save_golden(work, golden)
    return result


def _islands(
    role: str, traced: TracedGraph, cases: list[Arrays], expected: list[Arrays], result: Written
) -> tuple[str, ...]:
    """Nodes that engines which compute in half precision must leave in fp32; the comparison goes into `result`."""
    found = find_islands(traced, cases, expected)
    if found.nodes == WHOLE_GRAPH:
        log.info("%s: half precision is off by %.1e whatever stays in fp32; all of it must", role, found.bare)
    else:
        against = f"torch; all in half precision but for {len(found.nodes)} nodes"
        result.records[f"half/{role}"] = ParityRecord(found.error, HALF_TOLERANCE, against)
    return found.nodes


def round_weights(model: nn.Module, specs: Mapping[str, GraphSpec[Any]], options: ExportOptions) -> None:
    """Round the weights of each graph as it stores them. Raises ExportError where two graphs disagree about a part."""
    users: dict[str, str] = {}
    for role, spec in specs.items():
        for part in spec.parts:
            other = users.setdefault(part, role)
            lowered = [options.of(user) != "fp32" for user in (role, other)]
            if lowered[0] != lowered[1] and has_low(getattr(model, part)):
                raise ExportError(
                    f"{other} and {role} hold the same weights ({part}), so one cannot be fp32 without the other"
                )
    for part, role in users.items():
        module = getattr(model, part)
        if options.of(role) == "fp32" or module is None:
            continue
        try:
            round_to_fp16(module, part)
        except ValueError as error:
            raise ExportError(str(error)) from None


def trace_and_write(
    spec: GraphSpec[M], model: M, example: Case, folder: Path, shared: WeightFile | None, precision: PrecisionName
) -> tuple[str, ...]:
    """Trace a graph and `write_lowered` it."""
    return write_lowered(trace(spec, model, example), spec.role, folder, shared, precision)


def write_lowered(
    traced: TracedGraph, role: str, folder: Path, shared: WeightFile | None, precision: PrecisionName
) -> tuple[str, ...]:
    """Lower a graph's precision and write it into `folder`, its weights into `shared` if that is given.

    Returns its external files, relative to the bundle.
    """
    if precision == "int8":
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            quantize_int8(traced, Path(temporary))
    elif precision in WEIGHT_ONLY:
        quantize_blocks(traced, WEIGHT_ONLY[precision])
    if precision != "fp32":
        store_fp16(traced)
    path = folder / f"{role}.onnx"
    if shared is not None:
        write_graph(traced, path, shared)
        shared.flush()
        return (f"{GRAPHS}/{shared.path.name}",)
    if total_bytes(traced) < EXTERNAL_LIMIT_BYTES:
        write_graph(traced, path)
        return ()
    with WeightFile(folder / f"{role}.data") as own:
        write_graph(traced, path, own)
    return (f"{GRAPHS}/{role}.data",)
