"""The clock: requests run in turn, cold and warm, and what their spans say about the stages."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import deixis
from deixis.bundle import Bundle, open_bundle
from deixis.model import find_bundle
from deixis.timing import LOAD, Span
from deixis_bench.bench.requests import Request, make_requests
from deixis_bench.bench.settings import Settings, make_pictures, threads_of

PREPROCESS, POSTPROCESS, PYTHON = "preprocess", "postprocess", "python"
STEP, PROMPT = "decoder_step", "prompt"


@dataclass(frozen=True)
class Run:
    """One request, once. start, end, marks: `time.perf_counter`; marks: when each token was known. wide: the decoder
    read a prompt before the first. processor: seconds of all threads of this process, which other programs disturb less
    than the clock. joules: None where nothing measures them.
    """

    start: float
    end: float
    marks: tuple[float, ...]
    spans: tuple[Span, ...]
    wide: bool = False
    processor: float = 0.0
    joules: float | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def graphs(self) -> list[Span]:
        """Runs of graphs, in their order. The wide run that reads GLaMM's prompt is called "prompt"."""
        runs = sorted((span for span in self.spans if _is_graph(span)), key=lambda span: span.start)
        if not self.wide or not self.marks:
            return runs
        return [
            Span(PROMPT, span.start, span.seconds) if span.name == STEP and span.end <= self.marks[0] else span
            for span in runs
        ]

    def stages(self) -> dict[str, list[float]]:
        """Seconds by stage: every run of every graph, and the parts of the time outside of graphs, which together with
        loads make up the whole request.
        """
        found: dict[str, list[float]] = {}
        before = [s.seconds for s in self.spans if s.name == PREPROCESS]
        if before:
            found[PREPROCESS] = [sum(before)]
        graphs = self.graphs
        for span in graphs:
            found.setdefault(span.name, []).append(span.seconds)
        after = self.end - max((s.end for s in graphs), default=self.end)
        loads = sum(s.seconds for s in self.spans if s.name.startswith(LOAD))
        rest = self.seconds - sum(before) - sum(s.seconds for s in graphs) - after - loads
        return found | {POSTPROCESS: [after], PYTHON: [max(0.0, rest)]}

    def loads(self) -> dict[str, float]:
        """Seconds that graphs took to load, by role."""
        return {s.name.removeprefix(LOAD): s.seconds for s in self.spans if s.name.startswith(LOAD)}

    def per_token(self) -> list[float]:
        """Seconds from each token to the next."""
        return [b - a for a, b in itertools.pairwise(self.marks)]

    def python_per_step(self) -> list[float]:
        """Seconds between tokens in which no graph ran."""
        found = []
        for a, b in itertools.pairwise(self.marks):
            found.append(b - a - sum(s.seconds for s in self.spans if _is_graph(s) and a <= s.start and s.end <= b))
        return found


def _is_graph(span: Span) -> bool:
    return span.name not in (PREPROCESS, POSTPROCESS) and not span.name.startswith(LOAD)


class Subject:
    """A bundle that is measured: what was taken cold, then a loaded model whose requests run warm."""

    def __init__(self, bundle: str | Path, settings: Settings) -> None:
        """Raises DeixisError when the bundle cannot be opened, or the settings do not fit it."""
        self.bundle = bundle
        self.settings = settings
        self.cold: dict[str, Run] = {}
        self.warm: dict[str, list[Run]] = {}
        self.requests: list[Request] = []
        self.model: deixis.Model | None = None
        self.engine = settings.device, threads_of(settings.threads or 0)  # what it uses, once it is open
        self._scenes: list[deixis.Scene] = []
        self.opened = open_bundle(find_bundle(bundle), verify_hashes=False)
        self._capacity = capacity_for(self.opened, settings)

    def load(self) -> deixis.Model:
        """The bundle as it is measured: no scene is kept, and new tokens fit into the cache."""
        settings = self.settings
        return deixis.load(
            self.bundle,
            device=settings.device,
            threads=settings.threads,
            cache_capacity=self._capacity,
            scene_budget_mb=0,
        )

    def measure_cold(self) -> None:
        """Run every request once on a freshly loaded model: load, encode and the task together."""
        with self.load() as model:
            tasks = [request.task for request in make_requests(model, self.settings)]
        for task in tasks:
            start = time.perf_counter()
            with self.load() as model:
                load = time.perf_counter() - start
                [request] = [request for request in make_requests(model, self.settings) if request.task == task]
                with model.timed() as spans:
                    begun = time.perf_counter()
                    scenes = [] if request.from_picture else self._encode(model)
                    made = request.run(scenes)
                    end = time.perf_counter()
            # between load and start the texts were made, which is not the model's work
            self.cold[task] = Run(begun - load, end, tuple(made.marks), tuple(spans), made.wide)

    def open(self) -> None:
        """Load the model and the scenes for warm rounds, and prompt those in every way once: what a scene keeps for
        later prompts is there from then on.
        """
        self.model = self.load()
        self.engine = self.model.info.device, threads_of(self.model.info.threads)
        self.requests = make_requests(self.model, self.settings)
        self._scenes = self._encode(self.model)
        for request in self.requests:
            request.run(self._scenes)
        self.warm = {request.task: [] for request in self.requests}

    def run(self, request: Request, joules: Callable[[], float] | None = None) -> Run:
        """Run a request once on the open model."""
        assert self.model is not None
        before = None if joules is None else joules()
        with self.model.timed() as spans:
            processor, start = time.process_time(), time.perf_counter()
            made = request.run(self._scenes)
            end, processor = time.perf_counter(), time.process_time() - processor
        used = None if joules is None or before is None else joules() - before
        return Run(start, end, tuple(made.marks), tuple(spans), made.wide, processor, used)

    def close(self) -> None:
        if self.model is not None:
            self.model.close()
            self.model = None

    def _encode(self, model: deixis.Model) -> list[deixis.Scene]:
        return model.encode(make_pictures(self.settings.batch, self.settings.seed))


def capacity_for(bundle: Bundle, settings: Settings) -> int:
    """Tokens that the cache has to hold: the begin token or a prompt of any task, and what is generated.

    Raises PromptError when the bundle does not allow as many.
    """
    manifest = bundle.manifest
    spec, most = manifest.conversation, manifest.dims["T"].max
    around = 1
    if spec is not None:  # the question's own words and marks are few beside the picture
        longest = max((len(task.instruction) for task in manifest.tasks.values()), default=0)
        around = spec.image_tokens + len(spec.system) + len(spec.image_sentence) + longest + settings.prompt_tokens
    if settings.new_tokens + 1 > most:
        raise deixis.PromptError(
            f"{settings.new_tokens} new tokens are too many: the bundle's caches hold {most}; "
            f"choose --new-tokens up to {most - 1}"
        )
    return min(most, max(manifest.caches.default_capacity, settings.new_tokens + around))


def run_rounds(
    subjects: Sequence[Subject],
    settings: Settings,
    joules: Callable[[], float] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Warm rounds of all subjects, interleaved: in every round each request runs once on each subject, so that what
    disturbs the machine disturbs all. The first rounds do not count.
    """
    for number in range(-settings.warmup_rounds, settings.rounds):
        say(f"round {number + 1} of {settings.rounds}" if number >= 0 else "warm-up")
        for subject in subjects:
            for request in subject.requests:
                run = subject.run(request, joules)
                if number >= 0:
                    subject.warm[request.task].append(run)
