"""The tasks of all families as one class, so that `Model` and `Scene` need not know which family they run.

A family overrides what its models can do; the rest raises TaskError. Scenes are given by what the family's image
encoders gave (`Scene.features`); the results of a batch are those of one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NoReturn, TypeVar

from deixis.base_pipeline import BasePipeline
from deixis.errors import TaskError
from deixis.options import DecodeOptions
from deixis.prompts import Prompt, Question
from deixis.results import Caption, DenseCaption, GroundedPhrase, GroundedText, Grounding, Segment, Trace, Word
from deixis.streams import ResultStream

if TYPE_CHECKING:
    from deixis.captioning import CaptionStream
    from deixis.dense import DenseChoice
    from deixis.glamm.conversations import Chat

PipelineT = TypeVar("PipelineT", bound=BasePipeline)
FeaturesT = TypeVar("FeaturesT")

Phrases = Sequence[str] | Sequence[tuple[int, int]]  # substrings of a text, or their characters [start, end)


class Tasks(Generic[PipelineT, FeaturesT]):
    """What the models of a family can do with encoded pictures. Methods are described in `Scene`."""

    def __init__(self, pipeline: PipelineT) -> None:
        self.pipeline: PipelineT = pipeline

    def close(self) -> None:
        """Let go of what is kept between calls. The pipeline is closed by who made it."""

    def warmup(self, features: FeaturesT) -> None:
        """Run every task, or every graph, once on one picture."""
        raise NotImplementedError

    def caption_batch(
        self, scenes: Sequence[FeaturesT], prompts: Sequence[Prompt], options: DecodeOptions
    ) -> list[Caption]:
        self._refuse("make captions")

    def stream_caption(self, scene: FeaturesT, prompt: Prompt, options: DecodeOptions) -> CaptionStream:
        self._refuse("stream captions")

    def dense_captions_batch(
        self, scenes: Sequence[FeaturesT], choice: DenseChoice, options: DecodeOptions
    ) -> list[tuple[DenseCaption, ...]]:
        self._refuse("make dense captions")

    def refer_batch(
        self, scenes: Sequence[FeaturesT], texts: Sequence[str], mask: bool, options: DecodeOptions
    ) -> list[Grounding]:
        self._refuse("refer")

    def trace_batch(self, scenes: Sequence[FeaturesT], texts: Sequence[str], options: DecodeOptions) -> list[Trace]:
        self._refuse("trace")

    def segment_batch(
        self, scenes: Sequence[FeaturesT], prompts: Sequence[Prompt], multimask: bool, options: DecodeOptions
    ) -> list[tuple[Segment, ...]]:
        self._refuse("segment")

    def grounded_caption_batch(self, scenes: Sequence[FeaturesT], options: DecodeOptions) -> list[GroundedText]:
        self._refuse("make grounded captions")

    def stream_grounded_caption(
        self, scene: FeaturesT, options: DecodeOptions
    ) -> ResultStream[Word | GroundedPhrase, GroundedText]:
        self._refuse("make grounded captions")

    def ask_batch(
        self, scenes: Sequence[FeaturesT], questions: Sequence[Question], options: DecodeOptions
    ) -> list[GroundedText]:
        self._refuse("answer questions")

    def chat(self, scene: FeaturesT) -> Chat:
        self._refuse("chat")

    def ground_phrases(
        self, scene: FeaturesT, text: str, phrases: Phrases | None, options: DecodeOptions
    ) -> GroundedText:
        self._refuse("ground phrases")

    def _refuse(self, what: str) -> NoReturn:
        model = self.pipeline.manifest.model
        raise TaskError(f"bundle {model.name!r} cannot {what}: models of the family {model.family!r} do not")
