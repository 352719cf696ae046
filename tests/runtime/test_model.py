"""The runtime on onnxruntime and the tiny bundle.

Tasks end to end, batches, streams, engines, memory, broken bundles.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
from pictures import make_picture

import deixis
from deixis import DecodeOptions, Prompt
from deixis.engines import make_engine
from deixis.errors import (
    BundleFormatError,
    BundleIntegrityError,
    BundleNotFoundError,
    ClosedError,
    DeviceError,
    EngineError,
    PromptError,
)
from deixis.model import find_bundle

RUNTIME = Path(deixis.__file__).parents[1]


def pairs_of(model: deixis.Model) -> list:
    scenes = model.encode([make_picture(90, 120, 1), make_picture(130, 60, 2), make_picture(40, 41, 3)])
    prompts = [
        Prompt(),
        Prompt(box=(3, 4, 40, 39)),
        Prompt(points=[(8, 9)]),
        Prompt(box=(10, 10, 30, 35)),
        Prompt(points=[(8, 9), (20, 30)], labels=[1, 0]),
        Prompt(),
    ]
    return [(scenes[i % 3], prompt) for i, prompt in enumerate(prompts)]


def close(a: object, b: object) -> bool:
    """Equal but for the last bits of floats: a batch multiplies the same numbers in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-4, abs=1e-3) if isinstance(a, float) else a == b


@pytest.mark.parametrize("beams", [1, 4])
def test_captions_in_a_batch_equal_one_by_one(tiny_model: deixis.Model, beams: int) -> None:
    pairs, options = pairs_of(tiny_model), DecodeOptions(beams=beams)
    together = tiny_model.caption_batch(pairs, options)
    for (scene, prompt), caption in zip(pairs, together, strict=True):
        alone = scene.caption(prompt.box, prompt.points, prompt.labels, options)
        assert caption.ids == alone.ids and caption.finished == alone.finished
        assert close(caption.to_dict(), alone.to_dict())


@pytest.mark.parametrize("beams", [1, 2])
def test_stream_equals_plain(tiny_model: deixis.Model, beams: int) -> None:
    for scene, prompt in pairs_of(tiny_model):
        stream = tiny_model.stream_caption(scene, prompt, DecodeOptions(beams=beams))
        words = tuple(stream)
        assert words == stream.caption.words
        assert stream.caption == tiny_model.caption_batch([(scene, prompt)], DecodeOptions(beams=beams))[0]


def test_pictures_in_a_batch_equal_one_by_one(tiny_bundle: Path) -> None:
    pictures = [make_picture(90, 120, 1), make_picture(130, 60, 2), make_picture(1, 1, 3)]
    with deixis.load(tiny_bundle, "cpu", threads=1, scene_budget_mb=0) as model:
        for scene, picture in zip(model.encode(pictures), pictures, strict=True):
            alone = model.encode(picture)
            np.testing.assert_allclose(scene.features.fused, alone.features.fused, atol=1e-5)
            np.testing.assert_allclose(scene.features.sam, alone.features.sam, atol=1e-5)


def test_given_texts_in_a_batch_equal_one_by_one(tiny_model: deixis.Model) -> None:
    scenes = [scene for scene, _ in pairs_of(tiny_model)]
    texts = ["the red mug", "mug", "a table", "the mug", "red", "a red table"]
    items = list(zip(scenes, texts, strict=True))
    for batch in (tiny_model.refer_batch, tiny_model.trace_batch):
        for item, found in zip(items, batch(items), strict=True):
            alone = batch([item])[0].to_dict()
            ours = found.to_dict()
            if alone.pop("mask", None) is not None:  # a pixel on the edge of a random mask may go either way
                ours.pop("mask")
                here, there = found.mask.array, batch([item])[0].mask.array
                assert (here != there).mean() < 1e-3
            assert close(ours, alone)
    prompts = [pair for pair in pairs_of(tiny_model) if not pair[1].is_whole]
    for (scene, prompt), found in zip(prompts, tiny_model.segment_batch(prompts), strict=True):
        alone = scene.segment(prompt.box, prompt.points, prompt.labels)
        assert found.score == pytest.approx(alone.score, abs=1e-5)
        assert (found.mask.array != alone.mask.array).mean() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2), (128, 128)])
