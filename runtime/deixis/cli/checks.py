"""inspect, verify, doctor: what a bundle holds, whether it computes here what it should, what this machine offers."""

from __future__ import annotations

import argparse
import platform
import re
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deixis._version import __version__
from deixis.bundle import Bundle, Graph, open_bundle
from deixis.cli.arguments import DEFAULT_BUNDLE
from deixis.cli.tasks import write_json
from deixis.engines import DEVICES, Engine, make_engine
from deixis.errors import BundleError, BundleIntegrityError, DeviceError, EngineError
from deixis.files import check_target
from deixis.model import find_bundle
from deixis.scheduling import Schedulable, make_scheduling, usable_cores

Array = NDArray[np.generic]
# Large golden outputs are stored in half precision, which rounds a value by at most this part of it.
_HALF_ROUNDING = 2.0**-11


@dataclass(frozen=True)
class Comparison:
    """One output of one graph: largest error relative to the largest magnitude, and what is allowed."""

    role: str
    output: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def inspect(options: argparse.Namespace) -> int:
    bundle = open_bundle(find_bundle(options.bundle), verify_hashes=False)
    if options.json:
        print(bundle.manifest.to_json(), end="")
    else:
        print("\n".join(_inspection(bundle)))
    return 0


def verify(options: argparse.Namespace) -> int:
    if options.json and options.json != "-":
        check_target(options.json)
    bundle = open_bundle(find_bundle(options.bundle))
    scheduling = make_scheduling(options.threads, options.spin, options.cores)
    engine = make_engine(bundle, options.device, scheduling.threads or None)
    if isinstance(engine, Schedulable):
        engine.schedule(scheduling)
    started = time.perf_counter()
    try:
        rows = compare_golden(bundle, engine)
    finally:
        engine.close()
    seconds = time.perf_counter() - started
    silent = [role for role in bundle.manifest.graphs if role not in {row.role for row in rows}]
    failed = [row for row in rows if not row.ok]
    if options.json:
        values = [{**vars(row), "error": row.error if np.isfinite(row.error) else None, "ok": row.ok} for row in rows]
        write_json(options.json, {"device": engine.device, "ok": bool(rows) and not failed, "comparisons": values})
    if options.json != "-":
        width = max((len(f"{row.role} {row.output}") for row in rows), default=0)
        for row in rows:
            name = f"{row.role} {row.output}"
            print(
                f"{name:<{width}}  error {row.error:8.1e}  allowed {row.tolerance:8.1e}  {'ok' if row.ok else 'FAILED'}"
            )
        for role in silent:
            print(f"{role}: no golden vectors in this bundle")
        print(f"{len(rows) - len(failed)} of {len(rows)} outputs agree on {engine.device}, {seconds:.1f} s")
    if not rows:
        raise BundleError(f"{bundle.path}: its golden file has vectors for none of its graphs; export it again")
    return 1 if failed else 0


def compare_golden(bundle: Bundle, engine: Engine) -> list[Comparison]:
    """Run every graph that has golden vectors. Raises BundleIntegrityError when the golden file is not usable."""
    manifest = bundle.manifest
    path = bundle.file(manifest.golden)
    rows: list[Comparison] = []
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for role, graph in manifest.graphs.items():
                inputs = {name: array for name, _, array in _of_role(arrays, role, "in")}
                expected = _of_role(arrays, role, "out")
                if expected:
                    rows += _compare(role, graph, engine, inputs, expected, manifest.parity.get(f"graph/{role}"))
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        if isinstance(error, (BundleError, EngineError)):
            raise
        raise BundleIntegrityError(f"{path}: not usable as golden vectors: {error}; export the bundle again") from error
    return rows


def _of_role(arrays: Any, role: str, side: str) -> list[tuple[str, int, Array]]:
    """(logical name, stride, array) of "<role>/<side>/<name>", or of "<role>/<side>[::<stride>]/<name>"."""
    pattern = re.compile(rf"{re.escape(role)}/{side}(?:\[::([1-9]\d{{0,8}})\])?/(.+)")
    found = [(match, name) for name in arrays.files if (match := pattern.fullmatch(name))]
    return [(match[2], int(match[1] or 1), arrays[name]) for match, name in found]


