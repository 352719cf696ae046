"""Every way a bundle can be wrong gets a BundleError of one line, and never anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deixis import bundle as b
from deixis.errors import (
    BundleError,
    BundleFormatError,
    BundleIntegrityError,
    BundleNotFoundError,
    BundleVersionError,
)
from deixis.model import find_bundle

GOLDEN = Path(__file__).parents[1] / "golden"
Change = Callable[[dict[str, Any]], Any]


def make_bundle(root: Path) -> b.Manifest:
    """A bundle that is right in form; its graph is only bytes, which the reader never parses."""
    for name in ("graphs/step.onnx", "tokenizer/tokenizer.json", "golden/vectors.npz"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content of " + name.encode())
    tensor = b.TensorInfo("t", "float32", ("B", 4))
    cache = b.CacheSpec(layers=2, heads=2, head_dim=8)
    manifest = b.Manifest(
        format=b.Format(b.FORMAT_NAME, "1.0"),
        model=b.ModelInfo("pixelllm", "tiny"),
        files=b.describe_files(root),
        graphs={
            "decoder_step": b.Graph(
                "graphs/step.onnx", 18, {"ids": tensor}, {"logits": tensor}, b.Precision("fp32", "fp32")
            )
        },
        dims={"B": b.DimRange(1, 1, 4)},
        caches=b.Caches(cache, cache, 32),
        image=b.ImageSpec(64),
        tokenizer=b.TokenizerSpec("tokenizer/tokenizer.json", 0, 1, 0, 2, 100),
        location=b.LocationSpec(),
        prompts=b.PromptSpec(),
        tasks={"caption": b.TaskSpec("caption", 8, 16)},
        mask=b.MaskSpec(),
        parity={"graph/decoder_step": b.ParityRecord(1e-6, 1e-4)},
        golden="golden/vectors.npz",
        provenance=b.Provenance(exporter="test"),
    )
    b.write_manifest(root, manifest)
    return manifest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    path.mkdir()
    make_bundle(path)
    return path


def change(root: Path, how: Change) -> None:
    path = root / b.MANIFEST_NAME
    values = json.loads(path.read_text())
    how(values)
    path.write_text(json.dumps(values))


def test_round_trip(root: Path) -> None:
    opened = b.open_bundle(root)
    assert b.parse_manifest(opened.manifest.to_json().encode()) == opened.manifest
    assert opened.file("graphs/step.onnx").is_file()
    text = (root / b.MANIFEST_NAME).read_text()
    assert text == opened.manifest.to_json() and text.endswith("}\n")


@pytest.mark.parametrize("path", ["nowhere", "a file", "an empty folder"])
def test_missing_bundle(tmp_path: Path, path: str) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "an empty folder").mkdir()
    with pytest.raises(BundleNotFoundError, match="no bundle at") as caught:
        b.open_bundle(tmp_path / path)
    assert isinstance(caught.value, FileNotFoundError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["graphs/step.onnx", "tokenizer/tokenizer.json", "golden/vectors.npz"])
@pytest.mark.parametrize(
    ("damage", "message"), [("missing", "is missing"), ("truncated", "bytes where"), ("altered", "was altered")]
)
def test_damaged_file(root: Path, name: str, damage: str, message: str) -> None:
    path, data = root / name, (root / name).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if damage == "truncated" else data[:-1] + b"?")
    with pytest.raises(BundleIntegrityError, match=f"{name}.*{message}"):
        b.open_bundle(root)


def test_every_damaged_file_is_listed(root: Path) -> None:
    (root / "graphs/step.onnx").unlink()
    (root / "golden/vectors.npz").write_bytes(b"")
    with pytest.raises(BundleIntegrityError) as caught:
        b.open_bundle(root)
    assert len(caught.value.problems) == 2 and "\n" not in str(caught.value)


def test_hashes_can_be_left_out_but_sizes_cannot(root: Path) -> None:
    path = root / "graphs/step.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    b.open_bundle(root, verify_hashes=False)
    path.write_bytes(b"short")
    with pytest.raises(BundleIntegrityError):
        b.open_bundle(root, verify_hashes=False)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_link(root: Path, tmp_path: Path, whole_folder: bool) -> None:
    name = "graphs" if whole_folder else "graphs/step.onnx"
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="is a link"):
        b.open_bundle(root)


def test_linked_manifest(root: Path, tmp_path: Path) -> None:
    (root / b.MANIFEST_NAME).rename(tmp_path / "m.json")
    (root / b.MANIFEST_NAME).symlink_to(tmp_path / "m.json")
    with pytest.raises(BundleNotFoundError):
        b.open_bundle(root)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "graphs//step.onnx",
        "./graphs/step.onnx",
        "C:\\x",
        "a\\b",
        "",
        ".",
        "..",
    ],
)
def test_path_that_leaves_the_bundle(root: Path, name: str) -> None:
    change(root, lambda m: m["files"].update({name: m["files"]["graphs/step.onnx"]}))
    with pytest.raises(BundleFormatError, match="not a plain path"):
        b.open_bundle(root)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "x" * 300, "\ud800"])
def test_unusable_file_name(root: Path, name: str) -> None:
    change(root, lambda m: m["files"].update({name: m["files"]["graphs/step.onnx"]}))
    with pytest.raises(BundleFormatError, match="not a usable file name") as caught:
        b.open_bundle(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["graph", "external", "tokenizer", "golden"])
def test_file_that_is_not_listed(root: Path, where: str) -> None:
    changes: dict[str, Change] = {
        "graph": lambda m: m["graphs"]["decoder_step"].update(file="graphs/other.onnx"),
        "external": lambda m: m["graphs"]["decoder_step"].update(external=["graphs/other.data"]),
        "tokenizer": lambda m: m["tokenizer"].update(file="t.json"),
        "golden": lambda m: m.update(golden="g.npz"),
    }
    change(root, changes[where])
    with pytest.raises(BundleFormatError, match="is not listed in files"):
        b.open_bundle(root)


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "3", "null", '{"model_type": "whisper"}', '{"format": "x"}', "\xef\xbb\xbf{}"]
)
def test_foreign_manifest(root: Path, text: str) -> None:
    (root / b.MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleFormatError, match="not a "):
        b.open_bundle(root)


def test_truncated_manifest(root: Path) -> None:
    path = root / b.MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BundleFormatError, match="not a manifest"):
        b.open_bundle(root)


def test_oversized_manifest(root: Path) -> None:
    with (root / b.MANIFEST_NAME).open("ab") as stream:
        stream.write(b" " * b.MANIFEST_MAX_BYTES)
    with pytest.raises(BundleFormatError, match="larger than"):
        b.open_bundle(root)


def test_absurd_nesting() -> None:
    with pytest.raises(BundleFormatError):
        b.parse_manifest(b"[" * 100_000)


@pytest.mark.parametrize(("version", "age"), [("2.0", "newer"), ("0.9", "older"), ("999999.0", "newer")])
def test_other_major_version(root: Path, version: str, age: str) -> None:
    change(root, lambda m: m["format"].update(version=version))
    with pytest.raises(BundleVersionError, match=rf"format {version} is {age} than this deixis reads \(1.x\)"):
        b.open_bundle(root)


def test_newer_minor_version(root: Path) -> None:
    change(root, lambda m: m["format"].update(version="1.7"))
    b.open_bundle(root)  # the promise: 1.x reads 1.x
    change(root, lambda m: m.update(novelty=1))
    with pytest.raises(BundleVersionError, match="upgrade deixis"):  # what is unknown is refused, and says why
        b.open_bundle(root)


@pytest.mark.parametrize("version", ["1", "one", "1.0.0", "", "-1.0", 1.0, None, [1, 0]])
def test_malformed_version(root: Path, version: object) -> None:
    change(root, lambda m: m["format"].update(version=version))
    with pytest.raises(BundleFormatError, match=r"format\.version"):
        b.open_bundle(root)


def test_duplicate_key(root: Path) -> None:
    path = root / b.MANIFEST_NAME
    path.write_text(path.read_text().replace('"size": 64', '"size": 64, "size": 65'))
    with pytest.raises(BundleFormatError, match=r"duplicate key.*size"):
        b.open_bundle(root)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none(root: Path, number: str) -> None:
    path = root / b.MANIFEST_NAME
    path.write_text(path.read_text().replace('"alpha": 0.6', f'"alpha": {number}'))
    with pytest.raises(BundleFormatError):
        b.open_bundle(root)


def test_everything_wrong_is_listed_at_once(root: Path) -> None:
    def spoil(m: dict[str, Any]) -> None:
        m["image"].update(size="64", pad="left", colour="RGB")
        m["caches"]["default_capacity"] = True
        m["tokenizer"]["end_id"] = 1.5
        m["graphs"]["decoder_step"]["inputs"]["ids"]["shape"] = ["B", None]
        m["tasks"] = []
        del m["golden"]
        m["novelty"] = {}

    change(root, spoil)
    with pytest.raises(BundleFormatError) as caught:
        b.open_bundle(root)
    for where in (
        "image.size: expected int",
        "image.pad: expected 'right_bottom'",
        "image.colour: unknown key",
        "caches.default_capacity: expected int",
        "tokenizer.end_id: expected int",
        "graphs.decoder_step.inputs.ids.shape[1]: expected",
        "tasks: expected",
        "golden: missing",
        "novelty: unknown key",
    ):
        assert any(where in problem for problem in caught.value.problems), where
    assert len(caught.value.problems) == 9 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (lambda m: m["dims"]["B"].update(min=0), r"dims\.B"),
        (lambda m: m["dims"]["B"].update(opt=9), r"dims\.B"),
        (lambda m: m["image"].update(size=0), r"image\.size"),
        (lambda m: m["caches"].update(default_capacity=-1), r"caches\.default_capacity"),
        (lambda m: m["caches"]["self_cache"].update(heads=0), r"caches\.self_cache\.heads"),
        (lambda m: m["tasks"]["caption"].update(beams=0), r"tasks\.caption\.beams"),
        (lambda m: m["tasks"]["caption"].update(max_length=0), r"tasks\.caption\.max_length"),
        (lambda m: m["tokenizer"].update(end_id=100), r"tokenizer\.end_id"),
        (lambda m: m["tokenizer"].update(pad_id=-1), r"tokenizer\.pad_id"),
        (lambda m: m["files"]["golden/vectors.npz"].update(bytes=-1), r"files\.golden/vectors\.npz"),
        (lambda m: m["files"]["golden/vectors.npz"].update(sha256="abc"), r"files\.golden/vectors\.npz"),
    ],
)
def test_ranges(root: Path, how: Change, where: str) -> None:
    change(root, how)
    with pytest.raises(BundleFormatError, match=where):
        b.open_bundle(root)


def test_many_problems_stay_one_readable_line(root: Path) -> None:
    change(root, lambda m: m.update({f"key\n{i}": i for i in range(5000)}))
    with pytest.raises(BundleFormatError, match="and 4980 more") as caught:
        b.open_bundle(root)
    assert len(str(caught.value)) < 8000 and str(caught.value).isprintable()
    assert len(caught.value.problems) == 5000


@pytest.mark.skipif(not hasattr(Path, "chmod"), reason="needs file permissions")
def test_unreadable_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(b, "sha256_of", refuse)  # tests may run as root, for whom every file is readable
    with pytest.raises(BundleIntegrityError, match="cannot be read"):
        b.open_bundle(root)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(json_values)
def test_random_json_raises_only_bundle_errors(value: object) -> None:
    with pytest.raises(BundleError):
        b.parse_manifest(json.dumps(value).encode("utf-8", "surrogatepass"))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_only_bundle_errors(data: bytes) -> None:
    with pytest.raises(BundleError):
        b.parse_manifest(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_random_changes_of_a_good_manifest(root: Path, data: st.DataObject) -> None:
    values = json.loads((root / b.MANIFEST_NAME).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        node: Any = values
        while True:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
                node = node[key]
                continue
            node[key] = data.draw(json_values)
            break
        if not isinstance(values, dict) or not values:
            break
    try:
        b.parse_manifest(json.dumps(values).encode("utf-8", "surrogatepass"))
    except BundleError as error:
        assert str(error).isprintable()


def test_write_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with pytest.raises(KeyboardInterrupt), b.write_bundle(target) as work:
        make_bundle(work)
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with b.write_bundle(target) as work:
        make_bundle(work)
        assert not target.exists()
    b.open_bundle(target)
    assert list(target.parent.iterdir()) == [target]


def test_write_replaces_only_bundles_and_only_when_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="--force"), b.write_bundle(root):
        pass
    with pytest.raises(RuntimeError), b.write_bundle(root, force=True) as work:
        (work / "half").write_text("x")
        raise RuntimeError
    b.open_bundle(root)  # still the old one
    with b.write_bundle(root, force=True) as work:
        manifest = make_bundle(work)
        b.write_manifest(work, dataclasses.replace(manifest, model=b.ModelInfo("pixelllm", "second")))
    assert b.open_bundle(root).manifest.model.name == "second"
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter1.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not a bundle"), b.write_bundle(precious, force=True):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "thesis"]


def test_failed_swap_gives_the_old_bundle_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if Path(target) == root and self.name != root.name:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"), b.write_bundle(root, force=True) as work:
        make_bundle(work)
    b.open_bundle(root)
    assert list(root.parent.iterdir()) == [root]


def test_manifest_is_not_written_when_it_would_not_load(root: Path) -> None:
    before = (root / b.MANIFEST_NAME).read_bytes()
    manifest = b.open_bundle(root).manifest
    with pytest.raises(BundleFormatError):
        b.write_manifest(root, dataclasses.replace(manifest, golden="nowhere.npz"))
    assert (root / b.MANIFEST_NAME).read_bytes() == before


DETECTION = {"candidates": 50, "proposals": 20, "max_detections": 10, "join_scores": True}


def test_a_detector_is_optional_and_survives(root: Path) -> None:
    assert b.open_bundle(root).manifest.detection is None
    assert "detection" not in json.loads(b.open_bundle(root).manifest.to_json())  # a runtime of 1.0 would refuse it
    change(root, lambda m: m.update(detection=DETECTION))
    manifest = b.open_bundle(root).manifest
    assert manifest.detection == b.DetectionSpec(candidates=50, proposals=20, max_detections=10, join_scores=True)
    assert b.parse_manifest(manifest.to_json().encode()) == manifest
    change(root, lambda m: m.update(detection=None))
    assert b.open_bundle(root).manifest.detection is None


@pytest.mark.parametrize(
    ("detection", "where"),
    [
        ({"candidates": 0}, r"detection\.candidates: must be positive"),
        ({"proposals": -1}, r"detection\.proposals: must be positive"),
        ({"max_detections": 0}, r"detection\.max_detections: must be positive"),
        ({"detection_iou": 0.0}, r"detection\.detection_iou: must be positive"),
        ({"score_threshold": 1.5}, r"detection\.score_threshold: must lie in 0..1"),
        ({"delta_scale": [10, 10, 5]}, r"detection\.delta_scale: needs four numbers"),
        ({"delta_scale": [10, 10, 5, 0]}, r"detection\.delta_scale: needs four numbers"),
        ({"join_scores": 1}, r"detection\.join_scores: expected bool"),
        ({"nms": 0.5}, r"detection\.nms: unknown key"),
        ([], r"detection: expected an object"),
    ],
)
def test_rules_of_a_detector(root: Path, detection: object, where: str) -> None:
    change(root, lambda m: m.update(detection=detection))
    with pytest.raises(BundleFormatError, match=where):
        b.open_bundle(root)


def test_a_second_stage_needs_rules(root: Path) -> None:
    change(root, lambda m: m["graphs"].update(box_refine=m["graphs"]["decoder_step"]))
    with pytest.raises(BundleFormatError, match="box_refine: needs detection"):
        b.open_bundle(root)


CONVERSATION = {
    "system": "You see.",
    "image_sentence": "The <image> shows it.",
    "image_tokens": 16,
    "begin_id": 0,
    "end_id": 1,
    "image_start_id": 90,
    "image_end_id": 91,
    "mask_id": 93,
    "phrase_start_id": 94,
    "phrase_end_id": 95,
    "region_id": None,
}
CROP = {"size": 28, "resize": "center_crop", "interpolation": "bicubic", "antialias": True, "pad": "none"}
GROUNDING = {"resize": "longest_side", "antialias": True}


def make_glamm(m: dict[str, Any]) -> None:
    m["format"]["version"] = "1.2"
    m["model"]["family"] = "glamm"
    m["caches"]["cross_cache"] = m["location"] = m["prompts"] = None
    m["conversation"] = dict(CONVERSATION)
    m["global_image"] = dict(CROP)
    m["image"].update(GROUNDING)
    for role in ("global_encoder", "grounding_encoder", "pixel_decoder"):
        m["graphs"][role] = m["graphs"]["decoder_step"]


def test_a_glamm_survives(root: Path) -> None:
    change(root, make_glamm)
    manifest = b.open_bundle(root).manifest
    assert manifest.conversation is not None and manifest.conversation.region_id is None
    assert manifest.global_image == b.ImageSpec(28, "center_crop", "bicubic", antialias=True, pad="none")
    assert manifest.caches.cross_cache is None
    assert b.parse_manifest(manifest.to_json().encode()) == manifest
    with_regions = dataclasses.replace(
        manifest,
        conversation=dataclasses.replace(manifest.conversation, region_id=92),
        graphs={**manifest.graphs, "region_encoder": manifest.graphs["decoder_step"]},
    )
    b.write_manifest(root, with_regions)
    assert b.open_bundle(root).manifest == with_regions


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (lambda m: m["format"].update(version="1.1"), r"format\.version: the family glamm needs 1\.2, found 1\.1"),
        (lambda m: m.update(conversation=None), "conversation: missing, the family glamm needs it"),
        (lambda m: m.update(global_image=None), "global_image: missing, the family glamm needs it"),
        (lambda m: m["graphs"].pop("global_encoder"), r"graphs\.global_encoder: missing"),
        (lambda m: m["graphs"].pop("decoder_step"), r"graphs\.decoder_step: missing"),
        (lambda m: m["graphs"].pop("pixel_decoder"), "grounding_encoder and pixel_decoder go together"),
        (lambda m: m.update(prompts={}), "prompts: the family glamm has none"),
        (lambda m: m.update(detection={}), "detection: the family glamm has none"),
        (lambda m: m["caches"].update(cross_cache=m["caches"]["self_cache"]), r"caches\.cross_cache: the family glamm"),
        (lambda m: m["conversation"].update(mask_id=100), r"conversation\.mask_id: must lie in 0\.\.99, found 100"),
        (lambda m: m["conversation"].update(phrase_end_id=-1), r"conversation\.phrase_end_id"),
        (lambda m: m["conversation"].update(mask_id=94), "two of its marks have the same id"),
        (lambda m: m["conversation"].update(end_id=2), r"conversation\.end_id: differs from tokenizer\.end_id"),
        (lambda m: m["conversation"].update(image_tokens=0), r"conversation\.image_tokens: must be positive"),
        (lambda m: m["conversation"].update(image_sentence="no picture"), "must hold <image> once"),
        (lambda m: m["conversation"].update(region_id=92), r"conversation\.region_id: goes with the graph"),
        (lambda m: m["graphs"].update(region_encoder=m["graphs"]["decoder_step"]), r"conversation\.region_id: goes"),
        (lambda m: m["global_image"].update(pad="right_bottom"), "global_image: resize 'center_crop' needs"),
        (lambda m: m["global_image"].update(size=0), r"global_image\.size: must be positive"),
        (lambda m: m["image"].update(antialias=False), "image: resize 'longest_side' needs antialias true"),
        (lambda m: m["image"].update(CROP), r"image\.resize: masks cannot go back"),
        (lambda m: m["image"].update(CROP | {"resize": "stretch"}), r"image\.resize: masks cannot go back"),
        (lambda m: m["global_image"].update(m["image"]), r"global_image\.resize: the picture must fill"),
    ],
)
def test_what_a_glamm_must_have(root: Path, how: Change, where: str) -> None:
    change(root, make_glamm)
    change(root, how)
    with pytest.raises(BundleFormatError, match=where):
        b.open_bundle(root)


@pytest.mark.parametrize(
    ("how", "where"),
    [
        (lambda m: m.update(location=None), "location: missing, the family pixelllm needs it"),
        (lambda m: m.update(prompts=None), "prompts: missing, the family pixelllm needs it"),
        (lambda m: m["caches"].update(cross_cache=None), r"caches\.cross_cache: missing, the family pixelllm"),
        (lambda m: m.update(conversation=CONVERSATION), "conversation: the family pixelllm has none"),
        (lambda m: m.update(global_image=CROP), "global_image: the family pixelllm has none"),
        (
            lambda m: m["image"].update(interpolation="bicubic"),
            r"image\.interpolation: resize 'fit_inside' is bilinear",
        ),
        (lambda m: m["image"].update(antialias=True), "image: resize 'fit_inside' needs antialias false"),
    ],
)
def test_what_a_pixelllm_must_have(root: Path, how: Change, where: str) -> None:
    change(root, how)
    with pytest.raises(BundleFormatError, match=where):
        b.open_bundle(root)


@pytest.mark.parametrize("bundle", [GOLDEN / "tiny_bundle", find_bundle("tabletop")], ids=["tiny", "tabletop"])
def test_older_manifests_stay_as_they_were(bundle: Path) -> None:
    """What 1.0 and 1.1 wrote reads, and is written back byte for byte: nothing new goes in."""
    data = (bundle / b.MANIFEST_NAME).read_bytes()
    assert b.parse_manifest(data).to_json().encode() == data
