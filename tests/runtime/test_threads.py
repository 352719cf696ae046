"""Threads: those of graph runs (how many, where), and those of users who share a model."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pictures import make_picture

import deixis
from deixis import DecodeOptions, Prompt, scheduling
from deixis.cli import main
from deixis.engines import make_engine
from deixis.errors import ClosedError, PromptError
from deixis.scheduling import make_scheduling, usable_cores

GLAMM = Path(__file__).parents[1] / "golden" / "tiny_glamm"
SHORT = DecodeOptions(max_new_tokens=4)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of threads")


def inputs_of(bundle: deixis.Bundle, role: str) -> dict[str, np.ndarray]:
    """Zeros of the smallest shapes."""
    return {
        name: np.zeros([size if isinstance(size, int) else 1 for size in tensor.shape], tensor.dtype)
        for name, tensor in bundle.manifest.graphs[role].inputs.items()
    }


def allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def test_threads_sleep_and_go_anywhere_unless_told(tiny_bundle: Path) -> None:
    with deixis.load(tiny_bundle, "cpu") as model:
        assert (model.info.threads, model.info.spin, model.info.cores) == (usable_cores(), False, ())
    with deixis.load(tiny_bundle, "cpu", threads=3, spin=True) as model:
        assert (model.info.threads, model.info.spin, model.info.cores) == (3, True, ())


@LINUX
def test_cores_pin_the_threads_of_graph_runs(tiny_bundle: Path) -> None:
    """Each but the first, which is the caller's."""
    if len(allowed()) < 2:
        pytest.skip("needs two processors")

    def places() -> dict[str, str]:
        tasks = Path("/proc/self/task").iterdir()
        return {task.name: (task / "status").read_text().split("Cpus_allowed_list:")[1].split()[0] for task in tasks}

    first, second = allowed()[:2]
    before = places()
    with deixis.load(tiny_bundle, "cpu", cores=[first, second]) as model:
        assert (model.info.threads, model.info.cores) == (2, (first, second))
        model.pipeline.engine.load("prompt_extractor")
        assert [place for task, place in places().items() if task not in before] == [str(second)]
        assert places()[str(threading.get_native_id())] == before[str(threading.get_native_id())]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cores": []}, r"found \[\]"),
        ({"cores": "0,1"}, "such as"),
        ({"cores": [0.5]}, r"found \[0.5\]"),
        ({"cores": [-1]}, r"found \[-1\]"),
        ({"cores": [True]}, "found"),
        ({"cores": [0, 0]}, "twice"),
        ({"cores": [99999]}, r"\[99999\] are not among"),
        ({"cores": [0], "threads": 2}, "2 threads do not fit 1 cores"),
        ({"spin": 1}, "spin must be True or False"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_nonsense_is_told_in_one_line(
    tiny_bundle: Path, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "_processors", lambda: {0, 1})
    with pytest.raises(PromptError, match=message) as caught:
        deixis.load(tiny_bundle, "cpu", **options)
    assert "\n" not in str(caught.value)


def test_an_engine_without_threads_refuses_to_pin_them(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        device, threads = "cpu", 0

    monkeypatch.setattr("deixis.model.make_engine", lambda *a: Plain())
    with pytest.raises(PromptError, match="do not apply to device 'cpu'"):
        deixis.load(tiny_bundle, spin=True)


def test_the_command_line_takes_cores(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "_processors", lambda: {0, 1, 2, 3})
    seen: list[object] = []
    monkeypatch.setattr("deixis.cli.checks.make_engine", lambda *a: (seen.append(a[2]), make_engine(*a))[1])
    assert main(["verify", str(tiny_bundle), "--device", "cpu", "--cores", "0-1,3", "--json", "/nowhere/at/all"]) != 0
    assert "there is no folder" in capsys.readouterr().err and not seen
    for text, message in (("0-1,3,99", "cores [99] are not among"), ("1-0", "not a list"), ("a", "not a list")):
        try:
            code = main(["verify", str(tiny_bundle), "--device", "cpu", "--cores", text])
        except SystemExit as ended:
            code = ended.code
        errors = capsys.readouterr().err
        assert code and message in errors and errors.count("\n") == 1


def test_one_thread_per_core_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors of one core count once; affinity and the cgroup's quota bound the number."""
    for number, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")):
        (tmp_path / str(number)).write_text(f"{siblings}\n")
    monkeypatch.setattr(scheduling, "_SIBLINGS", str(tmp_path / "{}"))
    monkeypatch.setattr(scheduling, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(scheduling, "_processors", lambda: set(range(8)))
    assert usable_cores() == 4
    monkeypatch.setattr(scheduling, "_processors", lambda: {0, 4, 5})
    assert usable_cores() == 2
    monkeypatch.setattr(scheduling, "_processors", lambda: set(range(8)))
    for quota, expected in (("max 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("900000 100000", 4)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert usable_cores() == expected
    monkeypatch.setattr(scheduling, "_processors", lambda: None)
    assert usable_cores() == 0
    assert make_scheduling().threads == 0


def test_a_graph_in_memory_waits_for_no_other(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread loads a graph, others load and run theirs; a graph that several need is loaded once."""
    bundle = deixis.open_bundle(tiny_bundle)
    engine = make_engine(bundle, "cpu", 1)
    inputs = inputs_of(bundle, "text_encoder")
    opened: list[str] = []
    started, release = threading.Event(), threading.Event()
    real = engine._open  # type: ignore[attr-defined]

    def slow(role: str, device: str) -> object:
        opened.append(role)
        if role == "sam_encoder":
            started.set()
            assert release.wait(60)
        return real(role, device)

    monkeypatch.setattr(engine, "_open", slow)
    loading = [threading.Thread(target=engine.load, args=("sam_encoder",)) for _ in range(3)]
    for thread in loading:
        thread.start()
    assert started.wait(60)
    engine.run("text_encoder", inputs)  # else this would wait for ever
    assert engine.loaded() == ("text_encoder",)
    release.set()
    for thread in loading:
        thread.join(60)
    assert sorted(opened) == ["sam_encoder", "text_encoder"]
    assert engine.loaded() == ("sam_encoder", "text_encoder")


def pixel_work(model: deixis.Model) -> list[object]:
    """Some of every task, pictures and all; `encode` without a store, so that the encoders run in every thread."""
    found: list[object] = []
    for seed in range(2):
        scene = model.encode(make_picture(40 + 30 * seed, 60, seed))
        found += [
            scene.caption(options=SHORT).to_dict(),
            scene.caption(box=(3, 4, 30, 29), options=SHORT).to_dict(),
            [word.text for word in scene.stream_caption(options=SHORT)],
            scene.refer("a b").box,
            scene.trace("a b c").to_dict(),
            scene.segment(points=[(8, 9)]).mask.counts,
            [c.ids for c in model.caption_batch([(scene, Prompt()), (scene, Prompt(box=(1, 1, 20, 20)))], SHORT)],
        ]
    return found


def glamm_work(model: deixis.Model) -> list[object]:
    found: list[object] = []
    for seed in range(2):
        scene = model.encode(make_picture(40 + 30 * seed, 60, seed))
        found += [scene.grounded_caption(SHORT).to_dict(), scene.ask("a b", options=SHORT).to_dict()]
        with scene.chat() as chat:
            found += [chat.ask("c", options=SHORT).text, chat.ask("d", options=SHORT).text]
    return found


FAMILIES = pytest.mark.parametrize("work", [pixel_work, glamm_work])


def load(work: Callable[..., object], tiny_bundle: Path) -> deixis.Model:
    return deixis.load(GLAMM if work is glamm_work else tiny_bundle, "cpu", threads=1, scene_budget_mb=0)


@FAMILIES
def test_threads_that_share_a_model_get_what_one_gets(
    work: Callable[[deixis.Model], list[object]], tiny_bundle: Path
) -> None:
    with load(work, tiny_bundle) as model:
        found: dict[int, list[object]] = {}
        ready = threading.Barrier(3)

        def run(number: int) -> None:
            ready.wait(60)
            found[number] = work(model)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        alone = work(model)
        assert [found.get(number) for number in range(3)] == [alone] * 3


@FAMILIES
def test_close_ends_the_calls_of_other_threads(work: Callable[[deixis.Model], list[object]], tiny_bundle: Path) -> None:
    """Whatever they are in the middle of, they end with ClosedError."""
    model = load(work, tiny_bundle)
    ended: list[BaseException] = []
    under_way = threading.Semaphore(0)

    def run() -> None:
        try:
            while True:
                work(model)
                under_way.release()
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert under_way.acquire(timeout=120)
    model.close()
    for thread in threads:
        thread.join(120)
    assert [type(error) for error in ended] == [ClosedError] * 3


def test_what_is_under_way_when_a_model_is_closed(tiny_bundle: Path) -> None:
    """A stream that was begun, a graph that was bound: the next run says so."""
    model = deixis.load(tiny_bundle, "cpu", threads=1)
    stream = model.encode(make_picture(90, 120, 0)).stream_caption()
    engine, inputs = model.pipeline.engine, inputs_of(model.bundle, "text_encoder")
    outputs = {"encoder_mask": engine.run("text_encoder", inputs)["encoder_mask"]}
    run = engine.bind("text_encoder", inputs, outputs)
    run()
    model.close()
    with pytest.raises(ClosedError):
        run()
    with pytest.raises(ClosedError):
        list(stream)
