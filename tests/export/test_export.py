"""Whole exports: precisions, parity records, and what a failure leaves behind (nothing)."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from exporting import TINY, export

from deixis.bundle import Bundle, open_bundle
from deixis.errors import ExportError
from deixis_export import bundle_parts, cli
from deixis_export import export as exporting
from deixis_export.cases import golden_arrays
from deixis_export.presets import random_model, random_tokenizer
from deixis_export.trace import TracedGraph
from deixis_train.checkpoint import save_checkpoint

ROLES = [
    "semantic_encoder",
    "sam_encoder",
    "prompt_extractor",
    "text_encoder",
    "decoder_step",
    "decoder_pass",
    "mask_adapter",
    "mask_decoder",
]
CHAIN = {f"chain/{name}" for name in ("greedy_ids", "pass_features", "pass_locations", "masks", "iou")}


def test_parity_is_in_the_manifest(bundle: Bundle) -> None:
    parity = bundle.manifest.parity
    assert set(parity) == {f"graph/{role}" for role in ROLES} | CHAIN
    assert all(record.error <= record.tolerance for record in parity.values())
    assert max(parity[f"graph/{role}"].error for role in ROLES) < 1e-5
    assert parity["chain/greedy_ids"].tolerance == 0


def test_fp16_stores_half_and_computes_in_single(tmp_path: Path, bundle: Bundle) -> None:
    half = export(tmp_path / "half", "fp16")
    size, full = (
        sum(info.bytes for name, info in b.manifest.files.items() if "graphs" in name) for b in (half, bundle)
    )
    assert size < 0.7 * full
    for role, graph in half.manifest.graphs.items():
        assert graph.precision.weights == "fp16" and graph.precision.compute == "fp32"
        found = onnx.load(half.file(graph.file)).graph
        large = [item for item in found.initializer if item.data_type == onnx.TensorProto.FLOAT]
        assert all(np.prod(item.dims) < 20_000 for item in large), role
        assert half.manifest.parity[f"graph/{role}"].error < 1e-5
        assert 0 < half.manifest.parity[f"drift/{role}"].error < 1e-2
    assert half.manifest.parity["chain/greedy_ids"].error == 0


def test_int8_records_what_it_costs(tmp_path: Path) -> None:
    small = export(tmp_path / "int8", "int8")
    for role in ROLES:
        assert 0 < small.manifest.parity[f"graph/{role}"].error < 0.1, role
        found = onnx.load(small.file(small.manifest.graphs[role].file)).graph
        assert any(node.op_type == "MatMulInteger" for node in found.node), role
        assert {node.domain for node in found.node} == {""}, role


def test_golden_vectors_cover_every_tensor(bundle: Bundle) -> None:
    with np.load(bundle.file(bundle.manifest.golden), allow_pickle=False) as arrays:
        names = {re.sub(r"/out\[::\d+\]/", "/out/", name) for name in arrays.files}  # large outputs are sampled
    expected = set()
    for role, graph in bundle.manifest.graphs.items():
        given = [name for name, info in graph.outputs.items() if info.dtype.startswith("float")]  # ids are no numbers
        expected |= {f"{role}/in/{name}" for name in graph.inputs} | {f"{role}/out/{name}" for name in given}
    assert names == expected


def test_very_large_golden_outputs_are_sampled() -> None:
    value = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    arrays = golden_arrays("role", {}, {"map": value})
    assert list(arrays) == ["role/out[::25]/map"]
    np.testing.assert_allclose(arrays["role/out[::25]/map"], value.ravel()[::25].astype(np.float16))


def test_a_graph_that_differs_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = exporting.trace

    def spoiled(spec, model, inputs) -> TracedGraph:  # type: ignore[no-untyped-def]
        traced = original(spec, model, inputs)
        if spec.role == "text_encoder":
            name = max(traced.constants, key=lambda key: traced.constants[key].size)
            traced.constants[name] = traced.constants[name] * np.float32(1.01)
        return traced

    monkeypatch.setattr(exporting, "trace", spoiled)
    with pytest.raises(ExportError, match="graph/text_encoder differs"):
        export(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_nan_fails_the_export(tmp_path: Path) -> None:
    model = random_model(TINY)
    model.visual_projection[0].bias.data[0] = float("nan")
    with pytest.raises(ExportError, match="graph/prompt_extractor"):
        exporting.export_bundle(model, tmp_path / "bundle", tokenizer_json=random_tokenizer(TINY.t5.vocab))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), ExportError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_full_disk_or_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    written = []

    def write(traced, path, weights=None) -> None:  # type: ignore[no-untyped-def]
        written.append(path)
        path.write_bytes(b"half a graph")
        if len(written) == 1:
            raise error

    monkeypatch.setattr(exporting, "write_graph", write)
    with pytest.raises(expected):
        export(tmp_path / "bundle")
    assert written and not list(tmp_path.iterdir())


def test_a_failed_export_keeps_the_old_bundle(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "bundle"
    bundle_copy = export(target)
    monkeypatch.setattr(bundle_parts, "GRAPH_TOLERANCE", 0.0)
    with pytest.raises(FileExistsError):
        export(target)
    with pytest.raises(ExportError):
        export(target, force=True)
    assert open_bundle(target).manifest == bundle_copy.manifest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_unknown_tasks_and_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="task 'sing'"):
        export(tmp_path / "bundle", tasks={"sing": {}})
    with pytest.raises(ExportError, match="unknown field 'beam'"):
        export(tmp_path / "bundle", tasks={"caption": {"beam": 1}})
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "checkpoint", tmp_path / "bundle"
    save_checkpoint(
        source,
        random_model(TINY),
        random_tokenizer(TINY.t5.vocab),
        {"caption": {"instruction": "a picture of", "beams": 1}},
        documents={"MODEL_CARD.md": "# A card\n", "NOTICE": "Thanks\n"},
    )
    assert cli.main([str(source), "--out", str(out), "--precision", "fp16"]) == 0
    assert "8 graphs" in capsys.readouterr().out
    manifest = open_bundle(out).manifest
    assert manifest.tasks["caption"].instruction == "a picture of" and manifest.tasks["caption"].beams == 1
    assert (out / "MODEL_CARD.md").read_text() == "# A card\n" and "NOTICE" in manifest.files
    assert manifest.provenance.source.startswith("checkpoint (sha256 ")
    assert cli.main([str(source), "--out", str(out)]) == 1  # it exists
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--out", "x"], 2, "name a checkpoint"),
        (["c", "--out", "x", "--random"], 2, "go together"),
        (["--out", "x", "--random", "--preset", "huge"], 1, "unknown preset 'huge'"),
        (["nowhere", "--out", "x"], 1, "this is not a checkpoint"),
        (["c", "--out", "x", "--precision", "int4"], 2, "int4"),
    ],
)
def test_bad_use_is_one_line(
    arguments: list[str], code: int, text: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    try:
        found = cli.main(arguments)
    except SystemExit as stop:
        found = stop.code
    err = capsys.readouterr().err
    assert found == code and text in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # 1.2 billion weights: 20 to 40 minutes on two cores
def test_the_large_preset_exports_and_verifies_within_20_gib(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from deixis.cli import main as runtime\n"
        "from deixis_export.cli import main\n"
        "out = sys.argv[1]\n"
        "assert main(['--preset', 'large', '--random', '--precision', 'fp16', '--out', out]) == 0\n"
        "assert runtime(['verify', out, '--device', 'cpu']) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bundle")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 20 << 30
