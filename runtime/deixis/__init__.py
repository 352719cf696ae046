"""deixis: run pixel-aligned language models from a bundle, without PyTorch.

    import deixis

    with deixis.load("tabletop") as model:
        scene = model.encode("table.jpg")
        print(scene.caption().text)
        print(scene.refer("the red mug").box)

Names are imported when they are first used, so `import deixis` and `import deixis.bundle` stay light.

The way of a request through the modules, and so where a change belongs:

    model, scene            what the user calls: load, encode, the tasks one by one and in batches, the recent scenes
    image, exif, geometry   a picture to the network input, and the map of points between the two
    captioning, grounding,  one function per task: prompts in, graphs in their order, results out
    dense
    prompts, tokenizer      what the caller points at or says, checked, as arrays for the graphs
    pipeline, batching      every graph as a method on arrays; many requests packed into few runs
    engines                 what runs a graph (onnxruntime)
    caches, decoding        keys and values of the decoder; greedy and beam search
    detection               places to boxes of objects: peaks, suppression, scores
    readout, masks          locations to words and boxes, logits to masks, in pixels of the user's picture
    results                 what comes back; overlay and drawing make pictures of it
    bundle, schema          manifest and files of a bundle; options, errors, files: what they say
    cli                     the `deixis` command

Section numbers in docstrings ("section 8") are those of a specification of PixelLLM that is not in the repository:
2 picture, 5 prompts, 7 text model, 8 locations, 9 masks, 11 decoding (docs/architecture.md has them all).
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
    from deixis.image import load_image
    from deixis.model import Info, Model, load
    from deixis.options import DecodeOptions
    from deixis.prompts import Prompt
    from deixis.results import Caption, DenseCaption, Grounding, Mask, Segment, Trace, Word
    from deixis.scene import Scene

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
    "image": ("load_image",),
    "model": ("Info", "Model", "load"),
    "options": ("DecodeOptions",),
    "prompts": ("Prompt",),
    "results": ("Caption", "DenseCaption", "Grounding", "Mask", "Segment", "Trace", "Word"),
    "scene": ("Scene",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # in the order of use
    "load",
    "Model",
    "Info",
    "Scene",
    "Prompt",
    "DecodeOptions",
    "Caption",
    "CaptionStream",
    "Word",
    "DenseCaption",
    "Trace",
    "Grounding",
    "Segment",
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
