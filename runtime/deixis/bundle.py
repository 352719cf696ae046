"""The bundle: a directory with `manifest.json` and the files it names. Standard library only; see docs/bundle.md.

`Manifest` and the dataclasses below are the format: field names are the JSON keys, types are checked strictly, unknown
and duplicate keys are errors. `open_bundle` reads and checks a bundle, `write_bundle` writes one so that it appears
whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import reprlib
import shutil
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deixis.errors import BundleFormatError, BundleIntegrityError, BundleNotFoundError, BundleVersionError
from deixis.schema import build, read_json

FORMAT_NAME = "deixis-bundle"
FORMAT_VERSION = (1, 2)  # 1.1: `detection`; 1.2: the family "glamm"
MANIFEST_NAME = "manifest.json"
MANIFEST_MAX_BYTES = 4 << 20

Dim = int | str  # a fixed size, or the name of a symbolic dimension


@dataclass(frozen=True)
class Format:
    name: str
    version: str  # "major.minor"; a runtime reads every minor of its own major


@dataclass(frozen=True)
class ModelInfo:
    family: str  # "pixelllm" or, since 1.2, "glamm"
    name: str
    revision: int = 1  # of the graph contract of this family


@dataclass(frozen=True)
class FileInfo:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorInfo:
    tensor: str  # name inside the ONNX file
    dtype: Literal["float32", "float16", "int64", "int32", "bool", "uint8"]
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Precision:
    weights: str  # how weights are stored: "fp32", "fp16", "int8", ...
    compute: str  # what they are computed in on a CPU
    fp32_islands: tuple[str, ...] = ()  # node-name prefixes that stay in fp32 whatever the precision


@dataclass(frozen=True)
class Graph:
    """One ONNX file with a role. `inputs` and `outputs` map logical names to tensors, in the order of the file."""

    file: str
    opset: int
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    precision: Precision
    external: tuple[str, ...] = ()  # external-data files, relative to the bundle; may be shared by several graphs


@dataclass(frozen=True)
class DimRange:
    """What a symbolic dimension may be: the one source for TensorRT profiles and cache capacity."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values per decoder layer: tensors `{key,value}.{i}` of [rows, heads, length, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True)
class Caches:
    self_cache: CacheSpec
    cross_cache: CacheSpec | None  # null where nothing is computed once per prompt: a decoder without an encoder
    default_capacity: int  # tokens; the load option's default


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the network input. Normalisation is inside the graphs."""

    size: int  # side of the square input, px
    # "fit_inside": longest side to `size` (smaller pictures grow), plain bilinear with half-pixel centres and no
    # anti-aliasing; short = floor(size * min / max), long = int(short * (max / min)) in float32 (section 2)
    # "longest_side" (1.2): both sides int(side * size / longest + 0.5)
    # "center_crop" (1.2): shortest side to `size`, the other int(size * long / short); then the middle size x size
    resize: Literal["fit_inside", "longest_side", "center_crop"] = "fit_inside"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    # True (1.2): the filter grows with the reduction, and both passes round to uint8, as Pillow does it
    antialias: bool = False
    pad: Literal["right_bottom", "none"] = "right_bottom"
    pad_value: float = 0.0
    channels: Literal["RGB"] = "RGB"


@dataclass(frozen=True)
class TokenizerSpec:
    file: str
    begin_id: int
    end_id: int
    pad_id: int
    unknown_id: int
    vocab_size: int  # width of the logits; may exceed the tokenizer's own


@dataclass(frozen=True)
class LocationSpec:
    """How to read `locations`: point = value * (valid width, valid height), px of the network input."""

    points_per_token: int = 2


@dataclass(frozen=True)
class PromptSpec:
    """Which points and labels a box becomes for the prompt extractor (section 5)."""

    # "box": corners with labels 2, 3, then `padding` points labelled -2.
    # "corners": four corners labelled 1, then one point labelled -1.
    box_as: Literal["box", "corners"] = "box"
    padding: int = 3


@dataclass(frozen=True)
class TaskSpec:
    """One text task: what the text encoder gets, how the decoder is run. `{text}` in `instruction` is the user's."""

    instruction: str
    instruction_tokens: int  # most context tokens, the end token included; a longer instruction is cut
    max_length: int  # L of section 11: length of the id array, begin token included
    beams: int = 1
    beams_per_node: int = 1
    alpha: float = 0.6  # exponent of the length penalty ((5 + i) / 6) ** alpha
    ban_repeat: bool = True  # greedy only: the previous token is not chosen again at once
    points_at: str = "begin,end,pad"  # positions whose points do not count (section 8); "^" inverts


