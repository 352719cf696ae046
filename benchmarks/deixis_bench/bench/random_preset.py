"""A preset's sizes with random weights: exported into a folder, then measured like any bundle, or graph by graph.

The exporter runs as a process of its own, for it needs torch and much memory. When the weights of all graphs together
do not fit into what is free, each graph is loaded and run alone, on made-up inputs of the bundle's usual sizes; then
there are stages but no requests.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deixis
from deixis.bundle import MANIFEST_NAME, Bundle, Graph, open_bundle
from deixis.errors import DeixisError
from deixis.timing import LOAD, Span
from deixis_bench.bench import graph_cost, machine, roofline
from deixis_bench.bench.measure import measure, stored_bytes
from deixis_bench.bench.ort_probe import ProbeError
from deixis_bench.bench.report import FORMAT, VERSION, describe_bundle, describe_settings, flat_metrics, make_stages
from deixis_bench.bench.rounds import Run
from deixis_bench.bench.settings import Settings, threads_of

Say = Callable[[str], None]
FREE = 0.6  # of the free memory that weights may take: an engine needs some for packing them, and for activations
WIDENED = {"fp16": 2.0}  # what weights grow by when they are loaded on a CPU


def measure_random(
    preset: str, precision: str, settings: Settings, work: Path | None, say: Say = lambda _: None
) -> dict[str, Any]:
    """The report of a preset. work: keeps the bundle there, and takes the one that is there; None = a temporary folder.

    Raises DeixisError: an unknown preset or precision, or what the export fails at.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)) / f"{preset}-{precision}-{settings.seed}"
        if not (folder / MANIFEST_NAME).is_file():
            say(f"exporting {preset} with random weights")
            export(preset, precision, settings.seed, folder)
        bundle = open_bundle(folder, verify_hashes=False)
        if fits(bundle):
            [report] = measure([folder], settings, say)
        else:
            report = measure_graphs(bundle, settings, say)
    return report | {"preset": preset}


