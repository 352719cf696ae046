"""Train the demo model, stage by stage; docs/training.md says what each stage does."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from deixis_train.checkpoint import SAM_PARTS, save_checkpoint
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.tiny_vit import TinyVit
from deixis_train.tabletop.cells import Names
from deixis_train.tabletop.rows import CAPTION, REFER, REGION
from deixis_train.tabletop.scenes import (
    batches,
    normalize_small,
    prepare_pictures,
    prepare_sam,
    read_shard,
    save_array,
    shards,
)
from deixis_train.tabletop.tokenizer import build_tokenizer
from deixis_train.tabletop.train import TRAINED, make_helpers, train
from deixis_train.tabletop.warmup import warm_up


def words_of(scene: dict) -> set[str]:
    texts = [record["text"] for name in ("expressions", "regions") for record in scene[name]]
    return {word for text in texts for word in text.split()} | {w for c in scene["captions"] for w in c["words"]}


def load_tokenizer(data: Path, out: Path, size: int) -> Tokenizer:
    """The run's tokenizer; built from the words of the scenes the first time."""
    path = out / "tokenizer.json"
    if not path.exists():
        words = set(f"{CAPTION} {REGION} {REFER}".replace(":", "").replace("{text}", "").split())
        for shard in shards(data):
            for scene in read_shard(shard):
                words |= words_of(scene)
        tokenizer = build_tokenizer({w for w in words if w.isalpha()}, size)
        temporary = path.with_suffix(".tmp")
        tokenizer.save(str(temporary))
        temporary.replace(path)
    return Tokenizer.from_file(str(path))


def class_names(data: Path) -> Names:
    things = [thing for shard in shards(data) for scene in read_shard(shard) for thing in scene["objects"]]
    return {"kinds": sorted({t["kind"] for t in things}), "colours": sorted({t["color"] for t in things})}


@torch.inference_mode()
def prepare_semantic(model: PixelLLM, cache: Path, shard: Path) -> None:
    """Write `<shard>.semantic.npy`: features of the warmed-up encoder on the fused grid, float16."""
    target = cache / f"{shard.stem}.semantic.npy"
    if target.exists():
        return
    small = torch.from_numpy(np.load(cache / f"{shard.stem}.small.npy"))
    parts = []
    for part in batches(len(small), 32):
        encoded = model.semantic_encoder(normalize_small(model, small[part]))
        parts.append(model.semantic_resize(encoded).half().numpy())
    save_array(target, np.concatenate(parts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deixis_train.tabletop", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the scene folders train/ and val/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: caches, logs, states, checkpoint")
    parser.add_argument("--mobile-sam", type=Path, required=True, help="mobile_sam.pt (make real-weights fetches it)")
    parser.add_argument("--stage", choices=("all", "pictures", "sam", "warmup", "train", "checkpoint"), default="all")
    parser.add_argument("--warmup-pictures", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--shards", type=int, default=None, help="use only this many shards for `sam` and `train`")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    out, folders = options.out, [options.data / "val", options.data / "train"]
    caches = [out / "cache" / folder.name for folder in folders]
    for cache in caches:
        cache.mkdir(parents=True, exist_ok=True)

    def wanted(stage: str) -> bool:
        return options.stage in ("all", stage)

    model = PixelLLM(PRESETS["tabletop"])
    assert isinstance(model.sam_encoder, TinyVit)
    load_mobile_sam(
        options.mobile_sam, model.sam_encoder, model.prompt_encoder, model.mask_decoder
    ).raise_if_incomplete(options.mobile_sam)
    for part in (model.sam_encoder, model.prompt_encoder, model.mask_decoder):
        assert part is not None
        part.eval().requires_grad_(False)

    for folder, cache in zip(folders, caches, strict=True):
        for shard in shards(folder)[: options.shards]:
            if wanted("pictures"):
                prepare_pictures(model, folder, cache, shard)
            if wanted("sam"):
                with torch.autocast("cpu", torch.bfloat16):
                    prepare_sam(model, folder, cache, shard)
            print(f"prepared {folder.name}/{shard.name}", flush=True)
    if wanted("warmup"):
        warm_up(model, folders[1], caches[1], out, class_names(folders[0]), pictures=options.warmup_pictures)
    if wanted("train"):
        state = torch.load(out / "warmup.pt", weights_only=True)
        model.semantic_encoder.load_state_dict(state["modules"]["semantic_encoder"])
        model.semantic_encoder.eval().requires_grad_(False)
        for folder, cache in zip(folders, caches, strict=True):
            for shard in shards(folder)[: options.shards]:
                prepare_semantic(model, cache, shard)
        tokenizer = load_tokenizer(folders[1], out, model.config.t5.vocab)
        pairs = list(zip(folders, caches, strict=True))
        train(model, tokenizer, pairs[1], pairs[0], out, class_names(folders[0]), steps=options.steps)
    if wanted("checkpoint"):
        write_checkpoint(model, out, options.mobile_sam, class_names(folders[0]))


def write_checkpoint(model: PixelLLM, out: Path, mobile_sam: Path, names: Names) -> None:
    """Put what the stages trained into `out`/checkpoint; MobileSAM's parts are left out and named."""
    warm = torch.load(out / "warmup.pt", weights_only=True)["modules"]
    model.semantic_encoder.load_state_dict(warm["semantic_encoder"])
    state = torch.load(out / "train.pt", weights_only=True)["modules"]
    trained = state["model"]
    for name in TRAINED:
        prefix = f"{name}."
        part = {key.removeprefix(prefix): value for key, value in trained.items() if key.startswith(prefix)}
        getattr(model, name).load_state_dict(part)
    helpers = make_helpers(model, names)
    helpers.load_state_dict(state["helpers"])
    helpers.fold_scale(model.prompt_adapter.image_projection)
    greedy = {"beams": 1, "beams_per_node": 1}  # captions of this small language gain nothing from beams
    tasks = {
        "caption": {"instruction": CAPTION, **greedy},
        "trace": {"instruction": CAPTION},
        "region_caption": {"instruction": REGION},
        "refer": {"instruction": REFER},
    }
    tokenizer = (out / "tokenizer.json").read_text(encoding="utf-8")
    save_checkpoint(out / "checkpoint", model, tokenizer, tasks, omit=SAM_PARTS, frozen_from=mobile_sam)
    print(f"checkpoint in {out / 'checkpoint'}; export it with: deixis export {out / 'checkpoint'} --out BUNDLE")


if __name__ == "__main__":
    main()
