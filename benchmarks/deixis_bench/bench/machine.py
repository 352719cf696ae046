"""What a measurement ran on, as far as a reader needs it to judge the numbers."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import deixis
from deixis_bench.bench.settings import threads_of

PACKAGES = (
    "numpy", "opencv-python-headless", "tokenizers", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "transformers",
    "openvino", "ctranslate2", "onnxruntime-genai", "optimum-onnx",
)  # fmt: skip
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def describe() -> dict[str, Any]:
    """Processor, memory, system and versions. `load`: runnable programs when asked, of all users."""
    return {
        "cpu": _from_file(_CPUINFO, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": threads_of(0),
        "cache_mb": last_cache_bytes() / (1 << 20),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "deixis": deixis.__version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def last_cache_bytes() -> int:
    """Size of the last level of cache that the first core sees; 0 where the system does not say."""
    sizes = [0]
    for file in sorted(_CACHES.glob("index*/size")):
        text = file.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text))
    return max(sizes)


def memory_bytes() -> int:
    """Memory of the machine; 0 where the system does not say."""
    return _meminfo("MemTotal")


def free_memory_bytes() -> int:
    """Memory that a new program could have; 0 where the system does not say."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    found = _from_file(_MEMINFO, name)
    return int(found.split()[0]) * 1024 if found else 0


def _from_file(path: Path, name: str) -> str | None:
    """The value of the first line `name : value`."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
