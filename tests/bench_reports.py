"""A made-up report of `deixis bench`, for the tests of its page and of the documents' tables."""

from __future__ import annotations

from typing import Any


def percentiles(p50: float) -> dict[str, float]:
    return {"p50": p50, "p90": 1.2 * p50, "p99": 1.7 * p50, "mean": 1.05 * p50, "count": 40}


def stage(name: str, p50: float, **other: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "name": name, "kind": "graph", "request": "caption", "calls": 1, "cold_ms": 3 * p50,
        "warm_ms": percentiles(p50),
        "weight_bytes": 5_000_000, "bytes_read": 5_500_000, "flop": 3_000_000_000,
        "bandwidth_share": 0.1, "arithmetic_share": 0.7,
    }  # fmt: skip
    return common | other


def python_stage(name: str, p50: float, **other: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("weight_bytes", "bytes_read", "flop", "bandwidth_share", "arithmetic_share"))
    return stage(name, p50, kind="python", cold_ms=None, **nothing) | other


def request(task: str, p50: float) -> dict[str, Any]:
    return {
        "task": task, "cold_ms": 6 * p50, "warm_ms": percentiles(p50), "processor_ms": percentiles(1.9 * p50),
        "first_token_ms": percentiles(0.7 * p50),
        "per_token_ms": percentiles(2.1), "tokens_per_s": 480.0, "images_per_s": 5.25, "python_us_per_step": 61.5,
    }  # fmt: skip


def rival(name: str, median: float, **other: Any) -> dict[str, Any]:
    ratio = {"median": median, "least": 0.9 * median, "most": 1.15 * median}
    common: dict[str, Any] = {
        "name": name, "part": "decoder_step fp32", "version": "1.2.3", "ms_per_token": percentiles(7 * median),
        "ratio_to_deixis": ratio, "same_output": True, "note": "",
    }  # fmt: skip
    return common | other


def bench_report() -> dict[str, Any]:
    return {
        "format": "deixis-bench",
        "version": 1,
        "metrics": {
            "caption/warm_ms/p50": 190.0, "cold_start/first_result_ms": 1250.0,
            "caption_again/python_us_per_step": 61.5,
        },
        "bundle": {
            "name": "tabletop", "family": "pixelllm", "format": "1.3", "precision": {"sam_encoder": "fp16"},
            "weight_bytes": {"sam_encoder": 12_000_000, "decoder_step": 30_000_000},
        },
        "data": "shipped pictures",
        "machine": {
            "cpu": "A Processor with 2 cores", "cores": 2, "memory_gb": 24.0, "os": "Linux 6", "python": "3.11.9",
            "packages": {"onnxruntime": "1.31.1", "numpy": "2.4.6"},
        },
        "settings": {
            "device": "cpu", "threads": 2, "batch": 1, "prompt_tokens": 8, "new_tokens": 16, "rounds": 5,
            "warmup_rounds": 2, "seed": 0,
        },
        "roofline": {"threads": 2, "read_gb_s": 25.5, "gflop_s": {"fp32": 190.0, "int8": 730.0}},
        "stages": [
            python_stage("preprocess", 8.0),
            stage("semantic_encoder", 40.0, flop=7_600_000_000, bytes_read=30_000_000),
            stage("sam_encoder", 90.0, flop=9_000_000_000, bytes_read=25_000_000),
            stage("prompt_extractor", 2.0, flop=90_000_000, bytes_read=4_000_000),
            stage("text_encoder", 3.0, flop=120_000_000, bytes_read=20_000_000),
            stage("decoder_step", 2.0, calls=16, flop=77_000_000, bytes_read=43_000_000, bandwidth_share=0.86),
            python_stage("postprocess", 0.4),
            stage("mask_decoder", 12.0, request="refer"),
        ],
        "requests": [request("caption", 190.0), request("refer", 150.0)],
        "memory": {
            "before_mb": 60.0, "after_first_mb": 210.0, "after_all_mb": 240.0, "peak_mb": 260.0,
            "first_weight_mb": 30.0, "weight_mb": 42.0,
        },
        "cold_start": {"first_result_ms": 1250.0},
        "energy": None,
        "notes": ["mask_decoder: not counted"],
        "rivals": [
            rival("ctranslate2", 1.45),
            rival("openvino", 1.1, same_output=None, note="runs the same graph"),
            rival("deixis", 1.0),
            {"name": "torch compiled", "part": "image encoder", "version": None, "ratio_to_deixis": None,
             "same_output": None, "note": None, "error": "not installed"},
        ],
    }  # fmt: skip
