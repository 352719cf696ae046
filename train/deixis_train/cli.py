"""`deixis train`: train a recipe on a data folder, list recipes, or render scenes to train on."""

from __future__ import annotations

import argparse
import ctypes
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deixis.errors import DeixisError
from deixis_train.training.recipe import RecipeError, load_recipe, shipped

DESCRIPTION = """Train a recipe: the name of a shipped one (--list) or the path of a .toml file.
A stopped run goes on where it was when the same command is given again."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deixis train", description=DESCRIPTION, epilog="deixis train scenes --help: render scenes to train on"
    )
    parser.add_argument("recipe", nargs="?", help="name of a shipped recipe, or a .toml file")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes")
    parser.add_argument("--data", type=Path, metavar="DIR", help="data folder that the recipe's paths start from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run: states, logs, checkpoint")
    parser.add_argument("--stage", metavar="NAME", help="train this stage only; those before it must be done")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="factor on all steps")
    parser.add_argument("--features", type=Path, metavar="DIR", help="folder of cached features (default: in --out)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that make batches ahead of time")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu leaves GPUs alone")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. seed=1"
    )
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="export the checkpoint to this bundle at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status; what goes wrong is said in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["scenes"]:
        from deixis_train.data.scenes.generate import main as render

        return int(render(arguments[1:]) or 0)
    command = parser()
    options = command.parse_args(arguments)
    if options.list:
        for name in shipped():
            print(f"{name:20} {load_recipe(name).description}")
        return 0
    if options.recipe is None or options.data is None or options.out is None:
        command.error("name a recipe, --data and --out; or --list")
    try:
        return _train(options)
    except (DeixisError, RecipeError, ValueError, FloatingPointError, OSError) as error:
        print(f"deixis train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("deixis train: stopped; the same command goes on from the last saved step", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.set)
    if not options.data.is_dir():
        raise RecipeError(f"--data {options.data}: no such folder")
    if options.steps_scale <= 0:
        raise RecipeError(f"--steps-scale {options.steps_scale}: must be above 0")
    import torch
    from accelerate import Accelerator

    from deixis_train.training.run import Run, train

    _keep_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = Accelerator(cpu=options.device == "cpu")
    workers = options.workers or (8 if accelerator.device.type == "cuda" else 1)
    run = Run(recipe, options.data, options.out, options.features, options.stage, options.steps_scale, workers)
    checkpoint = train(run, accelerator)
    accelerator.end_training()
    if checkpoint is None or not accelerator.is_main_process:
        return 0
    command = ["deixis", "export", str(checkpoint), "--out", str(options.bundle or "BUNDLE")]
    if options.bundle is None:
        print(f"checkpoint in {checkpoint}; export it with: {' '.join(command)}")
        return 0
    program = shutil.which("deixis", path=str(Path(sys.executable).parent)) or shutil.which("deixis")
    if program is None:
        raise RecipeError(f"checkpoint in {checkpoint}, but no `deixis` command is installed to export it with")
    return subprocess.run([program, *command[1:]], check=False).returncode


def _keep_memory() -> None:
    """Let glibc keep freed memory. It maps large tensors anew every time, and on a CPU fetching their pages can take as
    long as computing."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)


if __name__ == "__main__":
    raise SystemExit(main())
