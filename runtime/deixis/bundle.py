"""The bundle: a directory with `manifest.json` and the files it names. Standard library only; see docs/bundle.md.

`Manifest` and the dataclasses below are the format: field names are the JSON keys, types are checked strictly, unknown and
duplicate keys are errors. `open_bundle` reads and checks a bundle, `write_bundle` writes one so that it appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deixis.errors import BundleFormatError, BundleIntegrityError, BundleNotFoundError, BundleVersionError

FORMAT_NAME = "deixis-bundle"
FORMAT_VERSION = (1, 0)
MANIFEST_NAME = "manifest.json"
MANIFEST_MAX_BYTES = 4 << 20

Dim = int | str  # a fixed size, or the name of a symbolic dimension


@dataclass(frozen=True)
class Format:
    name: str
    version: str  # "major.minor"; a runtime reads every minor of its own major


@dataclass(frozen=True)
class ModelInfo:
    family: str  # "pixelllm" or "glamm"
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
    cross_cache: CacheSpec
    default_capacity: int  # tokens; the load option's default


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the network input. Normalisation is inside the graphs."""

    size: int  # side of the square input, px
    # "fit_inside": longest side to `size` (smaller pictures grow), plain bilinear with half-pixel centres and no anti-aliasing;
    # short = floor(size * min / max), long = int(short * max / min) (float32), as in the specification, section 2
    resize: Literal["fit_inside"] = "fit_inside"
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: bool = False
    pad: Literal["right_bottom"] = "right_bottom"
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

    # "box": corners with labels 2, 3, then `padding` points labelled -2. "corners": four corners labelled 1, then one point labelled -1.
    box_as: Literal["box", "corners"] = "box"
    padding: int = 3


@dataclass(frozen=True)
class TaskSpec:
    """One text task: what the text encoder gets and how the decoder is run. `{text}` in `instruction` is the user's text."""

    instruction: str
    instruction_tokens: int  # most context tokens, the end token included; a longer instruction is cut
    max_length: int  # L of section 11: length of the id array, begin token included
    beams: int = 1
    beams_per_node: int = 1
    alpha: float = 0.6  # exponent of the length penalty ((5 + i) / 6) ** alpha
    ban_repeat: bool = True  # greedy only: the previous token is not chosen again at once
    points_at: str = "begin,end,pad"  # positions whose points do not count (section 8); "^" inverts


@dataclass(frozen=True)
class MaskSpec:
    """Post-processing of mask logits (section 9.4; SAM for own prompts)."""

    threshold: float = 0.0  # logit
    token: int = 0  # mask token used for referring
    prompt_width: int = 256


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
    location: LocationSpec
    prompts: PromptSpec
    tasks: dict[str, TaskSpec]  # "caption", "region_caption", "trace", "refer"
    mask: MaskSpec
    parity: dict[str, ParityRecord]
    golden: str  # npz of golden vectors: "<role>/in/<name>" and "<role>/out/<name>"
    provenance: Provenance

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


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
        raise BundleFormatError(f"{manifest_path}: larger than {MANIFEST_MAX_BYTES} bytes; this is not a deixis manifest")
    manifest = parse_manifest(manifest_path.read_bytes(), where=str(manifest_path))
    problems = [p for name, info in sorted(manifest.files.items()) for p in _check_file(root, name, info, verify_hashes)]
    if problems:
        raise BundleIntegrityError(
            f"bundle {root} is damaged: {'; '.join(problems)}; copy or export it again", tuple(problems)
        )
    return Bundle(root.resolve(), manifest)