@dataclass(frozen=True)
class ConversationSpec:
    """How a conversation about a picture becomes ids (GLaMM section 5). `deixis.conversation` is its reader.

    A prompt is the system text, a space, and for each turn "USER: " + question + " " + "ASSISTANT: " + answer + end.
    The ids are those of the tokens that text marks stand for.
    """

    system: str
    image_sentence: str  # before the first question; holds <image>
    image_tokens: int  # rows of `features` that stand for <image>
    begin_id: int
    end_id: int
    image_start_id: int
    image_end_id: int
    mask_id: int  # [SEG]
    phrase_start_id: int  # <p>
    phrase_end_id: int  # </p>
    region_id: int | None = None  # <bbox>; None: the model takes no boxes


@dataclass(frozen=True)
class MaskSpec:
    """Post-processing of mask logits (section 9.4; SAM for own prompts)."""

    threshold: float = 0.0  # logit
    token: int = 0  # mask token used for referring
    prompt_width: int = 256


@dataclass(frozen=True)
class DetectionSpec:
    """How `box_proposals` and `box_refine` are joined: selection, suppression, scores (section 10).

    All sorting is stable and descending. Suppression is greedy in that order: a box is dropped when its IoU with a kept
    one is at least the threshold, or when it has no coordinate above 0; the union counts as 1e-8 px at least. All in
    float32, px of the padded input.
    """

    candidates: int = 1000  # places with the highest scores, sigmoid(heatmap); at most all but one
    proposal_iou: float = 0.9  # suppression of the candidates, whose boxes are not clipped yet
    proposals: int = 256  # kept, then clipped to the input; missing ones are the last candidate with score 0
    # box_refine's deltas are divided by this: shift of the centre in widths and heights, growth as a logarithm
    delta_scale: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    max_log_scale: float = 4.135166556742356  # growth is capped here: ln(1000 / 16)
    # a detection scores more than this: sqrt(softmax(logits)[1] * proposal score). Boxes are clipped before they are
    # suppressed.
    score_threshold: float = 0.05
    detection_iou: float = 0.5
    max_detections: int = 100
    # the score of a caption joins that of its box: sqrt(score * exp(caption's score)); a default, callers may choose
    join_scores: bool = False


@dataclass(frozen=True)
class ParityRecord:
    """One comparison made at export: largest error relative to the array's largest magnitude."""

    error: float
    tolerance: float
    against: str = "torch fp32"


@dataclass(frozen=True)
class Provenance:
    exporter: str = ""
    created: str = ""  # ISO date
    source: str = ""  # checkpoint, with its sha256
    licence: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    format: Format
    model: ModelInfo
    files: dict[str, FileInfo]  # every file of the bundle but the manifest, by posix path
    graphs: dict[str, Graph]  # by role
    dims: dict[str, DimRange]
    caches: Caches
    image: ImageSpec
    tokenizer: TokenizerSpec
    location: LocationSpec | None  # null when words have no places
    prompts: PromptSpec | None  # null without a prompt extractor
    # pixelllm: "caption", "region_caption", "trace", "refer", "dense_captions"
    # glamm: "caption", "region_caption", "refer", "grounded_caption", "ground_phrases", "ask"; there `instruction` is
    # the question, `instruction_tokens` the most tokens of one, `max_length` the most tokens of an answer
    tasks: dict[str, TaskSpec]
    mask: MaskSpec
    parity: dict[str, ParityRecord]
    # npz of golden vectors: "<role>/in/<name>" and "<role>/out/<name>"; "<role>/out[::k]/<name>" holds every k-th value
    # of an output in row-major order
    golden: str
    provenance: Provenance
    detection: DetectionSpec | None = None  # since 1.1; with the graphs box_proposals and box_refine
    conversation: ConversationSpec | None = None  # since 1.2; of the family glamm
    global_image: ImageSpec | None = None  # since 1.2; what the global encoder of glamm sees, `image` being masks' input

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        for name in ("detection", "conversation", "global_image"):  # an older runtime does not know the field
            if values[name] is None:
                del values[name]
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose manifest and files have been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Absolute path of a file that the manifest names."""
        return self.path / name


def open_bundle(path: str | os.PathLike[str], *, verify_hashes: bool = True) -> Bundle:
    """Read and check the bundle at `path`.

    Sizes, links and paths are always checked; hashes too unless `verify_hashes` is False.
    Raises BundleNotFoundError, BundleFormatError, BundleVersionError or BundleIntegrityError.
    """
    root = Path(path)
    manifest_path = root / MANIFEST_NAME
    if not root.is_dir():
        raise BundleNotFoundError(f"no bundle at {root}: not a directory; give the folder that holds {MANIFEST_NAME}")
    if manifest_path.is_symlink() or not manifest_path.is_file():
        raise BundleNotFoundError(f"no bundle at {root}: it has no {MANIFEST_NAME}; export one with `deixis export`")
    if manifest_path.stat().st_size > MANIFEST_MAX_BYTES:
        raise BundleFormatError(
            f"{manifest_path}: larger than {MANIFEST_MAX_BYTES} bytes; this is not a deixis manifest"
        )
    try:
        data = manifest_path.read_bytes()
    except OSError as error:
        raise BundleNotFoundError(f"cannot read {manifest_path}: {error.strerror}; check its permissions") from None
    manifest = parse_manifest(data, where=str(manifest_path))
    problems = [
        p for name, info in sorted(manifest.files.items()) for p in _check_file(root, name, info, verify_hashes)
    ]
    if problems:
        raise BundleIntegrityError(
            f"bundle {root} is damaged: {_summary(problems)}; copy or export it again", tuple(problems)
        )
    return Bundle(root.resolve(), manifest)


def parse_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check manifest bytes. Raises BundleFormatError (listing every problem) or BundleVersionError."""
    try:
        values = read_json(data)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BundleFormatError(f"{where}: not a manifest: {error}; copy or export the bundle again") from None
    newer_minor = _check_version(values, where)
    problems: list[str] = []
    manifest = build(Manifest, values, problems)
    if not problems:
        problems += _check_references(manifest)
    if problems and newer_minor:
        raise BundleVersionError(
            f"{where}: bundle format {values['format']['version']} has what this deixis "
            f"({_dotted(FORMAT_VERSION)}) does not know; upgrade deixis ({_summary(problems)})"
        )
    if problems:
        raise BundleFormatError(f"{where}: {_summary(problems)}", tuple(problems))
    return manifest


