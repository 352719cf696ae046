"""Export of a GLaMM that does not fit into memory: graph by graph, each weight from its source to the bundle in turn.

What it computes on the way (inputs of every graph, outputs for parity and golden vectors) comes from a model whose
language model has its weights only while each of its modules runs; the other parts are a few gigabytes.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deixis.bundle import Bundle, ParityRecord, open_bundle
from deixis.errors import ExportError
from deixis_export.bundle_parts import (
    GRAPH_TOLERANCE,
    GRAPHS,
    Beside,
    ExportOptions,
    Written,
    compared_with,
    describe_graph,
    finish,
    new_bundle,
    require,
    save_golden,
    to_numpy,
)
from deixis_export.cases import Case, golden_arrays
from deixis_export.cases_glamm import GOLDEN, make_cases
from deixis_export.families import GLAMM
from deixis_export.graph_spec import GraphSpec, run_torch
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.shells import shell
from deixis_export.sources import WeightSource, fill, lent, rounded
from deixis_export.streamed_graph import STREAM_FROM_BYTES, stream
from deixis_export.weights import stored_low
from deixis_train.models.config import SamVitConfig
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm

log = logging.getLogger(__name__)

# A model of more bytes in float32 is exported this way: ordinary export holds it about three times.
STREAM_MODELS_FROM = 6 << 30
# A language model of more bytes in float32 is not run for parity; its first layers are instead.
RUN_BYTES = 8 << 30
FIRST_LAYERS = 2
_LANGUAGE = "llama"
_MARGIN = 0.02  # of the disk: graphs, golden vectors, tables that are folded


@dataclass(frozen=True)
class StreamOptions:
    """Limits in bytes of float32; tests lower them.

    stream_from: smaller parameters are held in memory while their graph is written. run: a larger language model is
    compared with the graph by its first layers.
    """

    stream_from: int = STREAM_FROM_BYTES
    run: int = RUN_BYTES


def is_large(config: GlammConfig) -> bool:
    """Whether a model of these sizes should be exported by `export_streamed`."""
    return 4 * sum(p.numel() for p in shell(lambda: Glamm(config)).parameters()) >= STREAM_MODELS_FROM


def export_streamed(
    config: GlammConfig,
    weights: Callable[[Glamm], WeightSource],
    destination: Path,
    *,
    tokenizer_json: str,
    options: ExportOptions | None = None,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    documents: Mapping[str, str] | None = None,
    source: str = "",
    force: bool = False,
    limits: StreamOptions | None = None,
) -> Bundle:
    """Export without ever holding the model. The bundle is that of `export_bundle`, but for the chain's parity.

    Args:
        config: sizes; LoRA merged (`lora_rank` 0), a SAM ViT as grounding encoder.
        weights: gives the source of the weights (`sources`) for a shell of the model.
        destination, tokenizer_json, options, tasks, documents, source, force: as `export_bundle`; precision fp32 or
            fp16.
        limits: what may be in memory.

    Raises:
        ExportError: a precision or a model that cannot be streamed, a graph that differs from the model, too little
            room on the disk, which is looked at first.
        FileExistsError: the destination exists and `force` is False, or is not a bundle.
    """
    options, limits, tasks = options or ExportOptions(), limits or StreamOptions(), tasks or {}
    _check(config, options)
    model = shell(lambda: Glamm(config))
    GLAMM.task_table(config, tasks)
    _check_room(destination, _stored_bytes(model, options, limits))
    values = weights(model)
    if options.precision == "fp16":
        values = rounded(values)
    with new_bundle(destination, force) as work:
        written = _write_graphs(model, values, work, options, limits)
        beside = Beside(tokenizer_json, documents or {}, source, options.licence)
        finish(work, written, beside, lambda contents: GLAMM.make_manifest(model, tasks, contents))
    return open_bundle(destination, verify_hashes=False)  # they were computed a moment ago


def _check(config: GlammConfig, options: ExportOptions) -> None:
    if options.precision not in ("fp32", "fp16") or options.precision_of:
        raise ExportError("a model this large is exported in one precision, fp32 or fp16")
    if config.llama.lora_rank:
        raise ExportError("a model this large is exported with LoRA merged; its configuration has LoRA factors")
    if not isinstance(config.sam, SamVitConfig):
        raise ExportError("a model this large needs a SAM ViT as grounding encoder; TinyViT's BatchNorm must be folded")


def _stored_bytes(model: Glamm, options: ExportOptions, limits: StreamOptions) -> int:
    """Disk that the export of a shell takes at its largest."""

    def stored(weights: Iterable[tuple[str, Tensor]]) -> int:
        half = options.precision == "fp16"
        return sum(x.nbytes // (2 if half and stored_low(tuple(x.shape), x.nbytes) else 1) for _, x in weights)

    llama = model.llama
    total = stored(model.state_dict().items())
    if 4 * sum(p.numel() for p in llama.parameters()) > limits.run:
        later = tuple(f"layers.{i}." for i in range(FIRST_LAYERS, llama.config.layers))
        total += stored((name, x) for name, x in llama.state_dict().items() if not name.startswith(later))
    return int(total * (1 + _MARGIN))


def _check_room(destination: Path, needed: int) -> None:
    """Raises ExportError where a bundle of so many bytes does not fit."""
    place = next(folder for folder in destination.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ExportError(
            f"{destination}: needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free there; "
            "make room, choose another --out, or --precision fp16, which takes half of fp32"
        )


def _write_graphs(
    tracing: Glamm, values: WeightSource, work: Path, options: ExportOptions, limits: StreamOptions
) -> Written:
    half = options.precision == "fp16"
    written = Written()
    golden: Arrays = {}
    with _Lending(tracing.config, values) as model:
        cases = make_cases(model, GOLDEN, options.seed)
        for role, spec in GLAMM.graph_specs(tracing).items():
            start = time.perf_counter()
            expected = to_numpy(run_torch(spec, model, cases[role]))
            golden |= golden_arrays(role, to_numpy(cases[role]), expected)
            path = work / GRAPHS / f"{role}.onnx"
            stream(spec, tracing, values, path, half=half, stream_from=limits.stream_from)
            name = f"graph/{role}"
            if _LANGUAGE not in spec.parts or _bytes(tracing, spec) <= limits.run:
                error = _error(path, cases[role], expected)
            else:
                name = f"graph/{role}[first {FIRST_LAYERS} layers]"
                error = _first_layers_error(tracing.config, role, cases[role], values, work, half)
            written.records[name] = ParityRecord(error, GRAPH_TOLERANCE, compared_with(options.precision))
            require(name, written.records[name])
            written.graphs[role] = describe_graph(spec, (f"{GRAPHS}/{role}.data",), options.precision)
            log.info("%s: %.1f s, error %.1e", role, time.perf_counter() - start, error)
    save_golden(work, golden)
    return written


class _Lending:
    """A model to run: its language model has weights only while a module of it runs. A context manager."""

    def __init__(self, config: GlammConfig, values: WeightSource) -> None:
        self.model = shell(lambda: Glamm(config))
        for part, _ in self.model.named_children():
            if part != _LANGUAGE:
                fill(self.model, part, values)
        if config.llama.tied:
            fill(self.model, f"{_LANGUAGE}.embed_tokens", values)
        self._lent = lent(self.model, _LANGUAGE, values)

    def __enter__(self) -> Glamm:
        self._lent.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> None:
        self._lent.__exit__(*error)


def _bytes(model: Glamm, spec: GraphSpec[Glamm]) -> int:
    parts = [getattr(model, part) for part in spec.parts]
    return 4 * sum(p.numel() for part in parts if part is not None for p in part.parameters())


def _error(path: Path, case: Case, expected: Arrays) -> float:
    with GraphSession(path) as session:
        return relative_error(session.run(to_numpy(case)), expected)


def _first_layers_error(
    config: GlammConfig, role: str, case: Case, values: WeightSource, work: Path, half: bool
) -> float:
    """Parity of a language model cut behind its first layers, with the weights and inputs of the whole one."""
    short = dataclasses.replace(config, llama=dataclasses.replace(config.llama, layers=FIRST_LAYERS))
    tracing = shell(lambda: Glamm(short))
    spec = GLAMM.graph_specs(tracing)[role]
    case = {tensor.name: case[tensor.name] for tensor in spec.inputs}
    running = shell(lambda: Glamm(short))
    if short.llama.tied:
        fill(running, f"{_LANGUAGE}.embed_tokens", values)
    with lent(running, _LANGUAGE, values):
        expected = to_numpy(run_torch(spec, running, case))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / f"{role}.onnx"
        stream(spec, tracing, values, path, half=half)
        return _error(path, case, expected)
