"""Whole exports of glamm: parity records, precisions graph by graph, what the manifest says, the tokenizer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer

from deixis.bundle import open_bundle
from deixis.conversation import render
from deixis.errors import ExportError
from deixis_export import cli
from deixis_export.cases import golden_arrays
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.families import GLAMM
from deixis_export.graph_spec import run_torch
from deixis_export.manifest_glamm import default_capacity, dim_ranges, task_table
from deixis_export.presets import random_model, random_parts
from deixis_export.presets_glamm import random_glamm_tokenizer
from deixis_export.session import GraphSession, relative_error
from deixis_export.weights import round_to_fp16
from deixis_train.glamm.conversations import conversation_spec
from deixis_train.models.config import PRESETS
from deixis_train.models.glamm.config import GLAMM_PRESETS
from deixis_train.models.glamm.glamm import Glamm
from make_tiny_bundle import SEED, TINY_GLAMM

CONFIG = GLAMM_PRESETS["glamm-tiny"]
ROLES = ["global_encoder", "region_encoder", "decoder_step", "grounding_encoder", "pixel_decoder"]
CHAIN = {f"chain/{name}" for name in ("greedy_ids", "regions", "states", "masks", "iou")}


@pytest.fixture(scope="module")
def model() -> Glamm:
    """The model of the tiny bundle, its weights rounded as they are stored there."""
    model, _ = random_parts("glamm-tiny", SEED)
    assert isinstance(model, Glamm)
    for name, part in model.named_children():
        round_to_fp16(part, name)
    return model


def test_the_tiny_bundle_is_what_its_generator_makes(model: Glamm) -> None:
    bundle = open_bundle(TINY_GLAMM)
    manifest = bundle.manifest
    assert (manifest.model.family, manifest.format.version) == ("glamm", "1.3")
    tasks = task_table(CONFIG, {})
    assert manifest.tasks == tasks and manifest.dims == dim_ranges(CONFIG, tasks)
    assert manifest.conversation == conversation_spec(CONFIG)
    assert bundle.file(manifest.tokenizer.file).read_text(encoding="utf-8") == random_glamm_tokenizer(CONFIG)
    assert set(manifest.parity) == {f"{kind}/{role}" for kind in ("graph", "drift", "half") for role in ROLES} | CHAIN
    assert manifest.parity["chain/greedy_ids"].error == 0
    specs, (case, _) = GLAMM.graph_specs(model), GLAMM.cases(model, SEED)
    with np.load(bundle.file(manifest.golden), allow_pickle=False) as arrays:
        golden = {name: arrays[name] for name in arrays.files}
    names = {re.sub(r"/out\[::\d+\]/", "/out/", name) for name in golden}
    for role, spec in specs.items():
        graph = manifest.graphs[role]
        given = [n for n, info in graph.outputs.items() if info.dtype.startswith("float")]  # ids are no numbers
        assert names >= {f"{role}/in/{n}" for n in graph.inputs} | {f"{role}/out/{n}" for n in given}
        inputs = {name: golden[f"{role}/in/{name}"].astype(info.dtype) for name, info in graph.inputs.items()}
        expected = run_torch(spec, model, {name: torch.from_numpy(value) for name, value in inputs.items()})
        with GraphSession(bundle.file(graph.file), threads=1) as session:
            found = session.run(inputs)
        assert relative_error(found, {name: value.numpy() for name, value in expected.items()}) < 1e-4, role
        kept = {name: value for name, value in golden.items() if name.startswith(f"{role}/out")}
        assert relative_error(golden_arrays(role, {}, found), kept) < 1e-3, role
        assert set(case[role]) == set(inputs)


def test_it_is_small() -> None:
    assert sum(info.bytes for info in open_bundle(TINY_GLAMM).manifest.files.values()) < 1_600_000


def test_precision_graph_by_graph(tmp_path: Path) -> None:
    model, tokenizer_json = random_parts("glamm-tiny", SEED)
    bundle = export_bundle(
        model,
        tmp_path / "bundle",
        tokenizer_json=tokenizer_json,
        options=ExportOptions("fp16", precision_of={"decoder_step": "int8", "pixel_decoder": "fp32"}),
        tasks={"caption": {"instruction": "What is it?"}},
    )
    manifest = bundle.manifest
    found = {role: graph.precision.weights for role, graph in manifest.graphs.items()}
    assert found == dict.fromkeys(ROLES, "fp16") | {"decoder_step": "int8", "pixel_decoder": "fp32"}
    assert manifest.tasks["caption"].instruction == "What is it?"
    graphs = {role: onnx.load(bundle.file(graph.file)).graph for role, graph in manifest.graphs.items()}
    assert [r for r, g in graphs.items() if any(n.op_type == "MatMulInteger" for n in g.node)] == ["decoder_step"]
    half = {r for r, g in graphs.items() if any(i.data_type == onnx.TensorProto.FLOAT16 for i in g.initializer)}
    assert half == set(ROLES) - {"pixel_decoder"}  # int8 keeps the embedding table in fp16
    parity = manifest.parity
    assert {name for name in parity if name.startswith("drift/")} == {
        f"drift/{r}" for r in ROLES if r != "pixel_decoder"
    }
    assert parity["graph/pixel_decoder"].error < 1e-4 < parity["graph/decoder_step"].error < 0.2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (ExportOptions("fp16", precision_of={"decoder": "fp32"}), "no graph 'decoder'; it has global_encoder"),
        (ExportOptions("int4"), "unknown precision 'int4'"),  # type: ignore[arg-type]
        (ExportOptions(precision_of={"pixel_decoder": "int4"}), "unknown precision 'int4'"),  # type: ignore[dict-item]
    ],
)
def test_wrong_precisions_are_refused(tmp_path: Path, options: ExportOptions, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        export_bundle(Glamm(CONFIG), tmp_path / "bundle", tokenizer_json="{}", options=options)
    assert not list(tmp_path.iterdir())


def test_graphs_that_share_weights_share_their_precision(tmp_path: Path) -> None:
    options = ExportOptions("fp16", precision_of={"decoder_pass": "fp32"})
    with pytest.raises(ExportError, match="text_encoder and decoder_pass hold the same weights"):
        export_bundle(random_model(PRESETS["tiny"]), tmp_path / "bundle", tokenizer_json="{}", options=options)
    assert not list(tmp_path.iterdir())


def test_unknown_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="task 'trace'"):
        export_bundle(Glamm(CONFIG), tmp_path / "bundle", tokenizer_json="{}", tasks={"trace": {}})


def test_the_published_questions_to_the_letter() -> None:
    tasks = task_table(CONFIG, {})
    assert "interleaved     segmentation masks" in tasks["grounded_caption"].instruction  # five spaces
    assert tasks["region_caption"].instruction.endswith("in the picture marked by <bbox>?")
    assert set(tasks) == {"caption", "region_caption", "refer", "grounded_caption", "ground_phrases", "ask"}
    assert not any(task.ban_repeat for task in tasks.values())
    assert "region_caption" not in task_table(dataclasses.replace(CONFIG, region=None), {})


@pytest.mark.parametrize("name", GLAMM_PRESETS)
def test_the_cache_holds_a_picture_a_question_and_an_answer(name: str) -> None:
    config = GLAMM_PRESETS[name]
    capacity = default_capacity(config, task_table(config, {}))
    assert capacity >= config.clip.tokens + config.max_question_tokens + config.max_new_tokens
    assert capacity % 256 == 0


@pytest.mark.parametrize("name", GLAMM_PRESETS)
def test_the_random_tokenizer_has_the_marks_at_their_ids(name: str) -> None:
    config = GLAMM_PRESETS[name]
    ids, tokenizer = config.ids, Tokenizer.from_str(random_glamm_tokenizer(config))
    assert tokenizer.get_vocab_size() == config.llama.vocab
    marks = {"<p>": ids.phrase_start, "</p>": ids.phrase_end, "[SEG]": ids.mask, "<bbox>": ids.region, "</s>": ids.end}
    marks |= {"<im_start>": ids.image_start, "<im_end>": ids.image_end, "<s>": ids.begin}
    for mark, expected in marks.items():
        assert tokenizer.encode(mark, add_special_tokens=False).ids == [expected]
    text = "Look at <p> the red cup </p> [SEG]\nand <p> 3 pears! </p> [SEG]."
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids.unknown not in found
    assert [i for i in found if i in marks.values()] == [ids.phrase_start, ids.phrase_end, ids.mask] * 2
    assert "".join(tokenizer.decode(found).split()) == "Lookattheredcupand3pears!."
    prompt = render(conversation_spec(config), [("What is this?", None)])
    assert ids.unknown not in tokenizer.encode(prompt.replace("<image>", ""), add_special_tokens=False).ids
    assert (ids.unknown in tokenizer.encode("Ω", add_special_tokens=False).ids) == (
        config.llama.vocab < 1000
    )  # bytes need room


def test_the_command_takes_a_precision_for_each_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {}

    def export(model, destination, **options):  # type: ignore[no-untyped-def]
        called.update(options, model=model)
        return open_bundle(TINY_GLAMM)

    monkeypatch.setattr("deixis_export.routes.export_bundle", export)
    arguments = ["--preset", "glamm-tiny", "--random", "--out", str(tmp_path / "b"), "--precision", "fp16"]
    arguments += ["--precision-of", "decoder_step=int8", "--precision-of", "pixel_decoder=fp32"]
    assert cli.main(arguments) == 0
    assert isinstance(called["model"], Glamm)
    assert called["options"].precision_of == {"decoder_step": "int8", "pixel_decoder": "fp32"}
    assert "5 graphs, 1.4 MB, fp16;" in capsys.readouterr().out  # as the bundle says it, whatever was asked for


@pytest.mark.parametrize("given", ["decoder_step", "=fp16", "decoder_step=int4"])
def test_a_precision_that_is_none_is_one_line(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--preset", "glamm-tiny", "--random", "--out", "x", "--precision-of", given])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is not GRAPH= and one of fp32, fp16, int8" in err