def export(preset: str, precision: str, seed: int, folder: Path) -> None:
    """Run `deixis export --preset ... --random`. Raises DeixisError with its own words."""
    arguments = ["--preset", preset, "--random", "--precision", precision, "--seed", str(seed), "--out", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "deixis_export", *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return
    if done.returncode == -9:
        raise DeixisError(f"the export of {preset!r} was killed, which is what happens when memory runs out")
    if done.returncode < 0:
        raise DeixisError(f"the export of {preset!r} was stopped by signal {-done.returncode}")
    said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise DeixisError(f"the export of {preset!r} failed: {said[0].removeprefix('deixis export: error: ')}")


def weights_in_memory(bundle: Bundle, role: str) -> int:
    """Bytes that a graph's weights take when it is loaded on a CPU, about: files hold little else."""
    graph = bundle.manifest.graphs[role]
    size = sum(bundle.manifest.files[name].bytes for name in (graph.file, *graph.external))
    return int(size * WIDENED.get(graph.precision.weights, 1.0))


def fits(bundle: Bundle, free: int | None = None) -> bool:
    """Whether all graphs together fit into memory; free: bytes, None = what is free now, if the system says it."""
    free = machine.free_memory_bytes() if free is None else free
    return not free or sum(weights_in_memory(bundle, role) for role in bundle.manifest.graphs) <= FREE * free


def measure_graphs(bundle: Bundle, settings: Settings, say: Say = lambda _: None) -> dict[str, Any]:
    """The report of a bundle whose graphs are loaded one at a time. Those that do not fit alone are left out, and
    `notes` names them.
    """
    about, notes = machine.describe(), ["graph by graph, for together they do not fit into memory: made-up inputs"]
    with deixis.load(bundle.path, settings.device, settings.threads, verify=False) as model:
        device, threads = model.info.device, threads_of(model.info.threads)
    limits = roofline.measure(device, threads)
    cold: dict[str, Run] = {}
    warm: dict[str, list[Run]] = {}
    costs: dict[str, graph_cost.GraphCost] = {}
    for role, graph in bundle.manifest.graphs.items():
        needed, free = weights_in_memory(bundle, role), machine.free_memory_bytes()
        if free and needed > FREE * free:
            notes.append(f"{role}: left out: its weights take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            continue
        say(f"{role}: {settings.rounds} runs")
        inputs = made_up(bundle, graph, settings)
        cold[role], warm[role] = _run_alone(bundle, role, inputs, settings)
        try:
            costs[role] = graph_cost.cost_of(bundle, role, inputs)
        except (ProbeError, deixis.DeviceError) as error:
            notes.append(f"{role}: not counted: {error}")
    stored, more = stored_bytes(bundle)
    stages = [s for s in make_stages(cold, warm, costs, stored, limits) if s["kind"] == "graph"]
    report: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "bundle": describe_bundle(bundle, stored),
        "data": "made-up inputs",
        "machine": about | {"load_at_end": machine.describe()["load"]},
        "settings": describe_settings(settings, device, threads),
        "roofline": limits,
        "stages": stages,
        "requests": [],
        "memory": None,
        "cold_start": None,
        "energy": None,
        "rivals": [],
        "notes": [*notes, *more],
    }
    return report | {"metrics": flat_metrics(report)}


def _run_alone(
    bundle: Bundle, role: str, inputs: Mapping[str, NDArray[np.generic]], settings: Settings
) -> tuple[Run, list[Run]]:
    """Load one graph and run it, bound to its arrays as caches are. Returns the load with the first run, and the
    others.
    """
    outputs = made_up_outputs(bundle, bundle.manifest.graphs[role], inputs, settings)
    with deixis.load(bundle.path, settings.device, settings.threads, verify=False) as model:
        engine = model.pipeline.engine
        start = time.perf_counter()
        engine.load(role)
        loaded = time.perf_counter()
        run = engine.bind(role, inputs, outputs)
        runs = []
        for _ in range(1 + settings.warmup_rounds + settings.rounds):
            begin = time.perf_counter()
            run()
            end = time.perf_counter()
            runs.append(Run(begin, end, (), (Span(role, begin, end - begin),)))
        model.close()
    load = Span(LOAD + role, start, loaded - start)
    return Run(start, runs[0].end, (), (load, *runs[0].spans)), runs[1 + settings.warmup_rounds :]


def sizes(bundle: Bundle, settings: Settings) -> dict[str, int]:
    """Of the symbolic dimensions: what the bundle calls usual, with the batch and the new tokens of the settings."""
    usual = {name: limits.opt for name, limits in bundle.manifest.dims.items()}
    rows = {name: settings.batch for name in ("B", "N", "R", "M", "K") if name in usual}
    wanted = usual | rows | {"S": 1, "T": max(usual.get("T", 1), settings.new_tokens + 1)}
    dims = bundle.manifest.dims
    return {name: min(max(size, dims[name].min), dims[name].max) for name, size in wanted.items() if name in dims}


def made_up(bundle: Bundle, graph: Graph, settings: Settings) -> dict[str, NDArray[np.generic]]:
    """Inputs of a graph: numbers around 0, pictures of any colours that fill the input, ids and indices 0."""
    random = np.random.default_rng(settings.seed)
    dims, side = sizes(bundle, settings), float(bundle.manifest.image.size)
    found: dict[str, NDArray[np.generic]] = {}
    for name, tensor in graph.inputs.items():
        shape = [dims[size] if isinstance(size, str) else size for size in tensor.shape]
        if name == "image":
            values = random.uniform(0, 255, shape)
        elif name == "valid_hw":
            values = np.full(shape, side)
        elif name == "encoder_mask":
            values = np.ones(shape)
        elif name == "banned":
            values = np.full(shape, -1)  # no id
        elif name == "boxes":
            values = np.tile([0.25, 0.25, 0.75, 0.75], (*shape[:-1], 1))
        elif tensor.dtype.startswith("float"):
            values = random.standard_normal(shape)
        else:
            values = np.zeros(shape)
        found[name] = np.ascontiguousarray(values, tensor.dtype)
    return found


def made_up_outputs(
    bundle: Bundle, graph: Graph, inputs: Mapping[str, NDArray[np.generic]], settings: Settings
) -> dict[str, NDArray[np.generic]]:
    """Arrays for a graph's outputs; a cache's is its input, as in decoding."""
    dims = sizes(bundle, settings)
    found: dict[str, NDArray[np.generic]] = {}
    for name, tensor in graph.outputs.items():
        cache = name.replace("_out.", ".")
        shape = [dims[size] if isinstance(size, str) else size for size in tensor.shape]
        found[name] = inputs[cache] if cache != name and cache in inputs else np.zeros(shape, tensor.dtype)
    return found
