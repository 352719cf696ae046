"""What every way of exporting does around its graphs: frame, other files, manifest, and how graphs are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deixis.bundle import (
    Graph,
    Manifest,
    ParityRecord,
    Precision,
    PrecisionSearch,
    TensorInfo,
    describe_files,
    write_bundle,
    write_manifest,
)
from deixis.errors import ExportError
from deixis_export.graph_spec import GraphSpec
from deixis_export.manifest import Contents
from deixis_export.session import Arrays
from deixis_export.trace import OPSET
from deixis_export.weights import ROUNDED, WEIGHT_ONLY, PrecisionName

# Largest error of a graph against the PyTorch model that holds the weights it holds, relative to the largest magnitude.
GRAPH_TOLERANCE = 1e-4
# The same where products are rounded too. The tasks' metrics are what judges them; this catches a graph that is broken.
INT8_TOLERANCE = 0.2
ROUNDED_TOLERANCE: Mapping[str, float] = {"int8": INT8_TOLERANCE, "w8": 0.1, "w4": 0.5}
# Graphs whose time is that of reading their weights: only they take the precisions that store weights in blocks.
TEXT_GRAPHS = ("text_encoder", "decoder_step", "decoder_pass")

TOKENIZER_FILE = "tokenizer/tokenizer.json"
GOLDEN_FILE = "golden/vectors.npz"
GRAPHS = "graphs"


@dataclass(frozen=True)
class ExportOptions:
    """precision: how weights are stored. seed: of the example request. licence: stated in the manifest.

    precision_of: by role, for graphs that differ from the others. "w8" and "w4" are for text graphs; as `precision` of
    a whole model they leave the other graphs in fp16.
    """

    precision: PrecisionName = "fp32"
    seed: int = 0
    licence: str = ""
    precision_of: Mapping[str, PrecisionName] = field(default_factory=dict)

    def of(self, role: str) -> PrecisionName:
        usual = "fp16" if self.precision in WEIGHT_ONLY and role not in TEXT_GRAPHS else self.precision
        return self.precision_of.get(role, usual)


@dataclass
class Written:
    """Graphs by role, and what the comparison of each with the model gave."""

    graphs: dict[str, Graph] = field(default_factory=dict)
    records: dict[str, ParityRecord] = field(default_factory=dict)


@dataclass(frozen=True)
class Beside:
    """What a bundle holds beside its graphs and what it says of itself: arguments of `export_bundle`."""

    tokenizer_json: str
    documents: Mapping[str, str]
    source: str
    licence: str


@contextmanager
def new_bundle(destination: Path, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes the bundle when the block ends well, with room for graphs and golden vectors.

    Raises:
        ExportError: it cannot be written.
        FileExistsError: the destination exists and `force` is False, or is not a bundle.
    """
    try:
        with write_bundle(destination, force=force) as work:
            (work / GRAPHS).mkdir()
            (work / GOLDEN_FILE).parent.mkdir()
            yield work
    except FileExistsError:
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ExportError(
            f"cannot write {destination}: {error.strerror or error}{place}; nothing was left there"
        ) from error


def finish(
    work: Path,
    written: Written,
    beside: Beside,
    make_manifest: Callable[[Contents], Manifest],
    evidence: PrecisionSearch | None = None,
) -> Manifest:
    """Add to a folder with its graphs what else a bundle holds. The manifest's parity is that of `written`."""
    _write_text(work / TOKENIZER_FILE, beside.tokenizer_json)
    for name, text in beside.documents.items():
        _write_text(work / name, text)
    manifest = make_manifest(
        Contents(
            graphs=written.graphs,
            files=describe_files(work),
            parity=written.records,
            tokenizer_file=TOKENIZER_FILE,
            golden_file=GOLDEN_FILE,
            source=beside.source,
            licence=beside.licence,
        )
    )
    manifest = replace(manifest, precision_search=evidence)
    write_manifest(work, manifest)
    return manifest


def describe_graph(
    spec: GraphSpec[Any], external: tuple[str, ...], precision: PrecisionName, islands: tuple[str, ...] = ()
) -> Graph:
    """A graph's entry in the manifest; `external` names its files of weights, `islands` nodes that stay in fp32."""

    def infos(tensors: Any) -> dict[str, TensorInfo]:
        return {tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.dims) for tensor in tensors}

    return Graph(
        file=f"{GRAPHS}/{spec.role}.onnx",
        opset=OPSET,
        inputs=infos(spec.inputs),
        outputs=infos(spec.outputs),
        precision=Precision(precision, "int8" if precision in ROUNDED else "fp32", islands),
        external=external,
    )


def graph_tolerance(precision: PrecisionName) -> float:
    """How far a graph may be from the PyTorch model of the same fp16 (or fp32) weights."""
    return ROUNDED_TOLERANCE.get(precision, GRAPH_TOLERANCE)


def compared_with(precision: PrecisionName) -> str:
    """What a graph of this precision is compared with."""
    return "torch fp32" if precision == "fp32" else "torch with the same fp16 weights"


def require(name: str, record: ParityRecord) -> None:
    """Raises ExportError for an error beyond its tolerance."""
    if not record.error <= record.tolerance:  # NaN fails
        raise ExportError(
            f"{name} differs from {record.against} by {record.error:.1e} of the largest value, "
            f"more than {record.tolerance:.0e}; nothing was left behind"
        )


def to_numpy(values: Mapping[str, Tensor]) -> Arrays:
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in values.items()}


def save_golden(work: Path, arrays: Arrays) -> None:
    with (work / GOLDEN_FILE).open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
