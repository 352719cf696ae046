"""The tasks of PixelLLM, each in the module that does it."""

from __future__ import annotations

from collections.abc import Sequence

from deixis import captioning, dense, grounding
from deixis.batching import SceneFeatures
from deixis.captioning import CaptionStream
from deixis.dense import DenseChoice
from deixis.errors import PromptError
from deixis.options import DecodeOptions
from deixis.pipeline import Pipeline
from deixis.prompts import Prompt
from deixis.results import Caption, DenseCaption, Grounding, Segment, Trace
from deixis.tasks import Tasks


class PixelTasks(Tasks[Pipeline, SceneFeatures]):
    """See Tasks."""

    def warmup(self, features: SceneFeatures) -> None:
        pipeline, tasks, options = self.pipeline, self.pipeline.tasks, DecodeOptions(max_new_tokens=2)
        height, width = features.geometry.original
        box = Prompt(box=(0.0, 0.0, width / 2, height / 2))
        if "caption" in tasks:
            self.caption_batch([features], [Prompt()], options)
        if "region_caption" in tasks:
            self.caption_batch([features], [box], options)
        if "dense_captions" in tasks:
            self.dense_captions_batch([features], DenseChoice(limit=1), options)
        if "segment" in tasks:
            self.segment_batch([features], [box], False, options)
        if text := _any_text(pipeline):
            if "refer" in tasks:
                self.refer_batch([features], [text], "mask_decoder" in pipeline.manifest.graphs, options)
            if "trace" in tasks:
                self.trace_batch([features], [text], options)

    def caption_batch(
        self, scenes: Sequence[SceneFeatures], prompts: Sequence[Prompt], options: DecodeOptions
    ) -> list[Caption]:
        return captioning.caption_batch(self.pipeline, scenes, prompts, options)

    def stream_caption(self, scene: SceneFeatures, prompt: Prompt, options: DecodeOptions) -> CaptionStream:
        return captioning.stream_caption(self.pipeline, scene, prompt, options)

    def dense_captions_batch(
        self, scenes: Sequence[SceneFeatures], choice: DenseChoice, options: DecodeOptions
    ) -> list[tuple[DenseCaption, ...]]:
        return dense.dense_captions_batch(self.pipeline, scenes, choice, options)

    def refer_batch(
        self, scenes: Sequence[SceneFeatures], texts: Sequence[str], mask: bool, options: DecodeOptions
    ) -> list[Grounding]:
        return grounding.refer_batch(self.pipeline, scenes, texts, mask, options)

    def trace_batch(self, scenes: Sequence[SceneFeatures], texts: Sequence[str], options: DecodeOptions) -> list[Trace]:
        return grounding.trace_batch(self.pipeline, scenes, texts, options)

    def segment_batch(
        self, scenes: Sequence[SceneFeatures], prompts: Sequence[Prompt], multimask: bool, options: DecodeOptions
    ) -> list[tuple[Segment, ...]]:
        return grounding.segment_batch(self.pipeline, scenes, prompts, multimask, options)


def _any_text(pipeline: Pipeline) -> str | None:
    """The first piece of the vocabulary that is a text by itself: something to warm up with, in any language."""
    for piece in range(pipeline.manifest.tokenizer.vocab_size):
        text = pipeline.tokenizer.decode([piece]).strip()
        try:
            pipeline.tokenizer.encode(text)
        except PromptError:
            continue
        return text
    return None
