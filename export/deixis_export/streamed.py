"""Export of a GLaMM that does not fit into memory: graph by graph, each weight from its source to the bundle in turn.

What it computes on the way (inputs of every graph, outputs for parity and golden vectors) comes from a model whose
language model has its weights only while each of its modules runs; the other parts are a few gigabytes.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deixis.bundle import Bundle, Graph, ParityRecord, describe_files, open_bundle, write_bundle, write_manifest
from deixis.errors import ExportError
from deixis_export.cases import Case, golden_arrays
from deixis_export.cases_glamm import GOLDEN, make_cases
from deixis_export.export import (
    GOLDEN_FILE,
    GRAPH_TOLERANCE,
    TOKENIZER_FILE,
    ExportOptions,
    _describe,
    _numpy,
    _save_npz,
    _write_text,
    require,
)
from deixis_export.families import GLAMM
from deixis_export.graph_spec import GraphSpec, run_torch
from deixis_export.manifest import Contents
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.shells import shell
from deixis_export.sources import WeightSource, fill, lent, rounded
from deixis_export.streamed_graph import STREAM_FROM_BYTES, stream
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
        ExportError: a precision or a model that cannot be streamed, a graph that differs from the model, a full disk.
        FileExistsError: the destination exists and `force` is False, or is not a bundle.
    """
    options, limits, tasks = options or ExportOptions(), limits or StreamOptions(), tasks or {}
    _check(config, options)
    model = shell(lambda: Glamm(config))
    GLAMM.check_tasks(model, tasks)
    values = weights(model)
    if options.precision == "fp16":
        values = rounded(values)
    try:
        with write_bundle(destination, force=force) as work:
            graphs, records = _write_graphs(model, values, work, options, limits)
            _write_text(work / TOKENIZER_FILE, tokenizer_json)
            for name, text in (documents or {}).items():
                _write_text(work / name, text)
            contents = Contents(
                graphs=graphs,
                files=describe_files(work),
                parity=records,
                tokenizer_file=TOKENIZER_FILE,
                golden_file=GOLDEN_FILE,
                source=source,
                licence=options.licence,
            )
            write_manifest(work, GLAMM.make_manifest(model, tasks, contents))
    except FileExistsError:
        raise
    except ValueError as error:
        raise ExportError(str(error)) from None
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"cannot write {destination}: {error.strerror or error}{place}; nothing was left there"
        ) from error
    return open_bundle(destination, verify_hashes=False)  # they were computed a moment ago


def _check(config: GlammConfig, options: ExportOptions) -> None:
    if options.precision not in ("fp32", "fp16") or options.precision_of:
        raise ExportError("a model this large is exported in one precision, fp32 or fp16")
    if config.llama.lora_rank:
        raise ExportError("a model this large is exported with LoRA merged; its configuration has LoRA factors")
    if not isinstance(config.sam, SamVitConfig):
        raise ExportError("a model this large needs a SAM ViT as grounding encoder; TinyViT's BatchNorm must be folded")


def _write_graphs(
    tracing: Glamm, values: WeightSource, work: Path, options: ExportOptions, limits: StreamOptions
) -> tuple[dict[str, Graph], dict[str, ParityRecord]]:
    (work / "graphs").mkdir()
    (work / "golden").mkdir()
    half = options.precision == "fp16"
    against = "torch fp32" if options.precision == "fp32" else "torch with the same fp16 weights"
    graphs: dict[str, Graph] = {}
    records: dict[str, ParityRecord] = {}
    golden: Arrays = {}
    with _Lending(tracing.config, values) as model:
        cases = make_cases(model, GOLDEN, options.seed)
        for role, spec in GLAMM.graph_specs(tracing).items():
            start = time.perf_counter()
            expected = _numpy(run_torch(spec, model, cases[role]))
            golden |= golden_arrays(role, _numpy(cases[role]), expected)
            path = work / "graphs" / f"{role}.onnx"
            stream(spec, tracing, values, path, half=half, stream_from=limits.stream_from)
            name = f"graph/{role}"
            if _LANGUAGE not in spec.parts or _bytes(tracing, spec) <= limits.run:
                error = _error(path, cases[role], expected)
            else:
                name = f"graph/{role}[first {FIRST_LAYERS} layers]"
                error = _first_layers_error(tracing.config, role, cases[role], values, work, half)
            records[name] = ParityRecord(error, GRAPH_TOLERANCE, against)
            require(name, records[name])
            graphs[role] = _describe(spec, (f"graphs/{role}.data",), options.precision)
            log.info("%s: %.1f s, error %.1e", role, time.perf_counter() - start, error)
    _save_npz(work / GOLDEN_FILE, golden)
    return graphs, records


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
        return relative_error(session.run(_numpy(case)), expected)


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
        expected = _numpy(run_torch(spec, running, case))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / f"{role}.onnx"
        stream(spec, tracing, values, path, half=half)
        return _error(path, case, expected)
