"""Every graph of a model in several precisions, side by side: how far each drifts, how long it takes, and bundles that
mix them.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deixis.bundle import Bundle, Manifest, open_bundle
from deixis_export.bundle_parts import (
    GRAPHS,
    Beside,
    ExportOptions,
    Written,
    describe_graph,
    finish,
    save_golden,
    to_numpy,
)
from deixis_export.export import DECODER_WEIGHTS, round_weights, trace_and_write
from deixis_export.families import family_of
from deixis_export.graph_spec import run_torch
from deixis_export.manifest import Contents
from deixis_export.session import Arrays, GraphSession, relative_error
from deixis_export.weights import PrecisionName, WeightFile, has_low

_ROUND_SECONDS = 0.05  # a round runs a graph so often that it takes about this long
_CAPACITY = 64  # of the caches of timed runs, where a model has so many positions


@dataclass(frozen=True)
class Variant:
    """A graph in one precision. drift: largest error against fp32, infinite where a value is not finite."""

    precision: PrecisionName
    path: Path
    external: tuple[str, ...]
    drift: float


class Variants:
    """Graphs of one model, written below `folder` when they are first asked for. A context manager.

    The model is changed as by `export_bundle`; a copy of it holds the weights that fp16 holds.
    """

    def __init__(self, model: nn.Module, folder: Path, seed: int) -> None:
        self.family = family_of(model)  # type: ignore[arg-type]
        self.folder, self._full = folder, model.eval()
        self.specs = self.family.graph_specs(model)
        self._shared = self.family.shared_roles(model)
        self._cases = self.family.cases(model, seed)
        with torch.no_grad():
            self.family.fold(model)
        self._expected = {
            role: [to_numpy(run_torch(spec, model, case[role])) for case in self._cases]
            for role, spec in self.specs.items()
        }
        self._rounded = copy.deepcopy(model)
        round_weights(self._rounded, self.specs, ExportOptions("fp16"))
        self._typical = self.family.make_cases(model, self._typical_sizes(), seed)
        self._made: dict[tuple[str, str], Variant] = {}
        self._stack = ExitStack()
        self._files: dict[str, WeightFile] = {}

    def __enter__(self) -> Variants:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def companions(self, role: str) -> set[str]:
        """The graph itself and those that hold weights of its parts, which are fp32 in all of them or in none."""
        parts = {part for part in self.specs[role].parts if has_low(getattr(self._full, part))}
        return {role} | {other for other, spec in self.specs.items() if parts & set(spec.parts)}

    def get(self, role: str, precision: PrecisionName) -> Variant:
        """A graph in a precision. Raises ExportError where onnxruntime cannot run it."""
        key = (role, precision)
        if key not in self._made:
            self._made[key] = self._write(role, precision)
        return self._made[key]

    def _write(self, role: str, precision: PrecisionName) -> Variant:
        folder = self.folder / precision
        folder.mkdir(exist_ok=True)
        model = self._full if precision == "fp32" else self._rounded
        shared = self._file(folder, precision) if role in self._shared else None
        external = trace_and_write(self.specs[role], model, self._cases[1][role], folder, shared, precision)
        path = folder / f"{role}.onnx"
        with GraphSession(path) as session:
            found = [session.run(to_numpy(case[role])) for case in self._cases]
        drift = max(relative_error(a, e) for a, e in zip(found, self._expected[role], strict=True))
        return Variant(precision, path, external, drift)

    def _file(self, folder: Path, precision: str) -> WeightFile:
        if precision not in self._files:
            self._files[precision] = self._stack.enter_context(WeightFile(folder / DECODER_WEIGHTS))
        return self._files[precision]

    def _typical_sizes(self) -> Any:
        """Sizes of a request as most are: one picture, one row, one new token behind a short text."""
        golden = self.family.sizes[0]
        longest = getattr(self._full.config, "max_caption_length", _CAPACITY)
        usual = {"B": 1, "N": 1, "K": 1, "R": 1, "M": 1, "S": 1, "T": min(_CAPACITY, longest), "L": min(32, longest)}
        names = {field.name for field in dataclasses.fields(golden)}
        return dataclasses.replace(golden, **{name: value for name, value in usual.items() if name in names})

    def times(self, role: str, precisions: list[PrecisionName], rounds: int, threads: int) -> dict[str, float]:
        """Time of a run of a graph relative to fp32, by precision: the median over interleaved rounds."""
        inputs = to_numpy(self._typical[role])
        paths = {name: self.get(role, name).path for name in dict.fromkeys(("fp32", *precisions))}
        with ExitStack() as stack:
            sessions = {name: stack.enter_context(GraphSession(path, threads)) for name, path in paths.items()}
            return interleaved({name: _runner(session, inputs) for name, session in sessions.items()}, rounds)

    @contextmanager
    def bundle(self, chosen: Mapping[str, PrecisionName], tokenizer_json: str, overrides: Any) -> Iterator[Bundle]:
        """A bundle of the graphs as chosen, for as long as the block runs. Its files are links to those of `folder`."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            work, written = Path(name), Written()
            (work / GRAPHS).mkdir()
            (work / "golden").mkdir()
            for role, precision in chosen.items():
                variant = self.get(role, precision)
                place = work / GRAPHS / precision
                place.mkdir(exist_ok=True)
                external = [Path(file).name for file in variant.external]
                for file in (variant.path.name, *external):
                    if not (place / file).exists():
                        os.link(self.folder / precision / file, place / file)
                described = describe_graph(self.specs[role], (), precision)
                written.graphs[role] = dataclasses.replace(
                    described,
                    file=f"{GRAPHS}/{precision}/{role}.onnx",
                    external=tuple(f"{GRAPHS}/{precision}/{file}" for file in external),
                )
            save_golden(work, {})

            def manifest(contents: Contents) -> Manifest:
                return self.family.make_manifest(self._full, overrides, contents)

            finish(work, written, Beside(tokenizer_json, {}, "", ""), manifest)
            yield open_bundle(work, verify_hashes=False)


def _runner(session: GraphSession, inputs: Arrays) -> Callable[[], object]:
    return lambda: session.run(inputs)


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each run relative to those of "fp32" in the same round; the median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    repeats = 1
    for index in range(rounds + 1):
        names = list(runs)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:  # nobody always runs behind the same one
            run = runs[name]
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            seconds[name].append((time.perf_counter() - start) / repeats)
        if index == 0:  # the first runs are slower than the others, and tell how often to run
            repeats = max(1, round(_ROUND_SECONDS / max(min(s[0] for s in seconds.values()), 1e-6)))
    base = np.array(seconds["fp32"][1:])
    return {name: float(np.median(np.array(values[1:]) / base)) for name, values in seconds.items() if name != "fp32"}
