"""What frozen encoders see in each picture, computed once and kept on disk.

A store is a folder `<what>-<hash>`: `pictures.json` lists chunks and the names of their pictures, in order, and each
chunk is one array, memory-mapped when read. The hash covers the encoder's weights and how it sees a picture, so
features of another model are never taken by mistake. A chunk appears whole and is listed afterwards: a stopped run goes
on where it was, and pictures that came later are added. One process writes a store at a time.

    python -m deixis_train.training.features --preset tabletop --mobile-sam FILE --images DIR --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deixis_train.data.formats.pictures import read_picture
from deixis_train.data.preparation.geometry import place_fitted
from deixis_train.files import replacing, write_text
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.models.config import PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.preprocess import padding_mask
from deixis_train.models.tiny_vit import TinyVit

What = Literal["sam", "semantic", "small", "clip"]
INDEX = "pictures.json"
CHUNK = 256  # pictures of one file
SMALL_BATCH = 32  # small inputs encoded at once
PICTURES = (".jpg", ".jpeg", ".png")

# A picture that fits the network input, RGB uint8 [S, S, 3] zero padded, and its real (height, width) px.
Fitted = tuple[NDArray[np.uint8], tuple[int, int]]
Read = TypeVar("Read")


class FeatureStore:
    """Arrays of one kind by picture name. Reading raises KeyError for a picture that is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chunks: list[dict[str, Any]] = []
        self.places: dict[str, tuple[int, int]] = {}
        self._arrays: dict[int, NDArray[Any]] = {}
        index = folder / INDEX
        if index.exists():
            for chunk in json.loads(index.read_text(encoding="utf-8"))["chunks"]:
                self._list(chunk)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __len__(self) -> int:
        return len(self.places)

    def get(self, names: Sequence[str]) -> NDArray[Any]:
        """The arrays of some pictures, stacked: [B, ...] in the stored type."""
        return np.stack([self._array(chunk)[row] for chunk, row in (self.places[name] for name in names)])

    def add(self, names: Sequence[str], values: NDArray[Any]) -> None:
        """Write one more chunk: `values` [n, ...] of n pictures that the store has not yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"chunk-{len(self.chunks):04d}.npy"
        with replacing(self.folder / file) as temporary, temporary.open("wb") as stream:
            np.save(stream, values, allow_pickle=False)
        self._list({"file": file, "pictures": list(names)})
        write_text(self.folder / INDEX, json.dumps({"chunks": self.chunks}, ensure_ascii=False))

    def _list(self, chunk: dict[str, Any]) -> None:
        self.places |= {name: (len(self.chunks), row) for row, name in enumerate(chunk["pictures"])}
        self.chunks.append(chunk)

    def _array(self, chunk: int) -> NDArray[Any]:
        if chunk not in self._arrays:
            path = self.folder / self.chunks[chunk]["file"]
            self._arrays[chunk] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._arrays[chunk]


def fingerprint(model: PixelLLM, what: What) -> str:
    """8 hex digits that name what `what` holds of a picture: weights, sizes and normalisation of its encoder."""
    config = model.config
    branch = config.sam_size if what == "sam" else config.semantic_size
    seen = config.pixel_mean_sam + config.pixel_std_sam if what == "sam" else config.pixel_mean_semantic
    if what == "semantic":
        seen += config.pixel_std_semantic
    digest = hashlib.sha256(json.dumps([what, config.image_size, branch, seen]).encode())
    if what != "small":
        digest.update(str(model.grid).encode())
        encoder = model.sam_encoder if what == "sam" else model.semantic_encoder
        for name, value in encoder.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:8]


def store_of(model: PixelLLM, what: What, folder: Path) -> FeatureStore:
    """The store of `what` for this model below `folder`."""
    return FeatureStore(folder / f"{what}-{fingerprint(model, what)}")


@torch.inference_mode()
def encode(model: PixelLLM, what: What, images: Tensor, valid_hw: Tensor, bf16: bool) -> NDArray[Any]:
    """What a store keeps of pictures: images [B, S, S, 3] 0..255 and their real (height, width) [B, 2].

    "sam" and "semantic": features on the fused grid, float16 [B, g, g, C]. "small": the semantic encoder's input before
    normalisation, uint8 [B, s, s, 3].
    """
    if what == "small":
        return small_input(model, images.float(), valid_hw).cpu().numpy()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        if what == "sam":
            features = model.encode_sam(images.float(), valid_hw)[0]
        else:
            features = model.encode_semantic(images.float(), valid_hw)
    return features.half().cpu().numpy()


def small_input(model: PixelLLM, images: Tensor, valid_hw: Tensor) -> Tensor:
    """What the semantic encoder sees, before normalisation, as uint8 [B, s, s, 3].

    Resizing commutes with normalisation when the padding holds the mean, so the small picture can be stored in bytes.
    """
    preprocess = model.semantic_preprocess
    inside = padding_mask(valid_hw, images.shape[1])
    small = preprocess.resize(images * inside + preprocess.mean * (1 - inside))
    return small.round().clamp(0, 255).to(torch.uint8)


def normalize_small(model: PixelLLM, small: Tensor) -> Tensor:
    """uint8 [B, s, s, 3] of `small_input` -> the encoder's normalised input.

    Padding is exactly 0 there. Bytes hold the mean rounded, and the encoder takes the small difference for a signal, as
    all of the padding has it.
    """
    mean, std = model.semantic_preprocess.mean, model.semantic_preprocess.std
    padding = (small == mean.round()).all(-1, keepdim=True)
    return ((small.float() - mean) / std).masked_fill(padding, 0.0)


def semantic_of_small(model: PixelLLM, small: Tensor) -> Tensor:
    """The semantic encoder's map on the fused grid [B, g, g, C1] of what `small_input` gave."""
    return model.semantic_resize(model.semantic_encoder(normalize_small(model, small)))


