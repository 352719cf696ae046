"""What the types of a manifest cannot say: names that refer to each other, ranges, what each family must have."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from deixis.manifest import ImageSpec, Manifest

_CONVERSATION_IDS = (
    "begin_id",
    "end_id",
    "image_start_id",
    "image_end_id",
    "mask_id",
    "phrase_start_id",
    "phrase_end_id",
    "region_id",
)
_FIELDS = ("location", "prompts", "detection", "conversation", "global_image")
# by family: fields that must be there, graphs that must be there
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pixelllm": (("location", "prompts", "caches.cross_cache"), ()),  # a bundle may only segment
    "glamm": (("conversation", "global_image"), ("global_encoder", "decoder_step")),
}
_REDUCED = {"banned", "top_ids", "top_log_probs"}  # tensors of decoder_step that go with `reductions`
_SQUARE = ("center_crop", "stretch")  # rules without padding
_MAY_HAVE: dict[str, tuple[str, ...]] = {"pixelllm": ("detection",), "glamm": ()}


def check_references(manifest: Manifest) -> list[str]:
    """What the dataclasses' types cannot say: names that must refer to each other, ranges that must be ordered."""
    problems = [f"files: {problem}" for name in manifest.files for problem in _path_problems(name)]
    named = [(f"graphs.{role}.file", graph.file) for role, graph in manifest.graphs.items()]
    named += [(f"graphs.{role}.external", name) for role, graph in manifest.graphs.items() for name in graph.external]
    named += [("tokenizer.file", manifest.tokenizer.file), ("golden", manifest.golden)]
    problems += [f"{where}: {name!r} is not listed in files" for where, name in named if name not in manifest.files]
    problems += [
        f"dims.{name}: need 1 <= min <= opt <= max, found {d.min}, {d.opt}, {d.max}"
        for name, d in manifest.dims.items()
        if not 1 <= d.min <= d.opt <= d.max
    ]
    cross = manifest.caches.cross_cache
    positive = {
        "caches.default_capacity": manifest.caches.default_capacity,
        **{f"caches.self_cache.{k}": getattr(manifest.caches.self_cache, k) for k in ("layers", "heads", "head_dim")},
        **{f"caches.cross_cache.{k}": getattr(cross, k) for k in ("layers", "heads", "head_dim") if cross is not None},
        "tokenizer.vocab_size": manifest.tokenizer.vocab_size,
        **({} if manifest.location is None else {"location.points_per_token": manifest.location.points_per_token}),
        **{f"tasks.{k}.max_length": t.max_length for k, t in manifest.tasks.items()},
        **{f"tasks.{k}.beams": t.beams for k, t in manifest.tasks.items()},
        **{f"tasks.{k}.beams_per_node": t.beams_per_node for k, t in manifest.tasks.items()},
    }
    problems += [f"{where}: must be positive, found {value}" for where, value in positive.items() if value < 1]
    tokenizer = manifest.tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("begin_id", "end_id", "pad_id", "unknown_id")}
    problems += [
        f"tokenizer.{name}: must lie in 0..{tokenizer.vocab_size - 1}, found {value}"
        for name, value in ids.items()
        if not 0 <= value < tokenizer.vocab_size
    ]
    problems += _check_image("image", manifest.image)
    if manifest.global_image is not None:
        problems += _check_image("global_image", manifest.global_image)
    problems += _check_detection(manifest)
    problems += _check_conversation(manifest)
    problems += _check_family(manifest)
    problems += _check_reductions(manifest)
    problems += [
        f"files.{name}: needs a sha256 of 64 hexadecimal digits and a size from 0 on"
        for name, info in manifest.files.items()
        if not re.fullmatch(r"[0-9a-f]{64}", info.sha256) or info.bytes < 0
    ]
    return problems


def _check_image(name: str, spec: ImageSpec) -> list[str]:
    """Which of an image's settings go together: those that `deixis.image` knows how to make."""
    known = {
        "fit_inside": (False, "right_bottom"),
        "longest_side": (True, "right_bottom"),
        "center_crop": (True, "none"),
        "stretch": (True, "none"),
    }
    problems = [] if spec.size > 0 else [f"{name}.size: must be positive, found {spec.size}"]
    if (spec.antialias, spec.pad) != known[spec.resize]:
        antialias, pad = known[spec.resize]
        problems.append(
            f"{name}: resize {spec.resize!r} needs antialias {str(antialias).lower()} and pad {pad!r}, "
            f"found {str(spec.antialias).lower()} and {spec.pad!r}"
        )
    if spec.resize == "fit_inside" and spec.interpolation != "bilinear":
        problems.append(f"{name}.interpolation: resize 'fit_inside' is bilinear, found {spec.interpolation!r}")
    return problems


