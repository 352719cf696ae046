"""Comparisons of single modules: pictures, CLIP, projector, region encoder, SAM's encoder and mask decoder."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deixis.image import fit, middle
from deixis_export.parity.glamm.backend import Floats, as_floats, as_ids
from deixis_export.parity.glamm.context import PICTURES, GlammContext, maps_of, size_of
from deixis_export.parity.report import EXACT, Absent, Array, GoldenFile, Report
from deixis_train.glamm.pictures import global_input, grounding_input
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.reference import postprocess
from deixis_train.models.glamm.region_encoder import RegionEncoder
from deixis_train.models.sam_vit import SamVit

NEAR = 1e-4  # of the largest logit: a mask's pixel this near to 0 may fall on either side


def preprocess(context: GlammContext, file: GoldenFile, report: Report) -> None:
    """What the runtime makes of the pictures. Normalisation is inside the encoders, so it is read off PyTorch."""
    for number in context.pictures:

        def original(number: int = number) -> Array:
            return file[f"image{number}_uint8"]

        def resized(number: int = number) -> Array:
            return fit(original(number), context.grounding_spec)[0]

        report.check(
            file,
            f"clip{number}_resized_cropped_uint8",
            lambda n=number: middle(original(n), context.global_spec),
            EXACT,
        )
        report.check(file, f"sam{number}_resized_uint8", lambda n=number: resized(n), EXACT)
        report.check(file, f"sam{number}_resize_hw", lambda n=number: np.array(resized(n).shape[:2]), EXACT)
        _as_in_training(context, file, report, number, original)
        step = _stride(file, f"clip{number}_pixels_stride")
        if step is not None:
            report.check(
                file,
                f"clip{number}_pixels_stride{step}",
                context.in_torch(
                    lambda m, n=number, s=step: _clip_pixels(m, context.picture(n).global_image)[:, ::s, ::s]
                ),
            )
        report.check(file, f"sam{number}_input", context.in_torch(lambda m, n=number: _sam_pixels(m, context, n)))
        file.skip(f"clip{number}_requant_maxdiff")


def _as_in_training(
    context: GlammContext, file: GoldenFile, report: Report, number: int, original: Callable[[], Array]
) -> None:
    """Training prepares pictures with Pillow itself."""

    def resized() -> Array:
        padded, (height, width) = grounding_input(original(), context.config.image_size)
        return padded[:height, :width]

    def whole() -> Array:
        return global_input(original(), context.config.clip.image_size)

    label = " (training)"
    report.check(file, f"clip{number}_resized_cropped_uint8", context.torch_only(whole), EXACT, label=label)
    report.check(file, f"sam{number}_resized_uint8", context.torch_only(resized), EXACT, label=label)


def _stride(file: GoldenFile, prefix: str) -> int | None:
    """The number that ends the only array's name with that prefix."""
    found = [name.removeprefix(prefix) for name in file if name.startswith(prefix)]
    return int(found[0]) if found else None


def _clip_pixels(model: Glamm, image: Floats) -> Tensor:
    return ((as_floats(image) - model.clip_mean) / model.clip_std).permute(2, 0, 1)


def _sam_pixels(model: Glamm, context: GlammContext, number: int) -> Tensor:
    picture = context.picture(number)
    valid = torch.tensor([picture.valid], dtype=torch.float32)
    return model.sam_preprocess(as_floats(picture.image)[None], valid)[0].permute(2, 0, 1)


