"""The tiny bundle in the repository is what its generator makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from deixis.bundle import open_bundle
from deixis_export.session import GraphSession, relative_error
from make_tiny_bundle import TINY_BUNDLE, make_tiny_bundle


def test_regenerating_gives_the_same_bundle(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "tiny_bundle")
    kept, made = open_bundle(TINY_BUNDLE), open_bundle(tmp_path / "tiny_bundle")
    for field in ("format", "model", "graphs", "dims", "caches", "image", "tokenizer", "prompts", "tasks", "mask"):
        assert getattr(kept.manifest, field) == getattr(made.manifest, field), field
    assert set(kept.manifest.parity) == set(made.manifest.parity)
    assert set(kept.manifest.files) == set(made.manifest.files)
    # Other versions of the exporter may name nodes otherwise; the numbers must stay.
    with np.load(kept.file(kept.manifest.golden), allow_pickle=False) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    for role, graph in made.manifest.graphs.items():
        inputs = {name: golden[f"{role}/in/{name}"].astype(info.dtype) for name, info in graph.inputs.items()}
        with GraphSession(made.file(graph.file), threads=1) as session:
            found = session.run(inputs)
        expected = {}
        for name in graph.outputs:
            stride = next((k for k in range(1, 99, 2) if f"{role}/{_out(k)}/{name}" in golden), 0)
            assert stride or name == "top_ids", name  # all but ids are stored, large ones as every k-th value
            if stride:
                expected[name] = golden[f"{role}/{_out(stride)}/{name}"]
                found[name] = found[name] if stride == 1 else found[name].ravel()[::stride]
        found = {name: found[name] for name in expected}
        half = any(value.dtype == np.float16 for value in expected.values())
        assert relative_error(found, expected) < (1e-3 if half else 1e-5), role


def _out(stride: int) -> str:
    return "out" if stride == 1 else f"out[::{stride}]"


def test_it_is_small() -> None:
    manifest = open_bundle(TINY_BUNDLE).manifest
    assert sum(info.bytes for info in manifest.files.values()) < 1_700_000


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "a")
    make_tiny_bundle(tmp_path / "b")
    a, b = open_bundle(tmp_path / "a").manifest, open_bundle(tmp_path / "b").manifest
    assert dataclasses.replace(a, parity={}) == dataclasses.replace(b, parity={})
    assert onnx.load(tmp_path / "a" / "graphs" / "decoder_step.onnx").producer_name == "deixis"
