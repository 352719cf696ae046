"""The user's side: load a bundle, encode pictures, prompt them.

with deixis.load("tabletop") as model:
    scene = model.encode("table.jpg")
    print(scene.caption().text, scene.refer("the red mug").box)
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from deixis.base_pipeline import BasePipeline
from deixis.bundle import MANIFEST_NAME, Bundle, Manifest, open_bundle
from deixis.captioning import CaptionStream
from deixis.dense import DenseChoice
from deixis.engines import make_engine
from deixis.errors import BundleNotFoundError, ClosedError, PromptError
from deixis.families import make_pipeline, make_tasks
from deixis.image import Channels, Source, load_image
from deixis.memory import return_freed_memory
from deixis.options import DecodeOptions
from deixis.prompts import Prompt, Question
from deixis.results import Caption, DenseCaption, GroundedPhrase, GroundedText, Grounding, Segment, Trace, Word
from deixis.scene import Scene, SceneStore
from deixis.scheduling import Schedulable, Scheduling, make_scheduling
from deixis.streams import ResultStream
from deixis.tasks import Phrases, Tasks
from deixis.timing import Span, TimedEngine, edge

if TYPE_CHECKING:
    from deixis.glamm.conversations import Chat

log = logging.getLogger(__name__)

MODELS_VARIABLE = "DEIXIS_MODELS"  # folders of bundles, separated as in PATH


@dataclass(frozen=True)
class Info:
    """What is loaded, and how it runs. cache_capacity: tokens. threads, spin, cores: see deixis.scheduling."""

    name: str
    family: str
    bundle: Path
    device: str
    threads: int
    spin: bool
    cores: tuple[int, ...]
    cache_capacity: int
    scene_budget_mb: float
    tasks: tuple[str, ...]
    loaded_graphs: tuple[str, ...]


def load(
    bundle: str | os.PathLike[str],
    device: str = "auto",
    threads: int | None = None,
    cache_capacity: int | None = None,
    scene_budget_mb: float = 256,
    verify: bool = True,
    spin: bool = False,
    cores: Sequence[int] | None = None,
) -> Model:
    """Open a bundle. Graphs are loaded when a task first needs them; `Model.warmup` loads them at once.

    Args:
        bundle: path of a bundle, or a name: looked up in the folders of $DEIXIS_MODELS, then among the bundles that
            come with deixis.
        device: "auto", "cpu" or "cuda". A device that is asked for is used or refused, never replaced.
        threads: of one graph run; None = one per core that this process may use, or per core given.
        cache_capacity: most tokens of a generated text, the begin token included; None = as the bundle says. A caption
            that would be longer is cut there, with finished=False.
        scene_budget_mb: recent scenes are kept up to this many MB (10^6 bytes); 0 = none.
        verify: check the hash of every file first.
        spin: threads that wait for work stay awake for a while: faster on an idle machine, a burden on a busy one.
        cores: numbers of processors, from 0 on, one per thread, to pin the threads of graph runs to. The first is for
            the thread that calls, which stays where it is: pin it with os.sched_setaffinity. docs/threads.md has more.

    Raises BundleError (not found, not in the format, newer, damaged), DeviceError, PromptError for an option that makes
    no sense.
    """
    scheduling = make_scheduling(threads, spin, cores)
    wanted = cache_capacity
    if wanted is not None and (not isinstance(wanted, Integral) or isinstance(wanted, bool) or wanted < 1):
        raise PromptError(f"cache_capacity must be a whole number from 1 on, found {wanted!r}")
    if not isinstance(scene_budget_mb, Real) or not scene_budget_mb >= 0:
        raise PromptError(f"scene_budget_mb must be a number from 0 on, found {scene_budget_mb!r}")
    opened = open_bundle(find_bundle(bundle), verify_hashes=verify)
    engine = make_engine(opened, device, scheduling.threads or None)
    if isinstance(engine, Schedulable):
        engine.schedule(scheduling)
    elif scheduling.spin or scheduling.cores:
        raise PromptError(f"spin and cores do not apply to device {engine.device!r}; leave them out")
    pipeline = make_pipeline(opened, engine, cache_capacity)
    return Model(pipeline, scene_budget_mb)


def find_bundle(bundle: str | os.PathLike[str]) -> Path:
    """Path of a bundle given by path or name (see `load`). Raises BundleNotFoundError."""
    text = os.fspath(bundle)
    if not isinstance(bundle, str) or Path(text).name != text or text in (".", "..", ""):
        return Path(text)
    here = Path(__file__).resolve().parent
    folders = [Path(folder) for folder in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if folder]
    folders += [here / "models", here.parents[1] / "models"]  # in the wheel, in a checkout
    for candidate in [*(folder / text for folder in folders), Path(text)]:
        if (candidate / MANIFEST_NAME).is_file():
            return candidate
    raise BundleNotFoundError(
        f"no bundle named {text!r} in {', '.join(map(str, folders))}, and no such folder here; "
        f"give its path, or set {MODELS_VARIABLE} to the folder that holds it"
    )


class Model:
    """An open bundle. Use it as a context manager, or call `close`. Safe to use from several threads."""

    def __init__(self, pipeline: BasePipeline, scene_budget_mb: float = 256) -> None:
        self._tasks: Tasks[Any, Any] | None = make_tasks(pipeline)
        self._bundle = pipeline.bundle
        self._budget_mb = scene_budget_mb
        self._store = SceneStore(int(scene_budget_mb * 1_000_000))
        self._living: weakref.WeakSet[Scene] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._spans: list[Span] | None = None
        log.info("opened bundle %s on %s", self._bundle.path, pipeline.engine.device)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._tasks is None else self._tasks.pipeline.engine.device
        return f"<Model {self.manifest.model.name!r}, {state}>"

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def manifest(self) -> Manifest:
        return self._bundle.manifest

    @property
    def tasks(self) -> Tasks[Any, Any]:
        """The tasks on what the image encoders gave; `Scene` has them on pictures. Raises ClosedError."""
        if self._tasks is None:
            raise ClosedError("the model was closed; load it again")
        return self._tasks

    @property
    def pipeline(self) -> BasePipeline:
        """The graphs, for those who build on arrays: a Pipeline, or a GlammPipeline. Raises ClosedError."""
        return self.tasks.pipeline

    @property
    def info(self) -> Info:
        pipeline = self.pipeline
        engine = pipeline.engine
        scheduling: Scheduling = getattr(engine, "scheduling", Scheduling(engine.threads))
        return Info(
            name=self.manifest.model.name,
            family=self.manifest.model.family,
            bundle=self._bundle.path,
            device=engine.device,
            threads=scheduling.threads,
            spin=scheduling.spin,
            cores=scheduling.cores,
            cache_capacity=pipeline.capacity,
            scene_budget_mb=self._budget_mb,
            tasks=pipeline.tasks,
            loaded_graphs=engine.loaded(),
        )

    def close(self) -> None:
        """Give back the memory of graphs and scenes.

        Scenes of this model raise ClosedError from then on. May be called twice.
        """
        with self._lock:
            tasks, self._tasks = self._tasks, None
            if tasks is None:
                return
            self._store.clear()
            for scene in list(self._living):
                scene.release()
        tasks.close()
        tasks.pipeline.engine.close()
        del tasks
        return_freed_memory()

    def warmup(self) -> None:
        """Load every graph and run every task once on a grey picture, so that the first real call is as fast as the
        later ones.
        """
        tasks, side = self.tasks, self.manifest.image.size
        tasks.warmup(tasks.pipeline.encode([np.full((side, side, 3), 128, np.uint8)])[0])
        for role in self.manifest.graphs:
            tasks.pipeline.engine.load(role)

    @contextmanager
    def timed(self) -> Iterator[list[Span]]:
        """Record where the time of calls goes, until the block ends: a list that grows with every call, in the order in
        which things ended. Graphs are named by role; see `deixis.timing.Span`.

        Calls of all threads go into the one list, so time one thread at a time. What was started before (a stream, a
        chat) is not seen, and of streams only the graphs. Blocks do not nest: RuntimeError. Raises ClosedError.
        """
        pipeline, spans = self.pipeline, list[Span]()
        with self._lock:
            if self._spans is not None:
                raise RuntimeError("this model is being timed already")
            self._spans = spans
            pipeline.engine = TimedEngine(engine := pipeline.engine, spans)
        try:
            yield spans
        finally:
            with self._lock:
                pipeline.engine, self._spans = engine, None

    @overload
    def encode(self, image: Source, channels: Channels = "RGB") -> Scene: ...

    @overload
    def encode(self, image: Sequence[Source], channels: Channels = "RGB") -> list[Scene]: ...

    @edge("preprocess")
    def encode(self, image: Source | Sequence[Source], channels: Channels = "RGB") -> Scene | list[Scene]:
        """Encode a picture, or a list of pictures in one batch. A picture seen recently is not encoded again.

        Args:
            image: path, bytes of a file, or uint8 array; or a list of these.
            channels: order of an array's channels: "RGB", "BGR", "RGBA", "BGRA" or "GRAY".

        Raises ImageError, ClosedError.
        """
        pipeline = self.pipeline
        many = isinstance(image, (list, tuple))
        pictures = [load_image(source, channels) for source in (image if many else [image])]  # type: ignore[list-item]
        keys = [content_hash(picture) for picture in pictures]
        scenes = {key: scene for key in keys if (scene := self._store.get(key)) is not None}
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in scenes}
        if missing:
            features = pipeline.encode(list(missing.values()))
            for key, found in zip(missing, features, strict=True):
                scenes[key] = self._keep(Scene(self, found, key))
        return [scenes[key] for key in keys] if many else scenes[keys[0]]

    @edge("postprocess")
    def caption_batch(
        self, items: Sequence[tuple[Scene, Prompt | None]], options: DecodeOptions | None = None
    ) -> list[Caption]:
        """`Scene.caption` for many (scene, prompt) pairs at once; the results are those of one at a time."""
        prompts = [prompt or Prompt() for _, prompt in items]
        return self.tasks.caption_batch(self._features(items), prompts, options or DecodeOptions())

    def stream_caption(
        self, scene: Scene, prompt: Prompt | None = None, options: DecodeOptions | None = None
    ) -> CaptionStream:
        """See `Scene.stream_caption`."""
        [features] = self._features([(scene, prompt)])
        return self.tasks.stream_caption(features, prompt or Prompt(), options or DecodeOptions())

    @edge("postprocess")
    def dense_captions_batch(
        self,
        scenes: Sequence[Scene],
        limit: int | None = None,
        min_score: float | None = None,
        join_scores: bool | None = None,
        options: DecodeOptions | None = None,
    ) -> list[tuple[DenseCaption, ...]]:
        """`Scene.dense_captions` for many scenes at once, all their boxes captioned together; the results are those of
        one at a time.
        """
        features = self._features([(scene, None) for scene in scenes])
        choice = DenseChoice(limit, min_score, join_scores)
        return self.tasks.dense_captions_batch(features, choice, options or DecodeOptions())

    @edge("postprocess")
    def refer_batch(
        self, items: Sequence[tuple[Scene, str]], mask: bool = True, options: DecodeOptions | None = None
    ) -> list[Grounding]:
        """`Scene.refer` for many (scene, phrase) pairs at once; the results are those of one at a time."""
        scenes, texts = self._features(items), [text for _, text in items]
        return self.tasks.refer_batch(scenes, texts, mask, options or DecodeOptions())

    @edge("postprocess")
    def trace_batch(self, items: Sequence[tuple[Scene, str]], options: DecodeOptions | None = None) -> list[Trace]:
        """`Scene.trace` for many (scene, text) pairs at once; the results are those of one at a time."""
        scenes, texts = self._features(items), [text for _, text in items]
        return self.tasks.trace_batch(scenes, texts, options or DecodeOptions())

    @overload
    def segment_batch(
        self,
        items: Sequence[tuple[Scene, Prompt]],
        *,
        multimask: Literal[False] = False,
        options: DecodeOptions | None = None,
    ) -> list[Segment]: ...

    @overload
    def segment_batch(
        self, items: Sequence[tuple[Scene, Prompt]], *, multimask: Literal[True], options: DecodeOptions | None = None
    ) -> list[tuple[Segment, ...]]: ...

    @edge("postprocess")
    def segment_batch(
        self, items: Sequence[tuple[Scene, Prompt]], *, multimask: bool = False, options: DecodeOptions | None = None
    ) -> list[Segment] | list[tuple[Segment, ...]]:
        """`Scene.segment` for many (scene, prompt) pairs at once; the results are those of one at a time."""
        scenes, prompts = self._features(items), [prompt for _, prompt in items]
        found = self.tasks.segment_batch(scenes, prompts, multimask, options or DecodeOptions())
        return found if multimask else [alternatives[0] for alternatives in found]

    @edge("postprocess")
    def grounded_caption_batch(
        self, scenes: Sequence[Scene], options: DecodeOptions | None = None
    ) -> list[GroundedText]:
        """`Scene.grounded_caption` for many scenes at once; the results are those of one at a time."""
        features = self._features([(scene, None) for scene in scenes])
        return self.tasks.grounded_caption_batch(features, options or DecodeOptions())

    def stream_grounded_caption(
        self, scene: Scene, options: DecodeOptions | None = None
    ) -> ResultStream[Word | GroundedPhrase, GroundedText]:
        """See `Scene.stream_grounded_caption`."""
        [features] = self._features([(scene, None)])
        return self.tasks.stream_grounded_caption(features, options or DecodeOptions())

    @edge("postprocess")
    def ask_batch(
        self, items: Sequence[tuple[Scene, str | Question]], options: DecodeOptions | None = None
    ) -> list[GroundedText]:
        """`Scene.ask` for many (scene, question) pairs at once; the results are those of one at a time."""
        questions = [asked if isinstance(asked, Question) else Question(asked) for _, asked in items]
        return self.tasks.ask_batch(self._features(items), questions, options or DecodeOptions())

    def chat(self, scene: Scene) -> Chat:
        """See `Scene.chat`."""
        [features] = self._features([(scene, None)])
        return self.tasks.chat(features)

    @edge("postprocess")
    def ground_phrases(
        self, scene: Scene, text: str, phrases: Phrases | None = None, options: DecodeOptions | None = None
    ) -> GroundedText:
        """See `Scene.ground_phrases`."""
        [features] = self._features([(scene, None)])
        return self.tasks.ground_phrases(features, text, phrases, options or DecodeOptions())

    def _features(self, items: Sequence[tuple[Scene, object]]) -> list[Any]:
        for scene, _ in items:
            if not isinstance(scene, Scene) or scene.model is not self:
                raise PromptError("the scene is not one of this model; encode the picture with it")
        return [scene.features for scene, _ in items]

    def _keep(self, scene: Scene) -> Scene:
        with self._lock:
            if self._tasks is None:
                raise ClosedError("the model was closed while a picture was being encoded")
            self._living.add(scene)
            self._store.put(scene)
        return scene


def content_hash(picture: NDArray[np.uint8]) -> str:
    """Hash of an RGB picture uint8 [H, W, 3]: its size and its pixels."""
    digest = hashlib.blake2b(str(picture.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(picture).data)
    return digest.hexdigest()
