"""The parts of `deixis bench` that count: percentiles, costs of operators, energy, memory, comparison."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model

import deixis
from deixis.timing import LOAD, Span
from deixis_bench.bench import cli, energy, machine, roofline
from deixis_bench.bench.compare import compare, verdict
from deixis_bench.bench.graph_cost import cost_of_operators, operations
from deixis_bench.bench.ort_probe import ProbeError, profile, stored_bytes
from deixis_bench.bench.percentiles import summary
from deixis_bench.bench.report import make_stages
from deixis_bench.bench.rounds import Run
from deixis_bench.bench.settings import make_pictures, region, text_of

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"
NO_ROOFLINE = {"read_gb_s": None, "gflop_s": {"fp32": None, "int8": None}}


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_percentiles_lie_between_the_times(seconds: list[float]) -> None:
    found = summary(seconds)
    values = [found[name] for name in ("least", "p50", "p90", "p99", "most")]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert found["least"] == pytest.approx(1000 * min(seconds)) and found["most"] == pytest.approx(1000 * max(seconds))
    assert found["count"] == len(seconds) and found["mean"] == pytest.approx(1000 * math.fsum(seconds) / len(seconds))


def test_percentiles_are_interpolated() -> None:
    found = summary([0.001 * n for n in range(1, 12)])  # 1 to 11 ms
    assert (found["p50"], found["p90"], found["p99"]) == pytest.approx((6.0, 10.0, 10.9))
    with pytest.raises(ValueError, match="no times"):
        summary([])


def operator(name: str, inputs: list[list[int]], outputs: list[list[int]], **sizes: int) -> dict[str, Any]:
    return {
        "op_name": name,
        "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": shape} for shape in outputs],
        "parameter_size": str(sizes.get("parameters", 0)),
        "output_size": str(sizes.get("output", 0)),
    }


@pytest.mark.parametrize(
    ("what", "flop"),
    [
        (operator("MatMul", [[2, 3, 5], [5, 7]], [[2, 3, 7]]), 2 * 2 * 3 * 5 * 7),
        (operator("MatMul", [[2, 4, 3, 5], [2, 4, 5, 6]], [[2, 4, 3, 6]]), 2 * 2 * 4 * 3 * 5 * 6),
        (operator("MatMulNBits", [[1, 1, 64], [10, 2, 16]], [[1, 1, 10]]), 2 * 64 * 10),
        (operator("Gemm", [[3, 5], [7, 5], [7]], [[3, 7]]), 2 * 3 * 5 * 7),
        (operator("Conv", [[1, 8, 10, 10], [16, 8, 3, 3], [16]], [[1, 16, 5, 5]]), 2 * 16 * 25 * 8 * 9),
        (operator("Conv", [[1, 8, 10, 10], [8, 1, 3, 3]], [[1, 8, 10, 10]]), 2 * 8 * 100 * 9),  # depthwise
        (operator("ConvTranspose", [[1, 8, 4, 4], [8, 3, 2, 2]], [[1, 3, 8, 8]]), 2 * 8 * 16 * 3 * 4),
        (operator("MultiHeadAttention", [[2, 5, 32], [2, 9, 32], [2, 9, 32]], [[2, 5, 32]]), 4 * 2 * 5 * 32 * 9),
        (operator("Softmax", [[4, 4]], [[4, 4]]), 0),
    ],
)
def test_operations_of_operators(what: dict[str, Any], flop: int) -> None:
    assert operations(what) == flop


def test_a_table_that_is_looked_up_counts_its_rows() -> None:
    table = operator("Gather", [[1000, 8], [1, 2]], [[1, 2, 8]], parameters=32_000, output=64)
    product = operator("MatMulInteger", [[2, 8], [8, 4]], [[2, 4]], parameters=32)
    cost = cost_of_operators([table, product])
    assert cost.bytes_read == 64 + 32 and cost.flop == 2 * 2 * 8 * 4 and cost.int8


def test_a_graph_is_counted_as_it_is_run(tmp_path: Path) -> None:
    """Weights stored in 16 bits and widened: two bytes each in the file, four when they are read."""
    weights = np.ones((6, 4), np.float16)
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["a", "wide"], ["c"]),
    ]
    graph = helper.make_graph(
        nodes,
        "widened",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ("rows", 6))],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, ("rows", 4))],
        [numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "graph.onnx"
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    assert stored_bytes(path) == 6 * 4 * 2
    cost = cost_of_operators(profile(path, {"a": np.ones((3, 6), np.float32)}))
    assert cost.bytes_read == 6 * 4 * 4 and cost.flop == 2 * 3 * 6 * 4 and not cost.int8
    assert list(tmp_path.iterdir()) == [path]  # no profile stays behind
    with pytest.raises(ProbeError, match="cannot be profiled"):
        profile(path, {"a": np.ones((3, 5), np.float32)})
    with pytest.raises(ProbeError, match="cannot be read"):
        stored_bytes(TINY / "manifest.json")


def test_the_whole_buffer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that stands still but for one second a run: the rate is the size."""
    monkeypatch.setattr(roofline, "_seconds", lambda read, threads: 1.0)
    assert set(roofline.read_rates(1 << 20, 3, 2).values()) == {float(1 << 20)}
    seen: list[tuple[int, int]] = []
    monkeypatch.undo()
    monkeypatch.setattr(roofline, "_memchr", lambda: lambda address, _byte, size: seen.append((address, size)))
    roofline.read_rates(8 * 1000 + 5, 3, 1)
    seen.sort()
    assert len(seen) == 3 and sum(size for _, size in seen) == 8000
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(seen))