def test_any_shape_of_picture(tiny_model: deixis.Model, size: tuple[int, int]) -> None:
    scene = tiny_model.encode(make_picture(*size, seed=4))
    height, width = size
    assert scene.size == size
    assert scene.caption(box=(0, 0, width, height)).box == (0, 0, width, height)
    left, top, right, bottom = scene.refer("mug").box
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    assert scene.segment(points=[(width / 2, height / 2)]).mask.array.shape == size
    assert tiny_model.caption_batch([(scene, None)])[0] == scene.caption()


def test_empty_batches(tiny_model: deixis.Model) -> None:
    assert tiny_model.encode([]) == [] and tiny_model.caption_batch([]) == [] and tiny_model.refer_batch([]) == []
    assert tiny_model.trace_batch([]) == [] and tiny_model.segment_batch([]) == []


def test_a_caption_and_its_trace_agree(tiny_model: deixis.Model) -> None:
    """The places read while generating are those of the same words given (instructions of both tasks are the same)."""
    tasks = tiny_model.manifest.tasks
    assert tasks["caption"].instruction == tasks["trace"].instruction
    compared = 0
    for seed in range(6):
        scene = tiny_model.encode(make_picture(90, 120, seed))
        caption = scene.caption()
        if not caption.finished or tiny_model.pipeline.tokenizer.encode(caption.text).ids != caption.ids:
            continue
        for word, given in zip(caption.words, scene.trace(caption.text).words, strict=True):
            assert (word.text, word.start, word.end) == (given.text, given.start, given.end)
            np.testing.assert_allclose(word.points, given.points, atol=1e-3)
            compared += 1
    assert compared > 0


def test_no_graph_is_loaded_before_it_is_needed(
    tiny_bundle: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deixis.load(tiny_bundle, "cpu", threads=1) as model:
        assert model.info.loaded_graphs == ()
        model.encode(picture).segment(box=(5, 5, 50, 50))
        assert model.info.loaded_graphs == ("mask_decoder", "sam_encoder", "semantic_encoder")
        ran: list[str] = []
        run, bind = model.pipeline.engine.run, model.pipeline.engine.bind
        monkeypatch.setattr(model.pipeline.engine, "run", lambda role, *a: (ran.append(role), run(role, *a))[1])
        monkeypatch.setattr(model.pipeline.engine, "bind", lambda role, *a: (ran.append(role), bind(role, *a))[1])
        model.warmup()
        assert set(ran) == set(model.manifest.graphs)
        assert set(model.info.loaded_graphs) == set(model.manifest.graphs)
        assert (model.info.device, model.info.threads) == ("cpu", 1)
        assert model.info.cache_capacity == model.manifest.caches.default_capacity


def test_many_threads_get_what_one_gets(tiny_model: deixis.Model) -> None:
    pairs = pairs_of(tiny_model)
    alone = [tiny_model.caption_batch([pair])[0] for pair in pairs]
    found: dict[int, list] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: [tiny_model.caption_batch([p])[0] for p in pairs]}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[n] == alone for n in range(4))


def test_close_gives_memory_back(tiny_bundle: Path) -> None:
    """Sessions and scenes go at once; over many loads the process does not grow."""
    process = psutil.Process()

    def once() -> tuple[weakref.ref, weakref.ref]:
        model = deixis.load(tiny_bundle, "cpu", threads=1, verify=False)
        scene = model.encode(make_picture(90, 120, 0))
        scene.caption(options=DecodeOptions(max_new_tokens=2))
        features = weakref.ref(scene.features)
        session = weakref.ref(model.pipeline.engine._sessions["decoder_step"])  # type: ignore[attr-defined]
        model.close()
        assert features() is None and session() is None  # while model and scene are still held
        with pytest.raises(ClosedError):
            scene.caption()
        return features, session

    for _ in range(3):
        once()
    before = process.memory_info().rss
    for _ in range(10):
        once()
    assert process.memory_info().rss - before < 5e6

    models = [deixis.load(tiny_bundle, "cpu", threads=1, verify=False) for _ in range(5)]
    for model in models:
        model.warmup()
    held = process.memory_info().rss - before
    for model in models:
        model.close()
    assert held > 20e6
    if platform.libc_ver()[0] == "glibc":  # elsewhere the C library decides when to give back small blocks
        assert process.memory_info().rss - before < held / 4


