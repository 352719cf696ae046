"""The bundle: a directory with `manifest.json` and the files it names. Standard library only; see docs/bundle.md.

`Manifest` and the dataclasses of `deixis.manifest` are the format: types are checked strictly, unknown and duplicate
keys are errors. `open_bundle` reads and checks a bundle, `write_bundle` writes one so that it appears whole or not at
all.
"""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
import shutil
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deixis.errors import BundleFormatError, BundleIntegrityError, BundleNotFoundError, BundleVersionError
from deixis.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    Caches,
    CacheSpec,
    ConversationSpec,
    DetectionSpec,
    Dim,
    DimRange,
    FileInfo,
    Format,
    Graph,
    ImageSpec,
    LocationSpec,
    Manifest,
    MaskSpec,
    ModelInfo,
    ParityRecord,
    Precision,
    PrecisionSearch,
    PrecisionTrial,
    PromptSpec,
    Provenance,
    Reductions,
    TaskSpec,
    TensorInfo,
    TokenizerSpec,
)
from deixis.manifest_checks import check_references
from deixis.schema import build, read_json

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_MAX_BYTES",
    "MANIFEST_NAME",
    "Bundle",
    "CacheSpec",
    "Caches",
    "ConversationSpec",
    "DetectionSpec",
    "Dim",
    "DimRange",
    "FileInfo",
    "Format",
    "Graph",
    "ImageSpec",
    "LocationSpec",
    "Manifest",
    "MaskSpec",
    "ModelInfo",
    "ParityRecord",
    "Precision",
    "PrecisionSearch",
    "PrecisionTrial",
    "PromptSpec",
    "Provenance",
    "Reductions",
    "TaskSpec",
    "TensorInfo",
    "TokenizerSpec",
    "describe_files",
    "open_bundle",
    "parse_manifest",
    "sha256_of",
    "write_bundle",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_MAX_BYTES = 4 << 20


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
        problems += check_references(manifest)
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
