"""`deixis eval BUNDLE|CHECKPOINT --task ... --data DIR`: the field's metrics, of a bundle, a checkpoint, or both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from deixis.bundle import MANIFEST_NAME
from deixis.errors import DeixisError

DENSE = "dense-captions"
GROUNDED, QUESTIONS = "grounded-captions", "questions"
TASKS = ("refer", "masks", "caption", "trace", "free-trace", "regions", DENSE, GROUNDED, QUESTIONS)  # "all" means these
OTHERS = ("boxes",)
CHECKPOINT_CONFIG = "config.json"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"deixis eval: error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def parser() -> argparse.ArgumentParser:
    root = _Parser(prog="deixis eval", description=__doc__)
    root.add_argument(
        "model", metavar="MODEL", nargs="?", help="a bundle (name or folder) or the folder of a checkpoint"
    )
    root.add_argument("--checkpoint", metavar="DIR", type=Path, help="measure this checkpoint too, beside a bundle")
    root.add_argument("--frozen", metavar="FILE", type=Path, help="file with the parts that the checkpoint leaves out")
    root.add_argument("--task", nargs="+", choices=(*TASKS, *OTHERS, "all"), help="what to measure")
    root.add_argument("--data", metavar="DIR", type=Path, help="a folder of rendered scenes")
    root.add_argument("--kind", help="other data: its format (see docs/data.md); with --files and --images")
    root.add_argument("--files", metavar="FILE", nargs="+", type=Path, help="its annotations")
    root.add_argument("--images", metavar="DIR", type=Path, help="its pictures")
    root.add_argument("--instances", metavar="FILE", type=Path, help="COCO instances of the same pictures")
    root.add_argument("--split", metavar="NAME", help="of data sets that name their splits")
    root.add_argument("--option", metavar="NAME=VALUE", action="append", default=[], help="of the reader")
    root.add_argument("--alignment", choices=("rank", "text"), help="words and utterances of narrations")
    root.add_argument("--detections", metavar="FILE", type=Path, help="dense-captions of these, as COCO results")
    root.add_argument(
        "--similarity", choices=("words", "bert"), default="words", help="of phrases, for recall (default: %(default)s)"
    )
    root.add_argument("--bert", metavar="DIR", type=Path, help="a local bert-base-uncased, for --similarity bert")
    root.add_argument("--limit", metavar="N", type=_positive, help="pictures (default: all)")
    root.add_argument("--expressions", metavar="N", type=_positive, help="most expressions, or questions, of a picture")
    root.add_argument("--json", metavar="FILE", type=Path, help="write the report")
    root.add_argument("--items", metavar="FILE", type=Path, help="write every answer with its scores as JSON lines")
    root.add_argument("--threads", metavar="N", type=_positive, help="of one run of a model (default: all cores)")
    root.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    root.add_argument(
        "--table", metavar="REPORT", nargs="+", type=Path, help="print reports as a table; nothing is run"
    )
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit code: 0 done, 1 failed, 2 used wrongly; errors are one line on stderr."""
    root = parser()
    options = root.parse_args(argv)
    try:
        if options.table:
            from deixis_bench.eval import table

            return table.main([str(path) for path in options.table])
        _check(root, options)
        return _run(options)
    except KeyboardInterrupt:
        print("deixis eval: interrupted; no report was written", file=sys.stderr)
        return 130
    except ImportError as error:
        hint = 'run: pip install "deixis[cpu,eval]", or for checkpoints "deixis[cpu,train,eval]"'
        print(f"deixis eval: error: {error}; {hint}", file=sys.stderr)
    except (DeixisError, OSError) as error:
        print(f"deixis eval: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _check(root: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    tasks = options.task or []
    if not tasks:
        root.error("say what to measure: --task")
    if (options.data is None) == (options.kind is None):
        root.error("give --data DIR, or --kind with --files and --images")
    if options.kind is not None and (not options.files or options.images is None):
        root.error("--kind needs --files and --images")
    if options.kind is None and (options.files or options.images or options.option or options.split):
        root.error("--files, --images, --option and --split belong to --kind")
    if options.kind is not None and ("all" in tasks or len({source_of(task) for task in tasks}) > 1):
        root.error("--kind goes with one task, with refer and masks, or with regions and dense-captions")
    if options.detections is not None:
        if tasks != [DENSE]:
            root.error("--detections goes with the one task dense-captions")
        if options.model or options.checkpoint or options.items:
            root.error("dense-captions of --detections are measured as they are: no model, no --items")
    elif options.model is None and options.checkpoint is None:
        root.error("name a bundle or a checkpoint (dense-captions: or --detections)")
    for path in (options.json, options.items):
        if path is not None and not path.parent.is_dir():
            root.error(f"{path.parent}: no such folder")


def _run(options: argparse.Namespace) -> int:
    from deixis_bench.eval.data import read_pictures
    from deixis_bench.eval.report import make_report, print_metrics
    from deixis_bench.report import write_report

    sources, instances, alignment = _sources(options)
    data: dict[str, Any] = {"folder": (options.data or options.images).resolve().name}
    bundle = checkpoint = None
    if options.detections is not None:
        from deixis_bench.eval.dense import dense_metrics

        pictures, skipped = read_pictures(sources, None, options.limit)
        values, counted = dense_metrics(options.detections, pictures, options.limit is not None)
        metrics = {"files": values}
    else:
        from deixis_bench.eval.measure import answerable, make_tasks, measure
        from deixis_train.evaluation.similarity import make_similarity

        names = _asked_tasks(options, sources)
        similarity = make_similarity(options.similarity, options.bert)
        tasks = make_tasks(set(sources), names, alignment, (options.similarity, similarity))
        for task in tasks:
            task.check()
        with ExitStack() as stack:
            predictors, bundle, checkpoint = _predictors(options, stack)
            tasks = answerable(tasks, predictors, options.task)
            pictures, skipped = read_pictures(sources, instances, options.limit)
            metrics, counted = measure(pictures, tasks, predictors, options.items, options.expressions)
    data |= {"pictures": len(pictures), **counted, **({"malformed records": skipped} if skipped else {})}
    print_metrics(metrics, data)
    if options.json is not None:
        write_report(options.json, make_report(metrics, data, bundle, checkpoint))
    return 0


def _asked_tasks(options: argparse.Namespace, sources: dict[str, Any]) -> list[str]:
    """Names of tasks to run; of "all" those that the data has."""
    return [task for task in _named(options.task) if source_of(task) in sources]


def _named(tasks: Sequence[str]) -> list[str]:
    """Tasks as given, "all" spelt out, each once."""
    return list(dict.fromkeys(name for task in tasks for name in (TASKS if task == "all" else (task,))))


def source_of(task: str) -> str:
    """The task whose file also answers this one."""
    return {"masks": "refer", DENSE: "regions"}.get(task, task)


def _sources(options: argparse.Namespace) -> tuple[dict[str, Any], Any, Any]:
    """Files by task, the file of instances or None, and the alignment of narrations."""
    from deixis_bench.eval.data import INSTANCES, Files, files_of, reader_options
    from deixis_train.evaluation.errors import EvaluationError

    joined = None if options.instances is None else Files("coco_instances", (options.instances,), options.images)
    if options.kind is not None:
        values = reader_options(options.option, options.split)
        files = Files(options.kind, tuple(options.files), options.images, values)
        return {source_of(options.task[0]): files}, joined, options.alignment or "rank"
    sources = {source_of(task): files_of(options.data, source_of(task)) for task in _named(options.task)}
    if "all" in options.task:
        absent = [task for task, files in sources.items() if not files.files[0].is_file()]
        for task in absent:
            print(f"deixis eval: {sources.pop(task).files[0]} is not there; {task} is left out", file=sys.stderr)
        if not sources:
            raise EvaluationError(f"{options.data}: holds no annotations; render scenes with 'deixis train scenes'")
    path = options.instances or options.data / INSTANCES
    if {"caption", "regions"} & set(sources) and (options.instances is not None or path.is_file()):
        joined = Files("coco_instances", (path,), options.data / "images")
    return sources, joined, options.alignment or "text"


def _predictors(options: argparse.Namespace, stack: ExitStack) -> tuple[list[Any], Any, Any]:
    """Predictors of the bundle and of the checkpoint, and what the report says of them."""
    import deixis
    from deixis_bench.eval.bundle_predictor import BundlePredictor

    bundle, checkpoint = options.model, options.checkpoint
    if bundle is not None and is_checkpoint(Path(bundle)):
        if checkpoint is not None:
            raise deixis.PromptError(f"{bundle} and --checkpoint are both checkpoints; measure one at a time")
        bundle, checkpoint = None, Path(bundle)
    predictors: list[Any] = []
    about_bundle = about_checkpoint = None
    if bundle is not None:
        model = stack.enter_context(deixis.load(bundle, device=options.device, threads=options.threads))
        info = model.info
        about_bundle = {"name": info.name, "device": info.device, "path": info.bundle.name}
        predictors.append(BundlePredictor(model))
    if checkpoint is not None:
        from deixis_train.evaluation.torch_predictor import load_predictor

        device = "cuda" if options.device == "cuda" else "cpu"
        predictor, about_checkpoint = load_predictor(checkpoint, options.frozen, device, options.threads)
        predictors.append(predictor)
    return predictors, about_bundle, about_checkpoint


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint and not a bundle."""
    return (folder / CHECKPOINT_CONFIG).is_file() and not (folder / MANIFEST_NAME).is_file()