def _compare(
    role: str,
    graph: Graph,
    engine: Engine,
    inputs: dict[str, Array],
    expected: list[tuple[str, int, Array]],
    parity: Any,
) -> list[Comparison]:
    missing = sorted(set(graph.inputs) - set(inputs))
    unknown = sorted((set(inputs) - set(graph.inputs)) | ({name for name, _, _ in expected} - set(graph.outputs)))
    if missing or unknown or parity is None:
        what = f"inputs {missing} missing" if missing else f"unknown {unknown}" if unknown else "no parity record"
        raise KeyError(f"graph {role}: {what}")
    outputs = engine.run(role, {name: a.astype(graph.inputs[name].dtype) for name, a in inputs.items()})
    rows = []
    for name, stride, stored in expected:
        allowed = parity.tolerance + (_HALF_ROUNDING if stored.dtype == np.float16 else 0.0)
        found = outputs[name] if stride == 1 else outputs[name].ravel()[::stride]
        rows.append(Comparison(role, name, relative_error(found, stored), float(allowed)))
    return rows


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference relative to the largest magnitude expected; infinite on other shapes or NaN."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.size:
        return 0.0
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))


def doctor(options: argparse.Namespace) -> int:
    print(f"deixis       {__version__}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in (
        "numpy",
        "opencv-python-headless",
        "opencv-python",
        "tokenizers",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
    ):
        try:
            print(f"{name:<12} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            if name in ("numpy", "tokenizers", "onnxruntime"):
                print(f"{name:<12} not installed")
    print(f"threads      {usable_cores() or 'as many as onnxruntime likes'} for a graph run, asleep while they wait")
    try:
        bundle = open_bundle(find_bundle(DEFAULT_BUNDLE), verify_hashes=False)
        print(f"demo bundle  {bundle.path}")
    except BundleError as error:
        print(f"demo bundle  none: {error}")
        return 0
    for device in DEVICES[1:]:
        try:
            make_engine(bundle, device).close()
            print(f"device {device:<9} works")
        except (DeviceError, EngineError) as error:
            print(f"device {device:<9} no: {error}")
    return 0


def _inspection(bundle: Bundle) -> list[str]:
    m = bundle.manifest
    total = sum(info.bytes for info in m.files.values())
    lines = [
        f"{m.model.name} ({m.model.family}, revision {m.model.revision}), bundle format {m.format.version}",
        f"{bundle.path}: {len(m.files)} files, {total / 1e6:.1f} MB",
        f"image {m.image.size} px; cache {m.caches.default_capacity} tokens; vocabulary {m.tokenizer.vocab_size}",
    ]
    if m.global_image is not None and m.conversation is not None:
        regions = "takes boxes" if m.conversation.region_id is not None else "takes no boxes"
        lines.append(
            f"that is the masks' input; the text's is {m.global_image.size} px, {m.conversation.image_tokens} tokens; "
            f"{regions}"
        )
    lines += ["", "graphs"]
    for role, graph in m.graphs.items():
        size = sum(m.files[name].bytes for name in (graph.file, *graph.external)) / 1e6
        parity = m.parity.get(f"graph/{role}")
        measured = f"  parity {parity.error:.1e} (allowed {parity.tolerance:.0e})" if parity else ""
        stored, compute = graph.precision.weights, graph.precision.compute
        lines.append(f"  {role:<18} {size:7.2f} MB  opset {graph.opset}  {stored}, computed in {compute}{measured}")
        lines += [f"      in   {name}: {t.dtype} {_shape(t.shape)}" for name, t in graph.inputs.items()]
        lines += [f"      out  {name}: {t.dtype} {_shape(t.shape)}" for name, t in graph.outputs.items()]
    lines += ["", "tasks"]
    for name, task in m.tasks.items():
        search = "greedy" if task.beams == 1 else f"{task.beams} beams"
        lines.append(f"  {name:<18} {task.instruction!r}, up to {task.max_length} tokens, {search}")
    lines += ["", "dimensions (min, usual, max)"]
    lines += [f"  {name:<4} {d.min}, {d.opt}, {d.max}" for name, d in m.dims.items()]
    source = m.provenance
    told = [("made by", source.exporter), ("on", source.created), ("from", source.source), ("licence", source.licence)]
    lines += ["", *(f"{label} {text}" for label, text in told if text)]
    return lines


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