def test_the_byte_that_is_looked_for_is_not_there() -> None:
    find = roofline._memchr()
    if find is None:
        pytest.skip("this system's C library is not found")
    buffer = np.ones(4096, np.uint8)
    assert find(buffer.ctypes.data, roofline.ABSENT, len(buffer)) is None
    buffer[1234] = roofline.ABSENT
    assert find(buffer.ctypes.data, roofline.ABSENT, len(buffer)) == buffer.ctypes.data + 1234


def test_the_better_of_two_rooflines() -> None:
    first = {"read_gb_s": 10.0, "read_by": "memchr", "gflop_s": {"fp32": 50.0, "int8": None}}
    second = {"read_gb_s": 12.0, "read_by": "numpy max", "gflop_s": {"fp32": 40.0, "int8": 90.0}}
    both = roofline.better(first, second)
    assert both == {"read_gb_s": 12.0, "read_by": "numpy max", "gflop_s": {"fp32": 50.0, "int8": 90.0}}


def test_what_loads_is_cold_and_no_stage_of_its_own() -> None:
    spans = (Span("preprocess", 0.0, 1.0), Span(LOAD + "encoder", 1.0, 4.0), Span("encoder", 5.0, 2.0))
    cold = Run(0.0, 8.0, (), spans)
    warm = Run(10.0, 14.0, (), (Span("preprocess", 10.0, 1.0), Span("encoder", 11.5, 2.0)))
    assert warm.stages() == {"preprocess": [1.0], "encoder": [2.0], "postprocess": [0.5], "python": [0.5]}
    assert sum(sum(values) for values in cold.stages().values()) + 4.0 == cold.seconds
    stages = {
        row["name"]: row for row in make_stages({"encode": cold}, {"encode": [warm]}, {}, {"encoder": 5}, NO_ROOFLINE)
    }
    assert list(stages) == ["preprocess", "encoder", "postprocess", "python"]
    assert stages["encoder"]["cold_ms"] == 6000 and stages["encoder"]["warm_ms"]["p50"] == 2000
    assert stages["encoder"]["weight_bytes"] == 5 and stages["encoder"]["bandwidth_share"] is None


def test_python_between_tokens() -> None:
    spans = (Span("decoder_step", 0.0, 1.0), Span("decoder_step", 1.5, 2.0), Span("decoder_step", 4.0, 1.0))
    run = Run(0.0, 5.5, (1.1, 3.7, 5.2), spans)
    assert run.per_token() == pytest.approx([2.6, 1.5])
    assert run.python_per_step() == pytest.approx([0.6, 0.5])


