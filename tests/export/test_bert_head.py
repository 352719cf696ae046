"""A model with the BERT head through export and runtime: T5's graphs and requests, and torch's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import deixis
from deixis.bundle import Bundle, open_bundle
from deixis.decoding import Beams, DecodeRules
from deixis.errors import ExportError, PromptError
from deixis_export.cases import Sizes, example_picture, make_cases
from deixis_export.chain import GraphChain, greedy_tokens
from deixis_export.export import export_bundle
from deixis_export.graphs import graph_specs, run_torch
from deixis_export.presets import preset, random_model, random_tokenizer_for
from deixis_export.session import GraphSession, relative_error
from deixis_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from deixis_train.evaluation.torch_predictor import TorchPredictor
from deixis_train.models import decoding as reference
from deixis_train.models.config import BertTextConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import pixelllm_prompt

CONFIG = dataclasses.replace(
    preset("tiny"),
    name="tiny-bert",
    bert=BertTextConfig(vocab=200, emb=32, heads=2, layers=2, mlp=64, max_positions=24),
    begin_token_id=101,
    end_token_id=102,
    unknown_token_id=100,
)
T5_BUNDLE = Path(__file__).resolve().parents[1] / "golden" / "tiny_bundle"
BEGIN, END = CONFIG.begin_token_id, CONFIG.end_token_id
PICTURES = [
    np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    for seed, shape in enumerate([(90, 120, 3), (140, 70, 3)])
]
BOXES = [(10.0, 20.0, 50.0, 60.0), (0.0, 0.0, 30.0, 80.0)]


@pytest.fixture(scope="module")
def model() -> PixelLLM:
    """Attention that looks somewhere, and captions of different words and lengths."""
    model = random_model(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.text.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.4, generator=generator)
        model.text.vocabulary_head.bias[END] += 4.0
    return model


@pytest.fixture(scope="module")
def bundle(model: PixelLLM, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bert") / "bundle"
    return export_bundle(model, folder, tokenizer_json=random_tokenizer_for(CONFIG))


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Iterator[deixis.Model]:
    with deixis.load(bundle.path, device="cpu", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def predictor(model: PixelLLM) -> TorchPredictor:
    return TorchPredictor(Checkpoint(model, random_tokenizer_for(CONFIG)))


def test_graphs_and_their_names_are_those_of_t5(bundle: Bundle) -> None:
    """The runtime, and whatever else runs these graphs, cannot tell: same roles, names and operators."""
    theirs = open_bundle(T5_BUNDLE)

    def operators(one: Bundle) -> set[str]:
        graphs = (onnx.load(one.file(graph.file), load_external_data=False) for graph in one.manifest.graphs.values())
        return {f"{node.domain}{node.op_type}" for graph in graphs for node in graph.graph.node}

    for role, graph in bundle.manifest.graphs.items():
        known = theirs.manifest.graphs[role]
        assert (set(graph.inputs), set(graph.outputs)) == (set(known.inputs), set(known.outputs))
    assert operators(bundle) <= operators(theirs)


def test_the_manifest_tells_what_differs(bundle: Bundle) -> None:
    manifest = bundle.manifest
    tokenizer = manifest.tokenizer
    assert (tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.unknown_id) == (101, 102, 0, 100)
    assert (tokenizer.vocab_size, manifest.caches.self_cache.layers, manifest.caches.self_cache.head_dim) == (
        200,
        2,
        16,
    )
    assert manifest.dims["T"].max == 24  # the position table ends there


def test_weights_are_stored_once(model: PixelLLM, bundle: Bundle) -> None:
    """The prefix runs through the layers of the text: their weights are in the decoder's file."""
    for role in ("text_encoder", "decoder_step", "decoder_pass"):
        assert bundle.manifest.graphs[role].external == ("graphs/decoder.data",)
    parts = [model.text] + ([model.point_predictor] if model.point_predictor else [])
    weights = sum(p.numel() * 4 for part in parts for p in part.parameters())
    assert bundle.manifest.files["graphs/decoder.data"].bytes < 1.1 * weights


def test_sizes_are_dynamic(model: PixelLLM, bundle: Bundle) -> None:
    sizes = dataclasses.replace(Sizes(B=2, N=2, K=3, P=5, C=7, S=4, T=15, L=11, O=3), position=6)
    cases, specs = make_cases(model, sizes, seed=5), graph_specs(model)
    for role in ("text_encoder", "decoder_step", "decoder_pass"):
        expected = {name: value.numpy() for name, value in run_torch(specs[role], model, cases[role]).items()}
        with GraphSession(bundle.file(bundle.manifest.graphs[role].file), threads=1) as session:
            actual = session.run({name: value.numpy() for name, value in cases[role].items()})
        assert relative_error(actual, expected) < 1e-4, role


