"""`deixis export CHECKPOINT --out BUNDLE`, also as `python -m deixis_export`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from deixis.bundle import Manifest
from deixis.errors import DeixisError, ExportError

PRECISION_NAMES = ("fp32", "fp16", "int8", "w8", "w4")  # of `weights`, which needs torch
AUTO = "auto"
PICTURES = 200
OWN_LICENCE = "Apache-2.0"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"deixis export: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deixis export",
        description="Turn a checkpoint into a bundle, every graph of which has been compared with the PyTorch model.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        nargs="?",
        help="folder of a checkpoint that deixis wrote, or of a published GLaMM",
    )
    parser.add_argument("--out", metavar="BUNDLE", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument(
        "--precision",
        choices=(*PRECISION_NAMES, AUTO),
        default="fp32",
        help="how weights are stored; fp16 is computed in fp32 on a CPU; int8 is for encoders; w8 and w4, blocks of 8 "
        "and 4 bits, are for graphs of text and leave the others in fp16; auto tries what is as good as fp32 "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--precision-of",
        metavar="GRAPH=PRECISION",
        type=_precision_of,
        action="append",
        default=[],
        help="another precision for one graph, as in decoder_step=int8; may be repeated",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=Path,
        help="with --precision auto: rendered scenes that training has not seen, which candidates are asked about; "
        "without it only their drift is measured",
    )
    parser.add_argument("--pictures", metavar="N", type=_positive, help=f"of --data, the first N (default: {PICTURES})")
    parser.add_argument("--four-bits", action="store_true", help="with --precision auto: try w4, too")
    parser.add_argument(
        "--threads", metavar="N", type=_positive, help="with --precision auto: of a graph while it is measured"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--frozen", metavar="FILE", type=Path, help="file with the parts that the checkpoint leaves out"
    )
    parser.add_argument(
        "--clip",
        metavar="PATH",
        type=Path,
        help="file or folder of CLIP ViT-L/14 at 336 px (openai/clip-vit-large-patch14-336), which published folders "
        "of GLaMM leave out",
    )
    parser.add_argument(
        "--licence", help=f"stated in the manifest (default: {OWN_LICENCE}; of a published folder: none is stated)"
    )
    parser.add_argument("--preset", metavar="NAME", help="with --random: the sizes of a model that needs no checkpoint")
    parser.add_argument("--random", action="store_true", help="random weights, for benchmarks and tests")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the example request")
    parser.add_argument("--verbose", action="store_true", help="one line per graph while it runs")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def _precision_of(text: str) -> tuple[str, str]:
    role, _, precision = text.partition("=")
    if not role or precision not in PRECISION_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not GRAPH= and one of {', '.join(PRECISION_NAMES)}")
    return role, precision


def main(argv: Sequence[str] | None = None) -> int:
    """Export. Returns the exit code: 0 done, 1 failed, 2 used wrongly; errors are one line on stderr."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.random != (options.preset is not None):
        parser.error("--preset and --random go together")
    if (options.checkpoint is None) == (options.preset is None):
        parser.error("name a checkpoint, or --preset NAME --random")
    if options.precision != AUTO and (options.data or options.pictures or options.four_bits or options.threads):
        parser.error("--data, --pictures, --four-bits and --threads belong to --precision auto")
    if options.pictures and options.data is None:
        parser.error("--pictures belongs to --data")
    if options.out.exists() and not options.force:
        print(f"deixis export: error: {options.out} exists; choose another --out or pass --force", file=sys.stderr)
        return 1
    if options.verbose:
        logging.getLogger("deixis_export").setLevel(logging.INFO)
        logging.basicConfig(format="%(message)s")
    try:
        _export(options)
    except KeyboardInterrupt:
        print("deixis export: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except (DeixisError, ValueError, OSError) as error:
        print(f"deixis export: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    try:
        from deixis_export import routes
        from deixis_export.bundle_parts import ExportOptions
        from deixis_export.precision_search import SearchSettings, table
        from deixis_export.quality import Judge
    except ImportError as error:
        raise ExportError(f'{error.name} is not installed; run: pip install "deixis[export]"') from None

    start = time.perf_counter()
    checkpoint: Path | None = options.checkpoint
    published = checkpoint is not None and routes.is_published(checkpoint)
    if options.clip is not None and not published:
        raise ExportError("--clip belongs to the published folder of a GLaMM")
    licence = options.licence if options.licence is not None else "" if published else OWN_LICENCE
    search, precision = None, cast(Any, options.precision)
    if precision == AUTO:
        judge = Judge(options.data, options.pictures or PICTURES, options.threads) if options.data else None
        search, precision = SearchSettings(judge, options.four_bits, threads=options.threads or 0), "fp16"
    settings = ExportOptions(precision, options.seed, licence, dict(options.precision_of))
    out, force = options.out, options.force
    if checkpoint is None:
        bundle = routes.export_random(options.preset, out, options=settings, force=force, search=search)
    elif published:
        bundle = routes.export_published(
            checkpoint, out, clip=options.clip, options=settings, force=force, search=search
        )
    else:
        bundle = routes.export_checkpoint(
            checkpoint, out, frozen=options.frozen, options=settings, force=force, search=search
        )
    manifest = bundle.manifest
    if manifest.precision_search is not None:
        print("\n".join(table(manifest.precision_search)))
    worst = max((r.error, name) for name, r in manifest.parity.items() if name.startswith(("graph/", "chain/")))
    size = sum(info.bytes for info in manifest.files.values()) / 1e6
    print(
        f"{options.out}: {len(manifest.graphs)} graphs, {size:.1f} MB, {_precisions(manifest)}; "
        f"worst parity {worst[0]:.1e} ({worst[1]}); {time.perf_counter() - start:.0f} s"
    )


def _precisions(manifest: Manifest) -> str:
    """How many graphs are stored how: "fp16", or "5 fp16, w8 text_encoder decoder_step decoder_pass"."""
    roles: dict[str, list[str]] = {}
    for role, graph in manifest.graphs.items():
        roles.setdefault(graph.precision.weights, []).append(role)
    if len(roles) == 1:
        return next(iter(roles))
    most, *others = sorted(roles, key=lambda name: -len(roles[name]))
    return ", ".join([f"{len(roles[most])} {most}", *(f"{name} {' '.join(roles[name])}" for name in others)])