def clip(context: GlammContext, file: GoldenFile, report: Report) -> None:
    file.skip("pixels_from")
    maps: list[list[Floats]] = []

    def level(number: int) -> Array:
        if not maps:
            maps.append(context.backend.encode_global(context.global_images())[1])
        if number >= len(maps[0]):
            raise Absent(f"the model has {len(maps[0])} maps")
        return maps[0][number].reshape(len(maps[0][number]), -1, maps[0][number].shape[-1])

    def states(model: Glamm) -> list[Tensor]:
        return model.clip((as_floats(context.global_images()) - model.clip_mean) / model.clip_std)

    levels = sum(name.startswith("level") for name in file)
    layers = context.in_torch(lambda m: torch.tensor(m.region_layers))
    report.check(file, "selected_hidden_indices", layers, EXACT)
    report.check(file, "num_hidden_states", context.in_torch(lambda m: torch.tensor(m.config.clip.depth + 1)), EXACT)
    for number in range(levels):
        report.check(file, f"level{number}", lambda n=number: level(n))
    report.check(file, f"cls_level{levels - 1}", context.in_torch(lambda m: states(m)[-1][:, 0]))

    def first(model: Glamm) -> Tensor:
        whole = states(model)[0]
        wanted = file["embeddings_after_preln_stride"].shape[1]
        return whole[:, :: -(-whole.shape[1] // wanted)]

    report.check(file, "embeddings_after_preln_stride", context.in_torch(first))


def projector(context: GlammContext, file: GoldenFile, report: Report) -> None:
    file.skip("input_from")
    report.check(
        file,
        "output",
        lambda: context.backend.encode_global(context.global_images())[0][:, file["tok_idx"].astype(np.int64)],
    )
    last = sorted(name for name in context.open("clip.npz") if name.startswith("level"))
    if last:  # the module alone, on the file's own features
        report.check(
            file,
            "output",
            context.in_torch(
                lambda m: m.projector(as_floats(context.open("clip.npz")[last[-1]])[:, as_ids(file["tok_idx"])])
            ),
            label=" (alone)",
        )


def region_encoder(context: GlammContext, file: GoldenFile, report: Report) -> None:
    count = len([name for name in file if name.startswith("boxes")])
    source = context.open("clip.npz")
    levels = sorted((name for name in source if name.startswith("level")), key=lambda name: int(name[5:]))

    def maps() -> list[Floats]:
        if not levels:
            raise Absent("clip.npz has no levels")
        return [maps_of(source[name]) for name in levels]

    def boxes() -> tuple[Floats, Array]:
        parts = [file[f"boxes{n}"] for n in range(count)]
        return np.concatenate(parts).astype(np.float32), np.repeat(np.arange(count), [len(part) for part in parts])

    def regions(number: int) -> Array:
        places, index = boxes()
        return context.backend.encode_regions(maps(), places, index)[index == number]

    def inside(compute: Callable[[RegionEncoder], Tensor]) -> Callable[[], Array]:
        def run(model: Glamm) -> Tensor:
            if model.region_encoder is None:
                raise Absent("the model has no region encoder")
            return compute(model.region_encoder)

        return context.in_torch(run)

    def fused(encoder: RegionEncoder) -> list[Tensor]:
        return encoder.fuse([as_floats(level) for level in maps()])

    def crops(encoder: RegionEncoder) -> list[Tensor]:
        places, index = boxes()
        return encoder.roi_align.crops(fused(encoder), as_floats(places), as_ids(index))

    def flat(encoder: RegionEncoder) -> Tensor:
        head = encoder.roi_align
        convolved = [conv(crop) for conv, crop in zip(head.pconvs, crops(encoder), strict=True)]
        return head.flatten_linear(torch.relu(torch.stack(convolved).sum(0)).flatten(1))

    for number in range(count):
        report.check(file, f"out{number}", lambda n=number: regions(n))
    for name in sorted(file):
        part, _, rest = name.partition("_")
        if part == "fused":
            level, step = rest[1:].split("_stride")
            report.check(file, name, inside(lambda e, i=int(level), s=int(step): fused(e)[i][:, :, ::s, ::s]))
        elif part == "roi":
            level, *chosen = rest[1:].replace("_boxes", "").split("_")
            report.check(file, name, inside(lambda e, i=int(level), c=chosen: crops(e)[i][[int(n) for n in c]]))
    report.check(file, "pos_embed", inside(lambda e: e.roi_align.pos_embedd(as_floats(boxes()[0]))))
    report.check(file, "flatten_out", inside(flat))


def text_hidden_fcs(context: GlammContext, file: GoldenFile, report: Report) -> None:
    report.check(file, "output", context.in_torch(lambda m: m.mask_projection(as_floats(file["input"]))))


def sam_image_encoder(context: GlammContext, file: GoldenFile, report: Report) -> None:
    def pixels() -> Floats:
        """The file gives normalised pixels; the encoders take 0..255."""
        mean, std = np.array(context.config.pixel_mean_sam), np.array(context.config.pixel_std_sam)
        return (file["pixels"].astype(np.float64).transpose(0, 2, 3, 1) * std + mean).astype(np.float32)

    def embedding() -> Array:
        images = pixels()
        sizes = np.tile(np.array(images.shape[1:3], np.float32), (len(images), 1))
        return context.backend.encode_grounding(images, sizes).transpose(0, 3, 1, 2)

    def block(model: Glamm, wanted: int) -> Tensor:
        encoder = model.sam_encoder
        if not isinstance(encoder, SamVit):
            raise Absent("the grounding encoder has no such blocks")
        x = encoder.patch_embed(as_floats(file["pixels"]).permute(0, 2, 3, 1)) + encoder.pos_resize(encoder.pos_embed)
        for module in encoder.blocks[: wanted + 1]:
            x = module(x)
        return x

    report.check(file, "embedding", embedding)
    for name in sorted(file):
        if name.startswith("block"):
            report.check(file, name, context.in_torch(lambda m, n=int(name[5:]): block(m, n)))


def mask_decoder(context: GlammContext, file: GoldenFile, report: Report) -> None:
    def decoded(model: Glamm) -> tuple[Tensor, Tensor]:
        sparse = as_floats(file["text_embeds"])
        sam = as_floats(context.open("sam_image_encoder.npz")["embedding"])[:1].permute(0, 2, 3, 1)
        image_pe = model.prompt_encoder.dense_pe(*sam.shape[1:3])
        return model.mask_decoder(sparse, sam.expand(len(sparse), -1, -1, -1), image_pe, model.prompt_encoder.no_mask())

    def prompts(model: Glamm) -> Tensor:
        """Points, both corners of the box, then the text."""
        corners = as_floats(file["boxes"]).unflatten(1, (2, 2))
        points = torch.cat([as_floats(file["points"]), corners], dim=1)
        labels = torch.cat([as_ids(file["point_labels"]), torch.tensor([[2, 3]] * len(corners))], dim=1)
        text = as_floats(file["text_embeds"])[: len(points)]
        return torch.cat([model.prompt_encoder(points, labels), text], dim=1)

    def dense(model: Glamm) -> Tensor:
        return model.prompt_encoder.no_mask()[:, :, None, None].expand(file["dense"].shape)

    def whole(model: Glamm) -> Tensor:
        height, width = file["dense_pe"].shape[2:]
        return model.prompt_encoder.dense_pe(height, width).permute(2, 0, 1)[None]

    def masked(model: Glamm) -> Tensor:
        if model.prompt_encoder.mask_downscaling is None:
            raise Absent("the model takes no masks as prompts")
        return model.prompt_encoder.embed_masks(as_floats(file["mask_in"])[:, 0]).permute(0, 3, 1, 2)

    report.check(file, "sparse", context.in_torch(lambda m: as_floats(file["text_embeds"])))  # taken as it is
    report.check(file, "dense", context.in_torch(dense))
    report.check(file, "dense_pe", context.in_torch(whole))
    report.check(file, "sparse_all", context.in_torch(prompts))
    report.check(file, "dense_all", context.in_torch(masked))
    for name, part in (("low_res", slice(0, 1)), ("low_res_multi", slice(1, None))):
        report.check(file, name, context.in_torch(lambda m, p=part: decoded(m)[0][:, p]))
    for name, part in (("iou", slice(0, 1)), ("iou_multi", slice(1, None))):
        report.check(file, name, context.in_torch(lambda m, p=part: decoded(m)[1][:, p]))

    def sizes() -> tuple[tuple[int, int], tuple[int, int]]:
        return size_of(file["post_input_hw"]), size_of(file["post_orig_hw"])

    report.check(
        file, "post", context.in_torch(lambda m: postprocess(as_floats(file["low_res"][:, 0]), *sizes())[:, None])
    )
    check_masks(report, file, "post", lambda: context.backend.masks(file["low_res"][:, 0], *sizes())[:, None])


def check_masks(
    report: Report, file: GoldenFile, name: str, compute: Callable[[], Array], label: str = " (mask)"
) -> None:
    """Compare masks with the sign of a file's logits, pixels aside whose logit is next to nothing."""

    def agreed() -> Array:
        wanted = file[name]
        found = np.asarray(compute())
        if found.shape != wanted.shape:
            return found
        near = np.abs(wanted) <= NEAR * max(1.0, float(np.abs(wanted).max(initial=0)))
        return np.where(near, wanted, np.where(found, 1.0, -1.0))

    report.check(file, name, agreed, EXACT, view=lambda values: values > 0, label=label)


CASES: dict[str, Callable[[GlammContext, GoldenFile, Report], None]] = {
    PICTURES: preprocess,
    "clip.npz": clip,
    "projector.npz": projector,
    "region_encoder.npz": region_encoder,
    "text_hidden_fcs.npz": text_hidden_fcs,
    "sam_image_encoder.npz": sam_image_encoder,
    "sam_prompt_and_decoder.npz": mask_decoder,
}
