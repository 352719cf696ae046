"""What is asked of a bundle: a request per task that it can do, always the same work.

Two requests start from a picture: `encode`, and the family's first text. All others are prompts on scenes that were
encoded and prompted before, so that nothing of the encoders is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import deixis
from deixis.glamm.pipeline import GlammPipeline
from deixis.pipeline import Pipeline
from deixis_bench.bench import forced
from deixis_bench.bench.forced import Generated
from deixis_bench.bench.settings import Settings, make_pictures, region, text_of

MASKS = 2  # of a grounded caption
REFER_TOKENS = 8  # of GLaMM's answer with one mask: "Sure, it is [SEG]." has about as many
DENSE = 8  # boxes that are described, at most


@dataclass(frozen=True)
class Request:
    """One call to be timed.

    run: does it on scenes that were encoded before, or on none when it starts from pictures. tokens: that each row
    generates; 0 = none, or as many as the model likes. given: tokens of the text that is given to each row.
    """

    task: str
    run: Callable[[list[deixis.Scene]], Generated]
    from_picture: bool = False
    tokens: int = 0
    given: int = 0


def make_requests(model: deixis.Model, settings: Settings) -> list[Request]:
    """Requests of all tasks that the bundle can do; the first is its reference, from which stages are taken first.

    Raises PromptError when the settings do not fit the bundle.
    """
    if isinstance(model.pipeline, GlammPipeline):
        return _Glamm(model, model.pipeline, settings).requests()
    assert isinstance(model.pipeline, Pipeline)
    return _PixelLLM(model, model.pipeline, settings).requests()


class _Requests:
    """What the requests of both families need."""

    def __init__(self, model: deixis.Model, settings: Settings) -> None:
        self.model = model
        self.tokens = settings.new_tokens
        self.given = settings.prompt_tokens
        self.pictures = make_pictures(settings.batch, settings.seed)

    def encode(self) -> list[deixis.Scene]:
        return self.model.encode(self.pictures)

    def encoding(self) -> Request:
        return Request("encode", lambda scenes: Generated(results=list(self.encode())), from_picture=True)

    def text(self, most: int) -> tuple[str, int]:
        """A text of as many tokens as wanted, or as the task takes, and how many these are."""
        count = min(self.given, most)
        return text_of(self.model.pipeline, count), count


class _PixelLLM(_Requests):
    def __init__(self, model: deixis.Model, pipeline: Pipeline, settings: Settings) -> None:
        super().__init__(model, settings)
        self.pipeline = pipeline

    def requests(self) -> list[Request]:
        can, found = self.pipeline.tasks, list[Request]()
        if "caption" in can:
            found.append(Request("caption", lambda _: self._caption(self.encode()), True, self.tokens))
        found.append(self.encoding())
        if "caption" in can:
            found.append(Request("caption_again", self._caption, tokens=self.tokens))
        if "region_caption" in can:
            found.append(Request("region_caption", self._region, tokens=self.tokens))
        if "refer" in can:
            found.append(self._refer())
        if "trace" in can:
            found.append(self._trace())
        if "segment" in can:
            found.append(Request("segment", self._segment))
        if "dense_captions" in can:
            found.append(Request("dense_captions", self._dense))
        return found

    def _caption(self, scenes: list[deixis.Scene]) -> Generated:
        return forced.captions(self.pipeline, scenes, [deixis.Prompt()] * len(scenes), self.tokens)

    def _region(self, scenes: list[deixis.Scene]) -> Generated:
        prompts = [deixis.Prompt(box=region(scene.size)) for scene in scenes]
        return forced.captions(self.pipeline, scenes, prompts, self.tokens)

    def _refer(self) -> Request:
        task = self.pipeline.task("refer")
        around = task.instruction.replace("{text}", "").strip()
        used = len(self.pipeline.tokenizer.encode(around).ids) if around else 0
        text, count = self.text(min(task.max_length - 2, task.instruction_tokens - 1 - used))
        mask = "mask_decoder" in self.model.manifest.graphs

        def run(scenes: list[deixis.Scene]) -> Generated:
            return Generated(results=self.model.refer_batch([(scene, text) for scene in scenes], mask=mask))

        return Request("refer", run, given=count)

    def _trace(self) -> Request:
        text, count = self.text(self.pipeline.task("trace").max_length - 2)

        def run(scenes: list[deixis.Scene]) -> Generated:
            return Generated(results=self.model.trace_batch([(scene, text) for scene in scenes]))

        return Request("trace", run, given=count)

    def _segment(self, scenes: list[deixis.Scene]) -> Generated:
        items = [(scene, deixis.Prompt(box=region(scene.size))) for scene in scenes]
        return Generated(results=self.model.segment_batch(items))

    def _dense(self, scenes: list[deixis.Scene]) -> Generated:
        options = deixis.DecodeOptions(max_new_tokens=self.tokens, beams=1)
        return Generated(results=self.model.dense_captions_batch(scenes, limit=DENSE, options=options))


class _Glamm(_Requests):
    def __init__(self, model: deixis.Model, pipeline: GlammPipeline, settings: Settings) -> None:
        super().__init__(model, settings)
        self.pipeline = pipeline

    def requests(self) -> list[Request]:
        can, found = self.pipeline.tasks, list[Request]()
        if "grounded_caption" in can:
            found.append(
                Request(
                    "grounded_caption", lambda _: self._grounded(self.encode()), from_picture=True, tokens=self.tokens
                )
            )
        found.append(self.encoding())
        if "caption" in can:
            found.append(Request("caption_again", lambda scenes: self._answer(scenes, "caption"), tokens=self.tokens))
        if "region_caption" in can:
            found.append(Request("region_caption", self._region, tokens=self.tokens))
        if "ask" in can:
            text, count = self.text(self.pipeline.task("ask").instruction_tokens)
            found.append(
                Request("ask", lambda scenes: self._answer(scenes, "ask", text), tokens=self.tokens, given=count)
            )
        if "refer" in can:
            found.append(self._refer())
        return found

    def _answer(self, scenes: list[deixis.Scene], task: str, text: str = "") -> Generated:
        return forced.answers(self.pipeline, scenes, task, text, self.tokens)

    def _grounded(self, scenes: list[deixis.Scene]) -> Generated:
        masks = min(MASKS, self.tokens)
        return forced.answers(self.pipeline, scenes, "grounded_caption", "", self.tokens, masks=masks)

    def _region(self, scenes: list[deixis.Scene]) -> Generated:
        boxes = [region(scenes[0].size)]
        return forced.answers(self.pipeline, scenes, "region_caption", "", self.tokens, boxes)

    def _refer(self) -> Request:
        task = self.pipeline.task("refer")
        around = task.instruction.replace("{text}", "").strip()
        text, count = self.text(task.instruction_tokens - 1 - len(self.pipeline.tokenizer.encode(around).ids))
        tokens = min(REFER_TOKENS, self.tokens)

        def run(scenes: list[deixis.Scene]) -> Generated:
            return forced.answers(self.pipeline, scenes, "refer", text, tokens, masks=1)

        return Request("refer", run, tokens=tokens, given=count)