@pytest.mark.parametrize(("beams", "per_node"), [(1, 1), (3, 1), (4, 2)])
@torch.no_grad()
def test_search_over_cached_steps_finds_what_full_passes_find(
    model: PixelLLM, bundle: Bundle, beams: int, per_node: int
) -> None:
    """Exact ids; contexts of two lengths, and as many prompts as rows of the prefix's cache."""
    image, valid = example_picture(CONFIG.image_size, 2, 4)
    boxes = torch.tensor([[12.0, 10, 80, 60], [0, 25, 60, 90], [30, 30, 100, 70]])
    index = torch.tensor([0, 1, 1])
    scene = model.encode_image(image, valid)
    visual = model.extract_prompt(model.features(scene), index, *pixelllm_prompt(boxes, 1.0))
    context = torch.tensor([[5, 9, 13, END], [7, END, 0, 0], [40, 41, 42, END]])
    encoded, mask = model.text.encode(visual, context)

    def logits_fn(tokens: Tensor, position: int) -> Tensor:
        logits, _ = model.text.decode(tokens, encoded, mask)
        assert logits is not None
        return logits[:, position]

    begin = reference.begin_tokens(3, CONFIG.max_caption_length, BEGIN, END)
    rules = DecodeRules(CONFIG.max_caption_length, BEGIN, END, beams, per_node)
    with GraphChain(bundle.path) as chain:
        found = chain.generate(chain.encode_text(visual.numpy(), context.numpy()), rules)
    if isinstance(found, Beams):
        tokens, scores = reference.beam_search(logits_fn, begin, beams, per_node, end_id=END)
        np.testing.assert_array_equal(found.tokens, tokens)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4)
    else:
        tokens, _ = reference.greedy(logits_fn, begin, END)
        np.testing.assert_array_equal(greedy_tokens(found, rules), tokens)
        rows = tokens.tolist()
        assert len({tuple(row) for row in rows}) == 3 and len({row.index(END) for row in rows}) > 1  # worth comparing


@pytest.mark.parametrize("picture", PICTURES, ids=["wide", "tall"])
def test_requests_give_what_torch_gives(runtime: deixis.Model, predictor: TorchPredictor, picture: np.ndarray) -> None:
    scene = runtime.encode(picture)
    caption = scene.caption()  # beam search
    assert caption.text == predictor.caption(picture) != ""
    assert [scene.caption(box=box).text for box in BOXES] == predictor.region_captions(picture, BOXES)  # greedy

    phrase, text = "red cat's cup", "A Cat, on the table."
    boxes, masks = predictor.refer(picture, [phrase])
    found = scene.refer(phrase)
    np.testing.assert_allclose(found.box, boxes[0], atol=1e-2)
    assert found.mask is not None and masks is not None
    assert (found.mask.array != masks[0]).mean() < 1e-3
    words = predictor.trace(picture, text)
    places = scene.trace(text).words
    assert [word.text for word in places] == [word.text for word in words] == text.split()
    np.testing.assert_allclose([np.ravel(word.points) for word in places], [word.box for word in words], atol=1e-2)


def test_a_batch_gives_what_its_rows_give(runtime: deixis.Model) -> None:
    scenes = runtime.encode(PICTURES)
    items = [(scene, deixis.Prompt(box=box)) for scene in scenes for box in (None, *BOXES)]
    together = runtime.caption_batch(items)
    alone = [scene.caption(box=prompt.box) for scene, prompt in items]
    assert [caption.ids for caption in together] == [caption.ids for caption in alone]
    phrases = [(scene, text) for scene in scenes for text in ("red cat", "the small blue box")]
    np.testing.assert_allclose(
        [found.box for found in runtime.refer_batch(phrases)],
        [scene.refer(text).box for scene, text in phrases],
        atol=1e-2,
    )


def test_a_stream_gives_the_words_of_the_caption(runtime: deixis.Model) -> None:
    scene, options = runtime.encode(PICTURES[0]), deixis.DecodeOptions(beams=1)
    stream = scene.stream_caption(options=options)
    words = [word.text for word in stream]
    assert stream.caption.ids == scene.caption(options=options).ids
    assert words == [word.text for word in stream.caption.words] == stream.caption.text.split()


def test_unknown_and_special_pieces_are_refused(runtime: deixis.Model) -> None:
    scene = runtime.encode(PICTURES[0])
    with pytest.raises(PromptError, match="does not know 'ж'"):
        scene.refer("red ж")
    with pytest.raises(PromptError, match="control token"):
        scene.refer("red [SEP]")


def test_tasks_longer_than_the_position_table_are_refused(model: PixelLLM, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="30 tokens, the text head only 24 positions"):
        export_bundle(
            model, tmp_path / "b", tokenizer_json=random_tokenizer_for(CONFIG), tasks={"caption": {"max_length": 30}}
        )
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_comes_back(model: PixelLLM, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", model, random_tokenizer_for(CONFIG), dtype="fp32")
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.config == CONFIG
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=0)