def test_devices_are_used_or_refused(tiny_bundle: Path) -> None:
    for device, message in (("gpu", "unknown device 'gpu'"), ("tensorrt", "not served")):
        with pytest.raises(DeviceError, match=message):
            deixis.load(tiny_bundle, device=device)
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(DeviceError, match="deixis\\[gpu\\]"):
            deixis.load(tiny_bundle, device="cuda")
        with deixis.load(tiny_bundle, device="auto") as model:
            assert model.info.device == "cpu"


def test_no_onnxruntime(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match='pip install "deixis\\[cpu\\]"'):
        deixis.load(tiny_bundle)


@pytest.mark.parametrize(
    "bad",
    [{"threads": 0}, {"threads": 1.5}, {"cache_capacity": 0}, {"cache_capacity": 10**6}, {"scene_budget_mb": -1}],
)
def test_load_options_are_checked(tiny_bundle: Path, bad: dict) -> None:
    with pytest.raises(PromptError):
        deixis.load(tiny_bundle, device="cpu", **bad)


def test_damaged_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    graph = broken / "graphs" / "prompt_extractor.onnx"
    data = bytearray(graph.read_bytes())
    data[:64] = bytes(64)
    graph.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match="prompt_extractor"):
        deixis.load(broken, device="cpu")
    with deixis.load(broken, device="cpu", verify=False) as model:
        scene = model.encode(make_picture(20, 20, 0))
        with pytest.raises(EngineError, match="prompt_extractor") as caught:
            scene.caption()
        assert "\n" not in str(caught.value)
    tokenizer = broken / "tokenizer" / "tokenizer.json"
    size = tokenizer.stat().st_size
    tokenizer.write_bytes(b"{" + b" " * (size - 1))
    with pytest.raises(BundleFormatError, match="tokenizer"):
        deixis.load(broken, device="cpu", verify=False)


def test_other_families_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_bundle, foreign)
    manifest = foreign / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pixelllm"', '"other"'))
    with pytest.raises(BundleFormatError, match="'other'"):
        deixis.load(foreign, device="cpu")


def test_names_of_bundles(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "mine")
    monkeypatch.setenv("DEIXIS_MODELS", os.pathsep.join([str(tmp_path / "none"), str(tmp_path)]))
    assert find_bundle("mine") == tmp_path / "mine"
    monkeypatch.delenv("DEIXIS_MODELS")
    with pytest.raises(BundleNotFoundError, match=r"no bundle named 'mine'.*DEIXIS_MODELS"):
        find_bundle("mine")
    monkeypatch.chdir(tmp_path)
    assert find_bundle("mine") == Path("mine")
    with pytest.raises(BundleNotFoundError):
        deixis.load(tmp_path / "not there")


def test_engine_reports_a_wrong_input(tiny_bundle: Path) -> None:
    engine = make_engine(deixis.open_bundle(tiny_bundle), "cpu", 1)
    with pytest.raises(EngineError, match="text_encoder failed"):
        engine.run("text_encoder", {"context_ids": np.zeros((1, 2), np.int64)})
    with pytest.raises(EngineError, match="contiguous"):
        engine.bind("text_encoder", {"context_ids": np.zeros((4, 4), np.int64)[:, ::2]}, {})


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(RUNTIME)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.strip()


def test_imports_stay_light() -> None:
    heavy = "sorted({'numpy', 'cv2', 'tokenizers', 'onnxruntime', 'torch'} & set(sys.modules))"
    assert run_python(f"import sys, deixis, deixis.bundle; print({heavy})") == "[]"
    assert run_python(f"import sys, deixis; deixis.load; print({heavy})") == "['cv2', 'numpy', 'tokenizers']"
    timed = "import time; t = time.perf_counter(); import deixis; print(time.perf_counter() - t)"
    assert min(float(run_python(timed)) for _ in range(3)) < 0.5


def test_every_public_name_exists() -> None:
    for name in deixis.__all__:
        assert getattr(deixis, name) is not None
    assert set(deixis.__all__) <= set(dir(deixis))
    with pytest.raises(AttributeError):
        _ = deixis.nothing  # type: ignore[attr-defined]
