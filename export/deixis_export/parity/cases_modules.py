"""Comparisons of single modules. Each function takes one golden file; shapes decide everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from deixis_export.parity.backend import Floats, Ids, TextPass
from deixis_export.parity.context import Context, as_floats, as_ids, emitted, part, scores_of_filled
from deixis_export.parity.report import EXACT, GoldenFile, Report, TorchOnly
from deixis_train.models.decoding import zero_after_end
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.point_head import points_to_box, to_pixels, valid_tokens
from deixis_train.models.preprocess import Preprocess, padding_mask
from deixis_train.models.prompt_encoder import NOT_A_POINT, corner_prompt, corners
from deixis_train.models.resample import resample_matrix, resize
from deixis_train.models.t5 import relative_buckets
from deixis_train.tasks import REFER_RULE, TRACE_RULE

POINT_RULES = {"trace": TRACE_RULE, "ref": REFER_RULE, "endonly": "^end", "text": "text", "none": ""}


def preprocess(context: Context, file: GoldenFile, report: Report) -> None:
    report.check(file, "image_shape", context.torch_only(lambda: context.valid_hw), EXACT)

    def mask(model: PixelLLM) -> Tensor:
        return padding_mask(as_floats(context.valid_hw), context.image.shape[1])[..., 0]

    report.check(file, "padding_mask", context.in_torch(mask), EXACT)
    for name in file:
        if not (match := re.fullmatch(r"(git|sam)_input(_small)?_sub(\d+)", name)):
            continue

        def network_input(model: PixelLLM, match: re.Match[str] = match) -> Tensor:
            branch, small, every = match[1], match[2], int(match[3])
            step = model.semantic_preprocess if branch == "git" else model.sam_preprocess
            if small:
                size = int(file["small_size"][0])
                step = Preprocess(context.image.shape[1], size, step.mean.tolist(), step.std.tolist())
            return step(as_floats(context.image), as_floats(context.valid_hw))[:, ::every, ::every]

        report.check(file, name, context.in_torch(network_input))


def resampling(context: Context, file: GoldenFile, report: Report) -> None:
    for name in file:
        if not name.endswith("_out"):
            continue

        def resampled(model: PixelLLM, name: str = name) -> Tensor:
            given, wanted = as_floats(file[name.removesuffix("_out") + "_in"]), file[name].shape
            if given.ndim == 2:
                return resample_matrix(given.shape[0], wanted[0], "linear") @ given
            return resize(given, (wanted[1], wanted[2]), "cubic" if name.startswith("bicubic") else "linear")

        report.check(file, name, context.in_torch(resampled))


def _outputs(run: Callable[[], Tensor], watched: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the watched modules gave during `run`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _inside(
    context: Context, file: GoldenFile, report: Report, seen: Callable[[PixelLLM], Mapping[str, Tensor]]
) -> None:
    for name in file:
        report.check(file, name, context.in_torch(lambda model, name=name: seen(model)[name]))


def semantic_encoder(context: Context, file: GoldenFile, report: Report) -> None:
    cache: dict[str, Tensor] = {}

    def seen(model: PixelLLM) -> Mapping[str, Tensor]:
        if not cache:
            encoder = model.semantic_encoder
            watched: dict[str, nn.Module] = {"patch_embed": encoder.patch_embed, "tokens": encoder.norm}
            for i, block in enumerate(encoder.blocks):
                watched[f"after_block{i}"] = block
                watched |= {f"block{i}_{name}": block.get_submodule(name) for name in ("attn", "mlp")}
            image = model.semantic_preprocess(as_floats(context.image), as_floats(context.valid_hw))
            cache.update(_outputs(lambda: encoder(image), watched))
        return cache

    _inside(context, file, report, seen)


def sam_encoder(context: Context, file: GoldenFile, report: Report) -> None:
    cache: dict[str, Tensor] = {}

    def seen(model: PixelLLM) -> Mapping[str, Tensor]:
        if not cache:
            encoder = model.sam_encoder
            watched: dict[str, nn.Module] = {"patch_embed": encoder.patch_embed}
            watched |= {f"after_block{i}": block for i, block in enumerate(encoder.get_submodule("blocks").children())}
            image = model.sam_preprocess(as_floats(context.image), as_floats(context.valid_hw))
            cache.update(_outputs(lambda: encoder(image), watched))
        return cache

    report.check(file, "features", lambda: emitted(context.images.sam))
    for name in file:
        if name != "features":
            report.check(file, name, context.in_torch(lambda model, name=name: seen(model)[name]))


def features(context: Context, file: GoldenFile, report: Report) -> None:
    report.check(file, "concat", lambda: emitted(context.images.features))


def prompt_encoder(context: Context, file: GoldenFile, report: Report) -> None:
    def points(pad: bool) -> Callable[[PixelLLM], Tensor]:
        def encode(model: PixelLLM) -> Tensor:
            places, labels = as_floats(file["points"]), as_ids(file["labels"])
            if pad:
                places = nn.functional.pad(places, (0, 0, 0, 1))
                labels = nn.functional.pad(labels, (0, 1), value=NOT_A_POINT)
            return model.prompt_encoder(places, labels)

        return encode

    def box_points(model: PixelLLM) -> Tensor:
        return corner_prompt(as_floats(file["boxes"]))[0][:, :4]

    def unit_corners(model: PixelLLM) -> Tensor:
        return corner_prompt(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))[0][0, :4]

    report.check(file, "points_embed_padded", context.in_torch(points(pad=True)))
    report.check(file, "points_embed_nopad", context.in_torch(points(pad=False)))
    report.check(file, "boxes_embed", context.in_torch(lambda m: m.prompt_encoder(*corners(as_floats(file["boxes"])))))
    report.check(file, "box_points", context.in_torch(box_points))
    report.check(file, "grid_side2", context.in_torch(unit_corners))
    size = context.in_torch(lambda model: torch.tensor([model.prompt_encoder.image_size] * 2))
    report.check(file, "image_size", size, EXACT)
    for name in file:
        if name.startswith("dense_pe"):
            height, width = file[name].shape[:2]
            dense = context.in_torch(lambda model, h=height, w=width: model.prompt_encoder.dense_pe(h, w))
            report.check(file, name, dense)


def prompt_adapter(context: Context, file: GoldenFile, report: Report) -> None:
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sparse = as_floats(file["sparse_prompt"])
        image_index = torch.zeros(len(sparse), dtype=torch.int64)
        names = ("image_embeddings", "image_pe", "dense_prompt")
        image, image_pe, dense = (as_floats(file[name]) for name in names)
        return image[None], image_index, image_pe, sparse, dense

    report.check(file, "sparse_out", context.in_torch(lambda model: model.prompt_adapter(*inputs())))
    report.check(file, "dense_out", context.in_torch(lambda model: model.prompt_adapter.dense_output(*inputs())))


def visual_projection(context: Context, file: GoldenFile, report: Report) -> None:
    report.check(file, "y", context.in_torch(lambda model: model.visual_projection(as_floats(file["x"]))))


def text(context: Context, file: GoldenFile, report: Report) -> None:
    cache: dict[bool, TextPass] = {}

    def run(with_context: bool) -> TextPass:
        if with_context not in cache:
            ids = file["context_tokens"].astype(np.int64) if with_context else None
            tokens = file["text_tokens"].astype(np.int64)
            cache[with_context] = context.backend.text_pass(file["visual"], ids, tokens)
        return cache[with_context]

    report.check(file, "encoded", lambda: emitted(run(True).encoded))
    report.check(file, "encoder_valid_mask", lambda: emitted(run(True).valid), EXACT)
    # A position is inactive when the next token is 0. Its values mean nothing but are reproducible; a line of their own
    # keeps them from hiding, or being hidden by, the others.
    following = np.pad(file["text_tokens"][:, 1:], ((0, 0), (0, 1))) if "text_tokens" in file else np.zeros((0, 0))
    for label, view in {
        "": lambda array: array[following != 0],
        " (inactive positions)": lambda array: array[following == 0],
    }.items():
        for suffix, with_context in {"": True, "_noctx": False}.items():
            report.check(file, f"feats{suffix}", lambda w=with_context: run(w).features, view=view, label=label)
            report.check(file, f"logits{suffix}", lambda w=with_context: emitted(run(w).logits), view=view, label=label)

    for name in ("bidirectional", "causal"):

        def buckets(model: PixelLLM, both: bool = name == "bidirectional") -> Tensor:
            sizes = model.config.t5
            return relative_buckets(as_ids(file["relpos"]), both, sizes.relpos_buckets, sizes.relpos_max_distance)

        report.check(file, f"bucket_{name}", context.in_torch(buckets), EXACT)


def point_predictor(context: Context, file: GoldenFile, report: Report) -> None:
    decoding = context.decoding(1)

    def coords(model: PixelLLM) -> Tensor:
        return part(model.point_predictor, "point predictor")(as_floats(file["feats"]))

    def spare(model: PixelLLM) -> Tensor:
        return part(model.point_predictor, "point predictor").spare(as_floats(file["feats"]))

    def pixels(model: PixelLLM) -> Tensor:
        relative = coords(model)
        size = as_floats(file["image_shape_hw"]).repeat_interleave(relative.shape[1], dim=0)
        return to_pixels(relative.flatten(0, 1), size).reshape(relative.shape)

    def mask(rule: str) -> Callable[[PixelLLM], Tensor]:
        return lambda model: valid_tokens(as_ids(file["tokens"]), rule, decoding.begin_id, decoding.end_id)

    def zeroed() -> Tensor:
        return zero_after_end(as_ids(file["tokens"]), decoding.end_id)

    def box(rule: str) -> Callable[[PixelLLM], Tensor]:
        return lambda model: points_to_box(
            pixels(model), valid_tokens(zeroed(), rule, decoding.begin_id, decoding.end_id)
        )

    report.check(file, "coords_rel", context.in_torch(coords))
    report.check(file, "logits", context.in_torch(spare))
    report.check(file, "coords_abs", context.in_torch(pixels))
    report.check(file, "tokens_after_eos_zeroed", context.in_torch(lambda model: zeroed()), EXACT)
    for name, rule in POINT_RULES.items():
        report.check(file, f"mask__{name}", context.in_torch(mask(rule)), EXACT)
    report.check(file, "box_from_eos_token", context.in_torch(box(POINT_RULES["ref"])))
    report.check(file, "box_from_all_tokens", context.in_torch(box(POINT_RULES["trace"])))


def mask_decoder(context: Context, file: GoldenFile, report: Report) -> None:
    def adapted(model: PixelLLM) -> Tensor:
        visual, words = as_floats(file["visual"]), as_floats(file["text_feats"])
        delta = part(model.mask_adapter, "mask adapter")(visual.flatten(0, 1), words.flatten(0, 1))
        return as_floats(file["sparse_embed"]) + delta.unflatten(0, visual.shape[:2])

    def decode(model: PixelLLM, sparse: Tensor) -> tuple[Tensor, Tensor]:
        image = as_floats(file["image_embeddings"]).expand(len(sparse), -1, -1, -1)
        decoder = part(model.mask_decoder, "mask decoder")
        return decoder(sparse, image, as_floats(file["image_pe"]), as_floats(file["dense"]))

    def single(which: int) -> Callable[[PixelLLM], Tensor]:
        return lambda model: decode(model, as_floats(file["adapted"]).flatten(0, 1))[which][:, :1]

    def multi(which: int) -> Callable[[PixelLLM], Tensor]:
        return lambda model: decode(model, as_floats(file["sparse_embed"]))[which][:, 1:]

    report.check(file, "adapted", context.in_torch(adapted))
    report.check(file, "masks_single", context.in_torch(single(0)))
    report.check(file, "iou_single", context.in_torch(single(1)))
    report.check(file, "masks_multi_noadapter", context.in_torch(multi(0)))
    report.check(file, "iou_multi_noadapter", context.in_torch(multi(1)))


def decode_table(context: Context, file: GoldenFile, report: Report) -> None:
    def search(beams: int, per_node: int) -> tuple[Ids, Floats]:
        table, begin = file["table"], file["begin"].astype(np.int64)
        offsets = np.repeat(file["offsets"], beams, axis=0)

        def logits_fn(tokens: Ids, position: int) -> Floats:
            return table[position, tokens[:, position]] + offsets

        found = context.backend.search(logits_fn, begin, context.decoding(beams, per_node))
        if found is None:
            raise TorchOnly
        return found

    report.check(file, "greedy_tokens", lambda: search(1, 1)[0][:, -1], EXACT)
    report.check(file, "greedy_log_probs", lambda: search(1, 1)[1][:, -1])
    for name in file:
        if match := re.fullmatch(r"beam(\d+)_pn(\d+)_(tokens|scores)", name):
            settings = int(match[1]), int(match[2])
            if match[3] == "tokens":
                report.check(file, name, lambda s=settings: search(*s)[0], EXACT)
            else:
                report.check(file, name, lambda s=settings: search(*s)[1], view=scores_of_filled)


CASES: dict[str, Callable[[Context, GoldenFile, Report], None]] = {
    "preprocess.npz": preprocess,
    "resize.npz": resampling,
    "eva02.npz": semantic_encoder,
    "sam.npz": sam_encoder,
    "features.npz": features,
    "prompt_encoder.npz": prompt_encoder,
    "prompt_adapter.npz": prompt_adapter,
    "visual_projection.npz": visual_projection,
    "t5.npz": text,
    "point_predictor.npz": point_predictor,
    "mask_decoder.npz": mask_decoder,
    "decode_table.npz": decode_table,
}