def read_fitted(path: Path, size: int) -> Fitted:
    """A picture of the data as the network takes it. Raises DataError when it cannot be read."""
    image = read_picture(path)
    placement = place_fitted((image.shape[0], image.shape[1]), size)
    return placement.place_image(image, size), placement.valid


def fill(
    model: PixelLLM,
    whats: Sequence[What],
    folder: Path,
    pictures: dict[str, Path],
    read: Callable[[Path], Fitted],
    *,
    batch: int = 4,
    bf16: bool = False,
    report: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict[What, FeatureStore]:
    """Bring the stores of a model up to date with `pictures` (path by name); each picture is read once.

    The model is put into evaluation mode: dropout and drop-path must not act on what is kept. Pictures go to its
    device.
    """
    model.eval()
    stores: dict[What, FeatureStore] = {what: store_of(model, what, folder) for what in whats}
    if "semantic" in stores:
        _semantic_of_small(model, store_of(model, "small", folder), stores["semantic"], list(pictures), bf16)
    device = next(model.parameters()).device

    def compute(what: What, group: Sequence[Fitted]) -> NDArray[Any]:
        images, valid = zip(*group, strict=True)
        valid_hw = torch.tensor(valid, dtype=torch.float32, device=device)
        return encode(model, what, torch.from_numpy(np.stack(images)).to(device), valid_hw, bf16)

    readers = 4 if device.type == "cuda" else 1
    fill_stores(stores, pictures, read, compute, batch=batch, readers=readers, report=report)
    return stores


def fill_stores(
    stores: Mapping[What, FeatureStore],
    pictures: Mapping[str, Path],
    read: Callable[[Path], Read],
    compute: Callable[[What, Sequence[Read]], NDArray[Any]],
    *,
    batch: int,
    readers: int,
    report: Callable[[str], None],
) -> None:
    """Compute what stores lack of `pictures` (path by name), `batch` of them at once; each picture is read once.

    Args:
        read: a picture as `compute` takes it; called in `readers` threads.
        compute: what a store keeps of some pictures, stacked.
    """
    lacking = [name for name in pictures if any(name not in store for store in stores.values())]
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(readers) as pool:
        for start in range(0, len(lacking), CHUNK):
            names = lacking[start : start + CHUNK]
            parts: dict[What, list[NDArray[Any]]] = {what: [] for what in stores}
            groups = [names[i : i + batch] for i in range(0, len(names), batch)]
            ahead = [pool.submit(lambda group: [read(pictures[n]) for n in group], group) for group in groups]
            for group, future in zip(groups, ahead, strict=True):
                items = dict(zip(group, future.result(), strict=True))
                for what, store in stores.items():
                    if fresh := [items[name] for name in group if name not in store]:
                        parts[what].append(compute(what, fresh))
            for what, store in stores.items():
                if parts[what]:
                    store.add([name for name in names if name not in store], np.concatenate(parts[what]))
            done += len(names)
            rate = done / (time.monotonic() - started)
            left = (len(lacking) - done) / rate / 60
            report(f"features {'+'.join(stores)}: {done}/{len(lacking)}  {rate:.1f} pictures/s  {left:.1f} min left")


@torch.inference_mode()
def _semantic_of_small(
    model: PixelLLM, small: FeatureStore, semantic: FeatureStore, names: Sequence[str], bf16: bool
) -> None:
    """Semantic maps of the pictures whose small input is on disk: reading and resizing are the greater part."""
    device = next(model.parameters()).device
    waiting = [name for name in names if name in small and name not in semantic]
    for start in range(0, len(waiting), CHUNK):
        chunk, parts = waiting[start : start + CHUNK], []
        for at in range(0, len(chunk), SMALL_BATCH):
            seen = torch.from_numpy(small.get(chunk[at : at + SMALL_BATCH])).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = semantic_of_small(model, seen)
            parts.append(features.half().cpu().numpy())
        semantic.add(chunk, np.concatenate(parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Compute SAM's features of a folder of pictures."""
    parser = argparse.ArgumentParser(prog="python -m deixis_train.training.features", description=main.__doc__)
    parser.add_argument("--preset", default="tabletop", choices=sorted(PRESETS))
    parser.add_argument("--mobile-sam", type=Path, required=True, help="mobile_sam.pt (make real-weights fetches it)")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures, searched below too")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stores: one writer per folder")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--fp32", action="store_true", help="do not compute in bfloat16")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = PixelLLM(PRESETS[options.preset])
    if not isinstance(model.sam_encoder, TinyVit):
        parser.error(f"the preset {options.preset} does not take MobileSAM's encoder")
    load_mobile_sam(options.mobile_sam, model.sam_encoder).raise_if_incomplete(options.mobile_sam)
    model.eval().requires_grad_(False)
    found = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        parser.error(f"{options.images}: no pictures")
    size = model.config.image_size
    paths = {path.name: path for path in found}
    stores = fill(
        model, ["sam"], options.out, paths, lambda p: read_fitted(p, size), batch=options.batch, bf16=not options.fp32
    )
    print(f"{len(stores['sam'])} pictures in {stores['sam'].folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
