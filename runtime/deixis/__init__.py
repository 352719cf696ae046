"""deixis: run pixel-aligned language models from a bundle, without PyTorch.

    import deixis

    with deixis.load("tabletop") as model:
        scene = model.encode("table.jpg")
        print(scene.caption().text)
        print(scene.refer("the red mug").box)

Names are imported when they are first used, so `import deixis` and `import deixis.bundle` stay light.

The way of a request through the modules, and so where a change belongs:

    model, scene            what the user calls: load, encode, the tasks one by one and in batches, the recent scenes
    families, tasks         which pipeline and which tasks a family of models has; what every family may be asked
    image, exif, geometry,  a picture to the network input, and the map of points between the two
    resample
    pixel_tasks:            the tasks of PixelLLM, one function each: prompts in, graphs in their order, results out
    captioning, grounding,
    dense
    glamm                   the family GLaMM: its pipeline, its language session, its tasks
    prompts, tokenizer,     what the caller points at or says, checked, as arrays for the graphs
    conversation
    pipeline, batching      every graph of PixelLLM as a method on arrays; many requests packed into few runs
    base_pipeline           what the pipelines of both families share
    engines                 what runs a graph (onnxruntime)
    caches, decoding        keys and values of the decoder; greedy and beam search
    detection               places to boxes of objects: peaks, suppression, scores
    readout, masks          locations to words and boxes, logits to masks, in pixels of the user's picture
    results, streams        what comes back; overlay and drawing make pictures of it
    bundle, manifest,       the files of a bundle, its manifest, and what must hold between them; options, errors,
    manifest_checks, schema files: what they say
    cli                     the `deixis` command

Section numbers in docstrings ("section 8") are those of a specification of PixelLLM; in `glamm`, and where GLaMM is
named, of one of GLaMM. Neither is in the repository; docs/architecture.md tells what their sections are about.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from deixis._version import __version__

if TYPE_CHECKING:
    from deixis.bundle import Bundle, Manifest, open_bundle
    from deixis.captioning import CaptionStream
    from deixis.errors import (
        BundleError,
        CancelledError,
        ClosedError,
        DeadlineError,
        DeixisError,
        DeviceError,
        EngineError,
        ImageError,
        PromptError,
        TaskError,
        TextTooLongError,
    )
    from deixis.glamm.conversations import Chat
    from deixis.image import load_image
    from deixis.model import Info, Model, load
    from deixis.options import DecodeOptions
    from deixis.prompts import Prompt, Question
    from deixis.results import (
        Caption,
        DenseCaption,
        GroundedPhrase,
        GroundedText,
        Grounding,
        Mask,
        Segment,
        Trace,
        Word,
    )
    from deixis.scene import Scene
    from deixis.streams import ResultStream

_HOME = {
    "bundle": ("Bundle", "Manifest", "open_bundle"),
    "captioning": ("CaptionStream",),
    "errors": (
        "BundleError",
        "CancelledError",
        "ClosedError",
        "DeadlineError",
        "DeixisError",
        "DeviceError",
        "EngineError",
        "ImageError",
        "PromptError",
        "TaskError",
        "TextTooLongError",
    ),
    "glamm.conversations": ("Chat",),
    "image": ("load_image",),
    "model": ("Info", "Model", "load"),
    "options": ("DecodeOptions",),
    "prompts": ("Prompt", "Question"),
    "results": (
        "Caption",
        "DenseCaption",
        "GroundedPhrase",
        "GroundedText",
        "Grounding",
        "Mask",
        "Segment",
        "Trace",
        "Word",
    ),
    "scene": ("Scene",),
    "streams": ("ResultStream",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # in the order of use
    "load",
    "Model",
    "Info",
    "Scene",
    "Prompt",
    "Question",
    "DecodeOptions",
    "Caption",
    "CaptionStream",
    "Word",
    "DenseCaption",
    "Trace",
    "Grounding",
    "Segment",
    "GroundedText",
    "GroundedPhrase",
    "ResultStream",
    "Chat",
    "Mask",
    "load_image",
    "Bundle",
    "Manifest",
    "open_bundle",
    "DeixisError",
    "BundleError",
    "DeviceError",
    "EngineError",
    "ImageError",
    "PromptError",
    "TextTooLongError",
    "TaskError",
    "DeadlineError",
    "CancelledError",
    "ClosedError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deixis' has no attribute {name!r}")
    value = getattr(import_module(f"deixis.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