def test_joules_of_rails(tmp_path: Path) -> None:
    hwmon = tmp_path / "1-0040" / "hwmon" / "hwmon3"
    hwmon.mkdir(parents=True)
    for number, name, millivolts, milliamperes in ((1, "VDD_IN", 5000, 2000), (2, "VDD_CPU", 1000, 500)):
        (hwmon / f"in{number}_label").write_text(f"{name}\n")
        (hwmon / f"in{number}_input").write_text(f"{millivolts}\n")
        (hwmon / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (hwmon / "in3_label").write_text("sum of shunt voltages\n")  # has no current
    assert [name for name, *_ in energy.find_rails(tmp_path)] == ["VDD_IN", "VDD_CPU"]
    meter = energy._jetson(tmp_path)
    assert meter is not None and "VDD_IN" in meter.source and "VDD_CPU" not in meter.source
    begin, before = time.perf_counter(), meter.joules()
    time.sleep(0.03)
    used, seconds = meter.joules() - before, time.perf_counter() - begin
    meter.close()
    assert 0 < used <= 10.0 * seconds  # 10 W, whatever the clock did
    assert energy._jetson(tmp_path / "none") is None


def test_joules_of_a_counter(tmp_path: Path) -> None:
    for zone, value in (("intel-rapl:0", 5_000_000), ("intel-rapl:0:0", 1), ("intel-rapl:1", 2_000_000)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
    meter = energy._rapl(tmp_path)
    assert meter is not None and meter.joules() == 7.0  # packages, without the cores that are part of one
    assert energy._rapl(tmp_path / "none") is None


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["cores"] >= found["cores_allowed"] >= 1 and found["deixis"] == deixis.__version__
    assert machine.memory_bytes() >= machine.free_memory_bytes() >= 0
    json.dumps(found, allow_nan=False)


def test_pictures_differ_and_stay() -> None:
    first, second = make_pictures(2, 0)
    assert first.shape == (480, 640, 3) and first.dtype == np.uint8 and not (first == second).all()
    assert (make_pictures(3, 0)[1] == second).all() and not (make_pictures(1, 1)[0] == first).all()
    assert region((100, 200)) == (50.0, 25.0, 150.0, 75.0)


@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_texts_of_a_length(tokens: int) -> None:
    with deixis.load(TINY, device="cpu", threads=1) as model:
        assert len(model.pipeline.tokenizer.encode(text_of(model.pipeline, tokens)).ids) == tokens


def report(metrics: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"format": "deixis-bench", "version": 1, "metrics": metrics, **more}


def test_comparison_of_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = report(
        {
            "caption/warm_ms/p50": 10.0,
            "caption/warm_ms/p99": 20.0,
            "caption/tokens_per_s": 5.0,
            "a/flop": 0.0,
            "b/x": 1.0,
        },
        settings={"threads": 1, "rounds": 3},
    )
    second = report(
        {
            "caption/warm_ms/p50": 5.0,
            "caption/warm_ms/p99": 5.0,
            "caption/tokens_per_s": 4.0,
            "a/flop": 0.0,
            "c/x": 1.0,
        },
        settings={"threads": 2, "rounds": 3},
    )
    found = compare(first, second)
    assert found["ratios"] == {"caption/warm_ms/p50": 0.5, "caption/warm_ms/p99": 0.25, "caption/tokens_per_s": 0.8}
    assert found["changed"] == {"settings.threads": (1, 2)}
    assert (found["only_first"], found["only_second"]) == (["b/x"], ["c/x"])
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, one in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(one))
    assert cli.main(["--compare", *map(str, paths), "--json", str(tmp_path / "c.json")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["caption/warm_ms/p50", "10", "5", "0.500", "better"] in lines
    assert ["caption/tokens_per_s", "5", "4", "0.800", "worse"] in lines
    assert ["changed:", "settings.threads:", "1", "->", "2"] in lines
    assert json.loads((tmp_path / "c.json").read_text())["ratios"] == found["ratios"]


@pytest.mark.parametrize(
    ("metric", "ratio", "said"),
    [
        ("decoder_step/bandwidth_share", 1.2, "better"),
        ("decoder_step/bytes_read", 0.5, ""),
        ("memory/peak_mb", 1.5, "worse"),
        ("memory/peak_mb", 1.01, ""),
        ("roofline/read_gb_s", 2.0, ""),
        ("encode/images_per_s", 0.5, "worse"),
    ],
)
def test_what_is_better(metric: str, ratio: float, said: str) -> None:
    assert verdict(metric, ratio) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("[]", "not a report"), (json.dumps(report({}) | {"version": 2}), "report version 2")],
)
def test_what_is_no_report_is_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert cli.main(["--compare", str(path), str(path)]) == 1
    assert f"{path}: {said}" in capsys.readouterr().err
