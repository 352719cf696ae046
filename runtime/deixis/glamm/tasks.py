"""The tasks of GLaMM, each in the module that does it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from deixis.captioning import CaptionStream
from deixis.glamm import grounded
from deixis.glamm import phrases as phrase_grounding
from deixis.glamm.conversations import Chat
from deixis.glamm.grounded import GroundedStream
from deixis.glamm.pipeline import GlammFeatures, GlammPipeline
from deixis.options import DecodeOptions
from deixis.prompts import Prompt, Question
from deixis.results import Caption, GroundedText, Grounding
from deixis.tasks import Phrases, Tasks


class GlammTasks(Tasks[GlammPipeline, GlammFeatures]):
    """See Tasks."""

    def __init__(self, pipeline: GlammPipeline) -> None:
        super().__init__(pipeline)
        self._chats: weakref.WeakSet[Chat] = weakref.WeakSet()
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            for chat in list(self._chats):
                chat.close()

    def warmup(self, features: GlammFeatures) -> None:
        self.pipeline.warmup(features)

    def caption_batch(
        self, scenes: Sequence[GlammFeatures], prompts: Sequence[Prompt], options: DecodeOptions
    ) -> list[Caption]:
        return grounded.caption_batch(self.pipeline, scenes, prompts, options)

    def stream_caption(self, scene: GlammFeatures, prompt: Prompt, options: DecodeOptions) -> CaptionStream:
        return grounded.stream_caption(self.pipeline, scene, prompt, options)

    def refer_batch(
        self, scenes: Sequence[GlammFeatures], texts: Sequence[str], mask: bool, options: DecodeOptions
    ) -> list[Grounding]:
        return grounded.refer_batch(self.pipeline, scenes, texts, mask, options)

    def grounded_caption_batch(self, scenes: Sequence[GlammFeatures], options: DecodeOptions) -> list[GroundedText]:
        return grounded.grounded_caption_batch(self.pipeline, scenes, options)

    def stream_grounded_caption(self, scene: GlammFeatures, options: DecodeOptions) -> GroundedStream:
        return grounded.stream_grounded_caption(self.pipeline, scene, options)

    def ask_batch(
        self, scenes: Sequence[GlammFeatures], questions: Sequence[Question], options: DecodeOptions
    ) -> list[GroundedText]:
        return grounded.ask_batch(self.pipeline, scenes, questions, options)

    def chat(self, scene: GlammFeatures) -> Chat:
        chat = Chat(self.pipeline, scene)
        with self._lock:
            self._chats.add(chat)
        return chat

    def ground_phrases(
        self, scene: GlammFeatures, text: str, phrases: Phrases | None, options: DecodeOptions
    ) -> GroundedText:
        return phrase_grounding.ground_phrases(self.pipeline, scene, text, phrases, options)
