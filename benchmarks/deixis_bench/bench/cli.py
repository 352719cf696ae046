"""`deixis bench BUNDLE`: time, memory and energy, stage by stage, and against what the machine can do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from deixis.errors import DeixisError
from deixis_bench.bench.settings import Settings

DEFAULTS = Settings()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"deixis bench: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return value


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="deixis bench", description=__doc__, epilog="What is measured, and how: benchmarks/PROTOCOL.md")
    root.add_argument("bundle", metavar="BUNDLE", nargs="?", help="folder or name of a bundle")
    root.add_argument("--device", choices=("auto", "cpu", "cuda"), default=DEFAULTS.device, help="default: %(default)s")
    root.add_argument("--threads", metavar="N", type=_positive, help="of one graph run (default: as deixis chooses)")
    root.add_argument("--batch", metavar="N", type=_positive, default=1, help="pictures at once (default: %(default)s)")
    root.add_argument(
        "--prompt-tokens",
        metavar="N",
        type=_positive,
        default=DEFAULTS.prompt_tokens,
        help="tokens of given texts (default: %(default)s)",
    )
    root.add_argument(
        "--new-tokens",
        metavar="N",
        type=_positive,
        default=DEFAULTS.new_tokens,
        help="tokens of generated texts, exactly so many (default: %(default)s)",
    )
    root.add_argument(
        "--rounds", metavar="N", type=_positive, default=DEFAULTS.rounds, help="that count (default: %(default)s)"
    )
    root.add_argument(
        "--warmup", metavar="N", type=_count, default=DEFAULTS.warmup_rounds, help="before (default: %(default)s)"
    )
    root.add_argument(
        "--cold",
        metavar="N",
        type=_count,
        default=DEFAULTS.cold,
        help="fresh processes; 0 = nothing is measured cold, nor memory (default: %(default)s)",
    )
    root.add_argument("--seed", metavar="N", type=_count, default=0, help="of pictures and random weights")
    root.add_argument("--json", metavar="FILE", type=Path, help="write the report")
    root.add_argument("--html", metavar="FILE", type=Path, help="write the report as a page that needs nothing else")
    root.add_argument(
        "--rivals", metavar="NAME[:PRECISION]", nargs="+", help="other runtimes, beside deixis; 'all' = every one"
    )
    root.add_argument("--part", default="text", help="what rivals run: text, llama or encoder (default: %(default)s)")
    root.add_argument(
        "--random", metavar="PRESET", help="measure the sizes of a preset with random weights, instead of a bundle"
    )
    root.add_argument("--precision", default="fp32", help="of --random, as of 'deixis export' (default: %(default)s)")
    root.add_argument("--work", metavar="DIR", type=Path, help="where --random and --rivals keep models for next time")
    root.add_argument(
        "--compare", metavar=("A", "B"), nargs=2, help="two reports, or two bundles, which are run in turn"
    )
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit code: 0 done, 1 failed, 2 used wrongly; errors are one line on stderr."""
    root = parser()
    options = root.parse_args(argv)
    _check(root, options)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("deixis bench: interrupted; no report was written", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f'deixis bench: error: {error}; run: pip install "deixis[cpu,bench]"', file=sys.stderr)
    except (DeixisError, OSError) as error:
        print(f"deixis bench: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _check(root: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if sum(given is not None for given in (options.bundle, options.random, options.compare)) != 1:
        root.error("name a bundle, or --random PRESET, or --compare A B")
    if options.compare and (options.html or options.rivals):
        root.error("--compare writes no page and runs no rivals")
    for path in (options.json, options.html):
        if path is not None and not path.absolute().parent.is_dir():
            root.error(f"{path.parent}: no such folder")


def _run(options: argparse.Namespace) -> int:
    if options.compare:
        return _compare(options)
    from deixis_bench.bench.measure import measure
    from deixis_bench.bench.show import text

    settings = _settings(options)
    rivals = _rivals(options, settings) if options.rivals else []
    if options.random is not None:
        from deixis_bench.bench.random_preset import measure_random

        report = measure_random(options.random, options.precision, settings, options.work, _say)
    else:
        [report] = measure([options.bundle], settings, _say)
    report["rivals"] = rivals
    print(text(report))
    _write(options, report)
    return 0


def _rivals(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """Rows of the rivals, who come first: what is wrong with their names shows before anything was measured."""
    from deixis_bench.bench.settings import threads_of
    from deixis_bench.rivals.__main__ import default_work
    from deixis_bench.rivals.campaign import run_rivals
    from deixis_bench.rivals.contract import RivalError

    threads, work = threads_of(settings.threads or 0), options.work or default_work()
    try:
        return run_rivals(options.rivals, options.part, settings.rounds, threads, settings.new_tokens, work)
    except (ValueError, RivalError) as error:
        raise DeixisError(f"--rivals: {error}") from None


def _compare(options: argparse.Namespace) -> int:
    from deixis_bench.bench.compare import compare, read_report, text

    paths = [Path(given) for given in options.compare]
    if all(path.is_file() for path in paths):
        first, second = map(read_report, paths)
    elif any(path.is_file() for path in paths):
        raise DeixisError("--compare takes two reports or two bundles, not one of each")
    else:
        from deixis_bench.bench.measure import measure

        first, second = measure(options.compare, _settings(options), _say)
    print(text(first, second))
    if options.json is not None:
        _write_json(options.json, {"first": first, "second": second, **compare(first, second)})
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        device=options.device,
        threads=options.threads,
        batch=options.batch,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        warmup_rounds=options.warmup,
        cold=options.cold,
        seed=options.seed,
    )


def _write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.json is not None:
        _write_json(options.json, report)
    if options.html is not None:
        from deixis_bench.page import write_page

        write_page(report, options.html)


def _write_json(path: Path, report: dict[str, Any]) -> None:
    from deixis_bench.report import write_report

    write_report(path, report)


def _say(what: str) -> None:
    """Progress, for a person who waits; a file of what was printed stays clean."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
