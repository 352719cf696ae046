"""Which rivals there are, and what each can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OWN = "deixis"
DEFAULT_PRECISION = "fp32"
# A precision of a rival, and those of ours that it is compared with, best first. On a CPU deixis computes 16-bit
# weights in fp32, so bf16 stands beside fp32.
COUNTERPARTS: Mapping[str, tuple[str, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("fp32",),
    "int8": ("w8", "int8"),
    "w8": ("w8", "int8"),
    "int4": ("w4",),
    "w4": ("w4",),
}


@dataclass(frozen=True)
class Entry:
    """module: has `load(spec) -> Loaded`. parts: the precisions it runs, by part."""

    module: str
    parts: Mapping[str, tuple[str, ...]]


_HERE = "deixis_bench.rivals"
RIVALS: Mapping[str, Entry] = {
    OWN: Entry(
        f"{_HERE}.run_deixis",
        {"text": ("fp32", "w8", "int8", "w4"), "llama": ("fp32", "w8", "int8", "w4"), "encoder": ("fp32", "int8")},
    ),
    "torch": Entry(
        f"{_HERE}.run_torch",
        {"text": ("fp32", "bf16", "int8"), "llama": ("fp32", "bf16"), "encoder": ("fp32", "bf16")},
    ),
    "torch-compile": Entry(f"{_HERE}.run_torch", {"text": ("fp32", "bf16"), "encoder": ("fp32", "bf16")}),
    "transformers": Entry(f"{_HERE}.run_transformers", {"text": ("fp32", "bf16"), "llama": ("fp32", "bf16")}),
    "optimum-onnx": Entry(f"{_HERE}.run_optimum", {"text": ("fp32", "int8"), "llama": ("fp32", "int8")}),
    "ctranslate2": Entry(f"{_HERE}.run_ctranslate2", {"text": ("fp32", "int8"), "llama": ("fp32", "int8")}),
    "openvino": Entry(
        f"{_HERE}.run_openvino",
        {"text": ("fp32", "bf16"), "llama": ("fp32", "bf16"), "encoder": ("fp32", "bf16", "int8")},
    ),
    "onnxruntime": Entry(f"{_HERE}.run_onnxruntime", {"encoder": ("fp32", "int8")}),
    "onnxruntime-genai": Entry(f"{_HERE}.run_genai", {"llama": ("fp32", "int8", "int4")}),
}


@dataclass(frozen=True)
class Chosen:
    name: str
    precision: str
    module: str


def choose(names: Sequence[str], part: str, rivals: Mapping[str, Entry] = RIVALS) -> list[Chosen]:
    """Competitors by name, each `NAME`, `NAME:PRECISION` or `NAME:all`; "all" is everything that runs the part.

    Ours comes first, and is there for every precision that another is compared with. Raises ValueError naming what is
    unknown.
    """
    chosen: dict[tuple[str, str], Chosen] = {}

    def add(name: str, precision: str) -> None:
        chosen[name, precision] = Chosen(name, precision, rivals[name].module)

    known = [name for name, entry in rivals.items() if part in entry.parts]
    for text in [f"{name}:all" for name in known] if list(names) == ["all"] else names:
        name, _, precision = text.partition(":")
        if name not in known:
            raise ValueError(f"no rival {name!r} for part {part!r}; choose of {', '.join(known)}, or all")
        possible = rivals[name].parts[part]
        if precision not in ("", "all", *possible):
            raise ValueError(f"{name} runs part {part!r} in {', '.join(possible)}, not in {precision!r}")
        for each in possible if precision == "all" else (precision or DEFAULT_PRECISION,):
            add(name, each)
    if OWN in known:
        for competitor in list(chosen.values()):
            own = [p for p in COUNTERPARTS[competitor.precision] if p in rivals[OWN].parts[part]]
            if own and not any((OWN, p) in chosen for p in own):
                add(OWN, own[0])
    return sorted(chosen.values(), key=lambda each: each.name != OWN)
