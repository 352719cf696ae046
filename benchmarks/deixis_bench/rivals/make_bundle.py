"""A bundle with the shared weights: `python -m deixis_bench.rivals.make_bundle PART PRECISION WEIGHTS BUNDLE`.

A process of its own, so that a worker that runs the bundle has no PyTorch in its memory. The text model sits in a
PixelLLM, or the LLaMA in a GLaMM, whose other parts are tiny; they are exported, and never run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deixis_bench.rivals.contract import MOST_NEW_TOKENS, PROMPT_TOKENS, RivalError, Spec
from deixis_bench.rivals.weights import SEED, read_t5

if TYPE_CHECKING:
    from deixis_train.models.glamm.glamm import Glamm
    from deixis_train.models.pixelllm import PixelLLM

_TEXT_ROLES = ("text_encoder", "decoder_step", "decoder_pass")
_ROLES = {"text": _TEXT_ROLES, "llama": ("decoder_step",), "encoder": ("sam_encoder",)}
_LENGTH = PROMPT_TOKENS + MOST_NEW_TOKENS + 8


def bundle_of(spec: Spec, precision: str) -> Path:
    """The bundle of a worker's weights in a precision, made when it is not there. Raises RivalError.

    One that other sources exported is made anew: else a campaign would measure yesterday's graphs.
    """
    bundle = spec.work.parent / f"bundle-{precision}-{_sources()}"
    if not bundle.exists():
        for old in spec.work.parent.glob(f"bundle-{precision}-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        command = [
            sys.executable,
            "-m",
            "deixis_bench.rivals.make_bundle",
            spec.part,
            precision,
            str(spec.folder),
            str(bundle),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RivalError(f"the export to {precision} failed: {lines[-1]}")
    return bundle


def _sources() -> str:
    """Digest of the code that makes graphs."""
    digest = hashlib.sha256()
    for package in ("deixis_export", "deixis_train.models"):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise RivalError(f"{package} is not installed, so no bundle can be made")
        for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def make_bundle(part: str, precision: str, folder: Path, bundle: Path) -> None:
    """Export; the graphs of the part get the precision, all others stay fp32."""
    import torch

    from deixis_export.bundle_parts import ExportOptions
    from deixis_export.export import export_bundle

    torch.manual_seed(SEED)  # of the parts that are never run
    model, tokenizer = {"text": _text_model, "llama": _llama_model, "encoder": _encoder_model}[part](folder)
    roles = _ROLES[part] if precision != "fp32" else ()
    options = ExportOptions(precision="fp32", precision_of={role: _of_role(role, precision) for role in roles})  # type: ignore[arg-type]
    export_bundle(model, bundle, tokenizer_json=tokenizer, options=options, source="random weights")


def _of_role(role: str, precision: str) -> str:
    """Weight-only precisions are for the decoder; its encoder, which holds the same weights, is then int8."""
    return "int8" if role == "text_encoder" and precision in ("w8", "w4") else precision


def _text_model(folder: Path) -> tuple[PixelLLM, str]:
    from deixis_export.presets import random_tokenizer_for
    from deixis_train.models.config import PRESETS
    from deixis_train.models.pixelllm import PixelLLM

    t5 = read_t5(folder)
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(
        tiny,
        name="rivals-text",
        t5=t5.config,
        # The prefix is one vector: the embedding of the first of the 64 ids.
        prompt_adapter=dataclasses.replace(tiny.prompt_adapter, num_outputs=1),
        point_predictor=None,
        mask_adapter=None,
        mask_decoder=None,
        max_caption_length=_LENGTH,
        context_length=PROMPT_TOKENS,
        refer_length=PROMPT_TOKENS,
    )
    model = PixelLLM(config).eval()
    model.text.load_state_dict(t5.state_dict())
    return model, random_tokenizer_for(config)


def _llama_model(folder: Path) -> tuple[Glamm, str]:
    from deixis_export.presets_glamm import random_glamm_tokenizer
    from deixis_train.loaders.llama import load_llama_folder
    from deixis_train.models.glamm.config import GLAMM_PRESETS
    from deixis_train.models.glamm.glamm import Glamm

    llama = load_llama_folder(folder)
    like = GLAMM_PRESETS["glamm-tiny" if llama.config.vocab < 10_000 else "glamm-135m"]
    config = dataclasses.replace(
        GLAMM_PRESETS["glamm-tiny"], name="rivals-llama", llama=llama.config, ids=like.ids, max_new_tokens=_LENGTH
    )
    model = Glamm(config).eval()
    model.llama.load_state_dict(llama.state_dict())
    return model, random_glamm_tokenizer(config)


def _encoder_model(folder: Path) -> tuple[PixelLLM, str]:
    from deixis_export.presets import random_tokenizer_for
    from deixis_train.checkpoint import load_checkpoint

    model = load_checkpoint(folder).pixelllm
    return model, random_tokenizer_for(model.config)


def main(argv: list[str]) -> int:
    from deixis.errors import DeixisError

    part, precision, folder, bundle = argv
    try:
        make_bundle(part, precision, Path(folder), Path(bundle))
    except (DeixisError, ValueError) as error:
        print(f"make_bundle: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