def _check_conversation(manifest: Manifest) -> list[str]:
    spec, vocabulary = manifest.conversation, manifest.tokenizer.vocab_size
    if spec is None:
        return []
    ids = {name: value for name in _CONVERSATION_IDS if (value := getattr(spec, name)) is not None}
    problems = [
        f"conversation.{name}: must lie in 0..{vocabulary - 1}, found {value}"
        for name, value in ids.items()
        if not 0 <= value < vocabulary
    ]
    if len(set(ids.values())) < len(ids):
        problems.append(
            f"conversation: two of its marks have the same id ({', '.join(f'{k} {v}' for k, v in ids.items())})"
        )
    for name in ("begin_id", "end_id"):
        if getattr(spec, name) != getattr(manifest.tokenizer, name):
            problems.append(f"conversation.{name}: differs from tokenizer.{name}")
    if spec.image_tokens < 1:
        problems.append(f"conversation.image_tokens: must be positive, found {spec.image_tokens}")
    if spec.image_sentence.count("<image>") != 1:
        problems.append(f"conversation.image_sentence: must hold <image> once, found {spec.image_sentence[:80]!r}")
    if (spec.region_id is None) == ("region_encoder" in manifest.graphs):
        problems.append("conversation.region_id: goes with the graph region_encoder; one is there without the other")
    return problems


def _check_family(manifest: Manifest) -> list[str]:
    """What a family must have and what it must not. A family that is not known here is refused when it is loaded."""
    family = manifest.model.family
    if family not in _NEEDS:
        return []
    fields = {**{name: getattr(manifest, name) for name in _FIELDS}, "caches.cross_cache": manifest.caches.cross_cache}
    needs, graphs = _NEEDS[family]
    problems = [f"{name}: missing, the family {family} needs it" for name in needs if fields[name] is None]
    problems += [
        f"{name}: the family {family} has none"
        for name, value in fields.items()
        if value is not None and name not in needs and name not in _MAY_HAVE[family]
    ]
    problems += [
        f"graphs.{role}: missing, the family {family} needs it" for role in graphs if role not in manifest.graphs
    ]
    if manifest.image.resize in _SQUARE:
        rule = manifest.image.resize
        problems.append(f"image.resize: masks cannot go back through {rule!r}; use 'fit_inside' or 'longest_side'")
    if manifest.global_image is not None and manifest.global_image.resize not in _SQUARE:
        rule = manifest.global_image.resize
        problems.append(f"global_image.resize: the picture must fill its input; {rule!r} is not one of {_SQUARE}")
    if family == "glamm":
        if ("grounding_encoder" in manifest.graphs) != ("pixel_decoder" in manifest.graphs):
            problems.append("graphs: grounding_encoder and pixel_decoder go together; one is there without the other")
        version = manifest.format.version
        if int(version.split(".")[1]) < 2:  # else an older runtime would call the bundle broken instead of too new
            problems.append(f"format.version: the family glamm needs 1.2, found {version}")
    return problems


def _check_reductions(manifest: Manifest) -> list[str]:
    """`reductions` says that `decoder_step` has them, and how many candidates it gives."""
    spec, step = manifest.reductions, manifest.graphs.get("decoder_step")
    has = set() if step is None else _REDUCED & {*step.inputs, *step.outputs}
    if spec is None:
        return [f"reductions: missing, but graphs.decoder_step has {', '.join(sorted(has))}"] if has else []
    problems = [f"reductions: graphs.decoder_step has no {name}" for name in sorted(_REDUCED - has)]
    if not 1 <= spec.candidates <= manifest.tokenizer.vocab_size:
        most = manifest.tokenizer.vocab_size
        problems.append(f"reductions.candidates: must lie in 1..{most}, found {spec.candidates}")
    if step is not None and not problems:
        for name in ("top_ids", "top_log_probs"):
            if step.outputs[name].shape[-1:] != (spec.candidates,):
                problems.append(f"graphs.decoder_step.outputs.{name}: must have {spec.candidates} of a row")
    return problems


def _check_detection(manifest: Manifest) -> list[str]:
    spec = manifest.detection
    if spec is None:
        return ["graphs.box_refine: needs detection, which is missing"] if "box_refine" in manifest.graphs else []
    problems = [
        f"detection.{name}: must be positive, found {getattr(spec, name)}"
        for name in ("candidates", "proposals", "max_detections", "proposal_iou", "detection_iou", "max_log_scale")
        if not getattr(spec, name) > 0
    ]
    if not 0 <= spec.score_threshold <= 1:
        problems.append(f"detection.score_threshold: must lie in 0..1, found {spec.score_threshold}")
    if len(spec.delta_scale) != 4 or 0 in spec.delta_scale:
        problems.append(f"detection.delta_scale: needs four numbers that are not 0, found {list(spec.delta_scale)}")
    return problems


def _path_problems(name: str) -> list[str]:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or "\\" in name
        or ":" in name
        or ".." in path.parts
        or str(path) != name
        or name in ("", ".")
    ):
        return [f"{name!r} is not a plain path inside the bundle"]
    if not name.isprintable() or len(name.encode("utf-8", "replace")) > 200:  # also keeps lone surrogates out
        return [f"{name[:60]!r} is not a usable file name"]
    return []