def parse_manifest(data: bytes, where: str = MANIFEST_NAME) -> Manifest:
    """Parse and check manifest bytes. Raises BundleFormatError (listing every problem) or BundleVersionError."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BundleFormatError(f"{where}: not a manifest: {error}; copy or export the bundle again") from None
    _check_version(values, where)
    problems: list[str] = []
    manifest = _parse(Manifest, values, "", problems)
    if not problems:
        problems += _check_references(manifest)
    if problems:
        raise BundleFormatError(f"{where}: {'; '.join(problems)}", tuple(problems))
    return manifest


@contextmanager
def write_bundle(destination: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside `destination` to fill; it takes the destination's name when the block ends well.

    On any error the temporary directory is removed and an existing bundle stays as it was.
    Raises FileExistsError when the destination exists and `force` is False.
    """
    target = Path(destination)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another --out or pass --force")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(work, target)
            shutil.rmtree(old)
        else:
            os.replace(work, target)
        target.chmod(0o755)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def describe_files(root: Path) -> dict[str, FileInfo]:
    """Hash every file below `root` but the manifest, for `Manifest.files`."""
    paths = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST_NAME)
    return {p.relative_to(root).as_posix(): FileInfo(sha256_of(p), p.stat().st_size) for p in paths}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a bundle directory under a temporary name, then rename. The text is parsed back first."""
    text = manifest.to_json()
    parse_manifest(text.encode())
    temporary = root / f".{MANIFEST_NAME}.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, root / MANIFEST_NAME)


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: typing.BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_version(values: Any, where: str) -> None:
    form = values.get("format") if isinstance(values, dict) else None
    if not isinstance(form, dict) or form.get("name") != FORMAT_NAME:
        raise BundleFormatError(f"{where}: not a deixis bundle (no format.name {FORMAT_NAME!r})")
    found = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", str(form.get("version", "")))
    if not found:
        raise BundleFormatError(f"{where}: format.version must be like '1.0', found {form.get('version')!r}")
    version = (int(found[1]), int(found[2]))
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{where}: bundle format {found[0]} is newer than this deixis reads "
            f"({FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}); upgrade deixis or export the bundle again with this version"
        )


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
    positive = {
        "image.size": manifest.image.size,
        "caches.default_capacity": manifest.caches.default_capacity,
        "tokenizer.vocab_size": manifest.tokenizer.vocab_size,
        "location.points_per_token": manifest.location.points_per_token,
        **{f"tasks.{k}.max_length": t.max_length for k, t in manifest.tasks.items()},
        **{f"tasks.{k}.beams": t.beams for k, t in manifest.tasks.items()},
    }
    problems += [f"{where}: must be positive, found {value}" for where, value in positive.items() if value < 1]
    return problems


def _path_problems(name: str) -> list[str]:
    path = PurePosixPath(name)
    if path.is_absolute() or "\\" in name or ":" in name or ".." in path.parts or str(path) != name or name in ("", "."):
        return [f"{name!r} is not a plain path inside the bundle"]
    return []


def _check_file(root: Path, name: str, info: FileInfo, verify_hash: bool) -> Iterator[str]:
    path = root / name
    if any(p.is_symlink() for p in (path, *path.parents) if p != root and root in p.parents):
        yield f"{name} is a link, which bundles may not hold"
    elif not path.is_file():
        yield f"{name} is missing"
    elif (size := path.stat().st_size) != info.bytes:
        yield f"{name} has {size} bytes where the manifest says {info.bytes}"
    elif verify_hash and sha256_of(path) != info.sha256:
        yield f"{name} was altered (its sha256 differs from the manifest)"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {sorted({n for n in names if names.count(n) > 1})}")
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Check `value` (from JSON) against a type hint and build it; every mismatch is added to `problems`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where, problems)
    if origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(args[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    accepts: dict[Any, Callable[[Any], bool]] = {
        int: lambda v: isinstance(v, int) and not isinstance(v, bool),
        float: lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        str: lambda v: isinstance(v, str),
        bool: lambda v: isinstance(v, bool),
    }
    if origin is Literal:
        good = value in args and type(value) in {type(a) for a in args}
    elif origin in (typing.Union, types.UnionType):
        good = any(accepts[option](value) for option in args)
    else:
        good = kind in accepts and accepts[kind](value)
    if not good:
        expected = " or ".join(map(repr, args)) if origin is Literal else getattr(kind, "__name__", str(kind))
        problems.append(f"{where.lstrip('.')}: expected {expected}, found {str(value)[:60]!r}")
    return value


def _parse_dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{where.lstrip('.') or 'manifest'}: expected an object, found {type(value).__name__}")
        return None
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    problems += [f"{f'{where}.{key}'.lstrip('.')}: unknown key" for key in value if key not in fields]
    built: dict[str, Any] = {}
    for name, item in fields.items():
        if name in value:
            built[name] = _parse(hints[name], value[name], f"{where}.{name}", problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(f"{f'{where}.{name}'.lstrip('.')}: missing")
    return kind(**built) if not problems else None
