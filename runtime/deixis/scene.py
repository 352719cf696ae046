"""An encoded picture, and the store of recent ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis.base_pipeline import Features
from deixis.captioning import CaptionStream
from deixis.errors import ClosedError
from deixis.geometry import Geometry
from deixis.options import DecodeOptions
from deixis.prompts import Prompt, Question
from deixis.results import Caption, DenseCaption, GroundedPhrase, GroundedText, Grounding, Segment, Trace, Word
from deixis.streams import ResultStream

if TYPE_CHECKING:
    from deixis.glamm.conversations import Chat
    from deixis.model import Model
    from deixis.tasks import Phrases

Labels = Sequence[int] | NDArray[np.integer]


class Scene:
    """A picture encoded once, to be prompted many times. Comes from `model.encode`; safe to use from several threads.

    All boxes (left, top, right, bottom) and points (x, y) are pixels of the picture as it was given. A box that reaches
    over the picture's edge is clipped to it. PromptError: a prompt that makes no sense; TaskError: the bundle cannot do
    this task; ClosedError: the model was closed; DeadlineError and CancelledError: the call's options said so.
    """

    def __init__(self, model: Model, features: Features, key: str) -> None:
        self._model = model
        self._features: Features | None = features
        self.key = key  # hash of the picture's content
        self.geometry: Geometry = features.geometry

    def __repr__(self) -> str:
        height, width = self.size
        return f"<Scene {width}x{height} px, {self.key[:8]}>"

    @property
    def model(self) -> Model:
        return self._model

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture, px."""
        return self.geometry.original

    @property
    def features(self) -> Features:
        """What the image encoders gave. Raises ClosedError."""
        features = self._features
        if features is None:
            raise ClosedError("the model of this scene was closed; load it and encode the picture again")
        return features

    @property
    def nbytes(self) -> int:
        """What the features take now; some families encode more of a picture when a task first needs it."""
        return 0 if self._features is None else self._features.nbytes

    def release(self) -> None:
        """Forget the features; called when the model is closed."""
        self._features = None

    def caption(
        self,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: Labels | None = None,
        options: DecodeOptions | None = None,
    ) -> Caption:
        """Describe the picture, or the region that a box or points select; every word with its place."""
        return self._model.caption_batch([(self, Prompt(box, points, labels))], options)[0]

    def stream_caption(
        self,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: Labels | None = None,
        options: DecodeOptions | None = None,
    ) -> CaptionStream:
        """The same, word by word: an iterator of Word, whose `caption` is the whole."""
        return self._model.stream_caption(self, Prompt(box, points, labels), options)

    def dense_captions(
        self,
        limit: int | None = None,
        min_score: float | None = None,
        join_scores: bool | None = None,
        options: DecodeOptions | None = None,
    ) -> tuple[DenseCaption, ...]:
        """Find the objects of the picture and describe each; best first, empty when nothing is found.

        limit: describe so many boxes at most, those that the detector is surest of. min_score: leave out what scores
        less. join_scores: let the captions' probabilities join the scores. Greedy: every box keeps its caption, and its
        score is the geometric mean of both. With beams: all pairs of box and hypothesis are ranked, `limit` pairs
        stay, and a box may come several times. None = as the bundle says.
        """
        return self._model.dense_captions_batch([self], limit, min_score, join_scores, options)[0]

    def refer(self, text: str, mask: bool = True, options: DecodeOptions | None = None) -> Grounding:
        """Find what a phrase means: its box, and its mask unless `mask` is False.

        The score is the mask decoder's predicted IoU: how well the mask fits, not whether the thing is there.

        PixelLLM has no way to say that it is not; it then gives a box all the same, clipped to the picture. Of the
        options, deadline_ms and cancel apply. GLaMM answers with a mask, around which the box is, or with neither.

        Also raises TextTooLongError.
        """
        return self._model.refer_batch([(self, text)], mask, options)[0]

    def trace(self, text: str, options: DecodeOptions | None = None) -> Trace:
        """The place of every word of a given text.

        Of the options, deadline_ms and cancel apply. Also raises TextTooLongError.
        """
        return self._model.trace_batch([(self, text)], options)[0]

    @overload
    def segment(
        self,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: Labels | None = None,
        multimask: Literal[False] = False,
        options: DecodeOptions | None = None,
    ) -> Segment: ...

    @overload
    def segment(
        self,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: Labels | None = None,
        *,
        multimask: Literal[True],
        options: DecodeOptions | None = None,
    ) -> tuple[Segment, ...]: ...

    def segment(
        self,
        box: ArrayLike | None = None,
        points: ArrayLike | None = None,
        labels: Labels | None = None,
        multimask: bool = False,
        options: DecodeOptions | None = None,
    ) -> Segment | tuple[Segment, ...]:
        """The mask of what a box or points select, as SAM gives it.

        multimask: three alternatives, best predicted IoU first, for prompts that may mean a thing, a part or a group.
        Of the options, deadline_ms and cancel apply.
        """
        prompts = [(self, Prompt(box, points, labels))]
        if multimask:
            return self._model.segment_batch(prompts, multimask=True, options=options)[0]
        return self._model.segment_batch(prompts, options=options)[0]

    def grounded_caption(self, options: DecodeOptions | None = None) -> GroundedText:
        """Describe the picture, with a mask for every thing that the description names.

        Phrases, their spans and their masks belong together whatever the model writes; what is wrong with its marks
        stands in `problems`. Of the options, beams do not apply: such models decode greedily (PromptError).
        """
        return self._model.grounded_caption_batch([self], options)[0]

    def stream_grounded_caption(
        self, options: DecodeOptions | None = None
    ) -> ResultStream[Word | GroundedPhrase, GroundedText]:
        """The same as it comes: an iterator of words and phrases, whose `result` is the whole.

        A phrase comes behind its last word, as soon as its mask is decoded.
        """
        return self._model.stream_grounded_caption(self, options)

    def ask(self, text: str, boxes: ArrayLike | None = None, options: DecodeOptions | None = None) -> GroundedText:
        """Answer a question about the picture; the answer may hold masks. `chat` asks several.

        boxes: [k, 4], regions that the question names by `<bbox>`, in their order; one that names none gets the marks
        at its end. Also raises TextTooLongError.
        """
        return self._model.ask_batch([(self, Question(text, boxes))], options)[0]

    def chat(self) -> Chat:
        """A conversation about the picture: every question knows those before it. Close it, or use it in a `with`."""
        return self._model.chat(self)

    def ground_phrases(
        self, text: str, phrases: Phrases | None = None, options: DecodeOptions | None = None
    ) -> GroundedText:
        """Masks of the things that a given text names.

        phrases: parts of the text, as substrings or as spans (start, end) of characters; None: the model chooses them.
        They come back in the order of the text, which stays as it is. deixis.glamm.phrases says how this is done. Of
        the options, deadline_ms and cancel apply. Also raises TextTooLongError.
        """
        return self._model.ground_phrases(self, text, phrases, options)


class SceneStore:
    """Recent scenes by content hash, within a budget of bytes; the least recently used go first. Thread-safe."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._scenes: OrderedDict[str, Scene] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._total()

    def __len__(self) -> int:
        return len(self._scenes)

    def get(self, key: str) -> Scene | None:
        with self._lock:
            scene = self._scenes.get(key)
            if scene is not None:
                self._scenes.move_to_end(key)
            return scene

    def put(self, scene: Scene) -> None:
        with self._lock:
            if scene.key in self._scenes or scene.nbytes > self.budget_bytes:
                return
            self._scenes[scene.key] = scene
            while self._total() > self.budget_bytes:  # also of scenes that have grown since
                self._scenes.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._scenes.clear()

    def _total(self) -> int:
        return sum(scene.nbytes for scene in self._scenes.values())
