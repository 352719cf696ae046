"""What a request costs in graphs: none in vain, and nothing of the encoders for a second prompt on a scene."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import make_picture

import deixis
from deixis import DecodeOptions
from deixis.timing import LOAD

GLAMM = Path(__file__).parents[1] / "golden" / "tiny_glamm"
SHORT = DecodeOptions(max_new_tokens=3)
# Graphs that each request runs, and how often, on a scene that was only encoded. All others stay on the disk.
CAPTION = {"prompt_extractor": 1, "text_encoder": 1}
PASS = {"prompt_extractor": 1, "text_encoder": 1, "decoder_pass": 1}


def runs_of(model: deixis.Model, call: object) -> dict[str, int]:
    with model.timed() as spans:
        call()  # type: ignore[operator]
    names = [span.name for span in spans if span.name in model.manifest.graphs]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        (lambda scene: scene.caption(options=SHORT), CAPTION),
        (lambda scene: scene.caption(box=(3, 4, 30, 40), options=SHORT), CAPTION),
        (lambda scene: scene.trace("a b c"), PASS),
        (lambda scene: scene.refer("a b", mask=False), PASS),
        (lambda scene: scene.refer("a b"), {**PASS, "mask_adapter": 1, "mask_decoder": 1}),
        (lambda scene: scene.segment(box=(3, 4, 30, 40)), {"mask_decoder": 1}),
    ],
)
def test_a_prompt_runs_and_loads_its_own_graphs_only(
    tiny_bundle: Path, picture: np.ndarray, request_of: object, expected: dict[str, int]
) -> None:
    """Given texts are read in one wide pass, whose graph has no vocabulary head; captions take a step a token."""
    with deixis.load(tiny_bundle, "cpu", threads=1) as model:
        scene = model.encode(picture)
        encoders = set(model.info.loaded_graphs)
        assert encoders == {"semantic_encoder", "sam_encoder"}
        runs = runs_of(model, lambda: request_of(scene))  # type: ignore[operator]
        steps = runs.pop("decoder_step", 0)
        assert runs == expected
        assert (1 <= steps <= 4) == (expected == CAPTION)
        wanted = {*encoders, *expected, *(["decoder_step"] if steps else [])}
        assert set(model.info.loaded_graphs) == wanted
        assert "logits" not in model.manifest.graphs["decoder_pass"].outputs


def test_a_second_prompt_spends_nothing_in_the_encoders(tiny_bundle: Path, picture: np.ndarray) -> None:
    with deixis.load(tiny_bundle, "cpu", threads=1) as model:
        first = runs_of(model, lambda: model.encode(picture).caption(options=SHORT))
        assert first["semantic_encoder"] == first["sam_encoder"] == 1
        for again in (
            lambda: model.encode(picture).caption(options=SHORT),  # the store knows the picture
            lambda: model.encode(picture).caption(box=(1, 2, 30, 40), options=SHORT),
            lambda: model.encode(picture).refer("a b"),
        ):
            runs = runs_of(model, again)
            assert "semantic_encoder" not in runs and "sam_encoder" not in runs
            assert runs["text_encoder"] == 1
        # The prefix of the whole picture is kept with the scene, too.
        assert "prompt_extractor" not in runs_of(model, lambda: model.encode(picture).caption(options=SHORT))


def test_glamm_encodes_for_masks_when_one_is_wanted() -> None:
    with deixis.load(GLAMM, "cpu", threads=1) as model:
        scene = model.encode(make_picture(60, 80, 0))
        assert model.info.loaded_graphs == ("global_encoder",)
        runs = runs_of(model, lambda: scene.ask("a b", options=SHORT))
        assert set(runs) == {"decoder_step"}
        runs = runs_of(model, lambda: scene.ground_phrases("a b c", ["a", "b"]))
        assert runs["grounding_encoder"] == 1 and "global_encoder" not in runs
        runs = runs_of(model, lambda: scene.ground_phrases("c d", ["c"]))
        assert "grounding_encoder" not in runs and "global_encoder" not in runs
        assert "region_encoder" not in model.info.loaded_graphs


def test_timed_loads_are_those_of_graphs_that_run(tiny_bundle: Path, picture: np.ndarray) -> None:
    with deixis.load(tiny_bundle, "cpu", threads=1) as model, model.timed() as spans:
        model.encode(picture).caption(options=SHORT)
        loaded = {span.name.removeprefix(LOAD) for span in spans if span.name.startswith(LOAD)}
        ran = {span.name for span in spans} & set(model.manifest.graphs)
        assert loaded == ran == set(model.info.loaded_graphs)