@contextmanager
def write_bundle(destination: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside `destination` to fill; it takes that name when the block ends well.

    On any error the temporary directory is removed and an existing bundle stays as it was.
    Raises FileExistsError when the destination exists and `force` is False, or when it is not a bundle: force replaces
    bundles, never somebody's other folder.
    """
    target = Path(destination)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another --out or pass --force")
    if (
        target.exists()
        and not (target / MANIFEST_NAME).is_file()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise FileExistsError(f"{target} exists and is not a bundle, so it is not replaced; choose another --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.replace(old / target.name)
            try:
                work.replace(target)
            except BaseException:
                (old / target.name).replace(target)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            work.replace(target)
        target.chmod(0o755)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def describe_files(root: Path) -> dict[str, FileInfo]:
    """Hash every file below `root` but the manifest, for `Manifest.files`."""
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {p.relative_to(root).as_posix(): FileInfo(sha256_of(p), p.stat().st_size) for p in paths}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` under a temporary name, then rename. The text is parsed back first."""
    text = manifest.to_json()
    parse_manifest(text.encode())
    temporary = root / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(root / MANIFEST_NAME)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: typing.BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_version(values: Any, where: str) -> bool:
    """Refuse other formats and other major versions; True when the minor version is newer than this runtime's."""
    form = values.get("format") if isinstance(values, dict) else None
    if not isinstance(form, dict) or form.get("name") != FORMAT_NAME:
        raise BundleFormatError(f"{where}: not a deixis bundle (no format.name {FORMAT_NAME!r})")
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", str(form.get("version", "")))
    if not found:
        raise BundleFormatError(
            f"{where}: format.version must be like '1.0', found {reprlib.repr(form.get('version'))}"
        )
    version = (int(found[1]), int(found[2]))
    if version[0] != FORMAT_VERSION[0]:
        age, advice = ("newer", "upgrade deixis") if version > FORMAT_VERSION else ("older", "use an older deixis")
        raise BundleVersionError(
            f"{where}: bundle format {found[0]} is {age} than this deixis reads ({FORMAT_VERSION[0]}.x); "
            f"{advice} or export the bundle again with this version"
        )
    return version > FORMAT_VERSION


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _summary(problems: list[str], most: int = 20) -> str:
    """The problems as one line that a terminal can show; the exception's `problems` has them all."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    line = "; ".join(p[:300] for p in problems[:most]) + more
    return "".join(c if c.isprintable() else "?" for c in line)  # keys of a foreign file may hold anything


def _check_references(manifest: Manifest) -> list[str]:
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
        "image.size": manifest.image.size,
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
    problems += _check_detection(manifest)
    problems += [
        f"files.{name}: needs a sha256 of 64 hexadecimal digits and a size from 0 on"
        for name, info in manifest.files.items()
        if not re.fullmatch(r"[0-9a-f]{64}", info.sha256) or info.bytes < 0
    ]
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


def _check_file(root: Path, name: str, info: FileInfo, verify_hash: bool) -> Iterator[str]:
    path = root / name
    try:
        if any(p.is_symlink() for p in (path, *path.parents) if p != root and root in p.parents):
            yield f"{name} is a link, which bundles may not hold"
        elif not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != info.bytes:
            yield f"{name} has {size} bytes where the manifest says {info.bytes}"
        elif verify_hash and sha256_of(path) != info.sha256:
            yield f"{name} was altered (its sha256 differs from the manifest)"
    except OSError as error:
        yield f"{name} cannot be read ({error.strerror})"
