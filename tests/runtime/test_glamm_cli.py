"""The commands of models that converse, on a fake that says what it is told; then the graphs of a tiny bundle."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import cv2
import glamm_fakes as fakes
import numpy as np
import pytest

import deixis
from deixis.cli import arguments, demo, main, talk, tasks
from deixis.overlay import draw_grounded, save_image
from deixis.results import GroundedPhrase, GroundedText, Mask

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny_glamm"
GOOD = "<p> a red mug </p> [SEG] on <p> the table </p> [SEG]."
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    save_image(tmp_path / "p.png", fakes.pictures(1)[0])
    return str(tmp_path / "p.png")


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str | list[int]]:
    """What the model of the commands says; to be filled before they run."""
    answers: dict[str, str | list[int]] = {
        "Describe the table": GOOD,
        "Segment": "Sure, it is [SEG]",
        "What": "a mug.",
    }
    for module in (tasks, talk):
        monkeypatch.setattr(module, "load", lambda options: fakes.make_model(tmp_path, answers)[0])
    return answers


def run(capsys: Captured, *arguments: object, code: int = 0) -> str:
    found = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert found == code, err
    if code:
        assert err.startswith("deixis: error: ") and err.count("\n") == 1 and out == ""
        return err
    return out


@pytest.mark.usefixtures("says")
def test_grounded_caption(capsys: Captured, picture: str, tmp_path: Path) -> None:
    drawn, written = tmp_path / "o.png", tmp_path / "r.json"
    plain = run(capsys, "grounded-caption", picture, "--overlay", drawn, "--json", written)
    lines = plain.splitlines()
    assert lines[0] == "a red mug on the table." and len(lines) == 3
    assert re.fullmatch(r"  a red mug: box (\d+, ){3}\d+  mask \d+ px  score \d\.\d\d", lines[1])
    assert run(capsys, "grounded-caption", picture, "--stream") == plain
    [result] = json.loads(written.read_text())["results"]
    assert [p["text"] for p in result["phrases"]] == ["a red mug", "the table"]
    assert Mask.from_rle(result["phrases"][0]["mask"]).size == (40, 60)
    assert cv2.imread(str(drawn)).shape[1] >= 480


def test_ask(capsys: Captured, picture: str, says: dict[str, str | list[int]]) -> None:
    says["is it"] = "<p> a mug </p> here [SEG] [SEG]"
    out = run(capsys, "ask", picture, "is it <bbox>", "--box", "1,2,30,31").splitlines()
    assert out[0] == "a mug here" and out[1].startswith("  a mug: box") and out[2].startswith("  mask 1: box")
    assert out[3].startswith("  problem: [SEG] number 2")
    assert run(capsys, "ask", picture, "is it", "--box", "1,2,30,31", "--stream").splitlines() == out
    short = run(capsys, "ask", picture, "is it", "--max-new-tokens", 2, "--json", "-")
    assert json.loads(short)["results"][0]["finished"] is False


@pytest.mark.usefixtures("says")
def test_chat_reads_lines(capsys: Captured, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = "What is here\n\n  Segment [1, 2, 30,31.5] it\nWhat\n"
    drawn, written = tmp_path / "o.png", tmp_path / "r.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    out = run(capsys, "chat", picture, "--overlay", drawn, "--json", written).splitlines()
    assert out[:2] == ["a mug.", "Sure, it is"] and out[2].startswith("  mask 1: box") and out[3:] == ["a mug."]
    turns = json.loads(written.read_text())["results"]
    assert [t["question"] for t in turns] == ["What is here", "Segment <bbox> it", "What"]
    assert turns[1]["boxes"] == [[1, 2, 30, 31.5]] and drawn.is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    assert json.loads(run(capsys, "chat", picture, "--json", "-"))["results"] == turns
    monkeypatch.setattr(sys, "stdin", io.StringIO("What [SEG]\n"))
    assert "control token" in run(capsys, "chat", picture, code=2)


@pytest.mark.usefixtures("says")
def test_chat_on_a_terminal_goes_on_after_a_mistake(
    capsys: Captured, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed = iter(["What", "Segment [900,900,999,999]", "", "Segment", "Exit", "never asked"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", picture]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a mug.\nSure, it is\n  mask 1: box") and out.count("\n") == 3
    assert "lies outside the picture" in err and err.count("\n") == 2 and next(typed) == "never asked"


def test_ground_phrases(capsys: Captured, picture: str, says: dict[str, str | list[int]]) -> None:
    says["Describe the ducks"] = "a mug on <p> the table </p> [SEG]"
    text = "a mug on the table"
    chosen = run(capsys, "ground-phrases", picture, text).splitlines()
    assert chosen[0] == text and len(chosen) == 2 and chosen[1].startswith("  the table: box")
    given = run(capsys, "ground-phrases", picture, text, "--phrase", "the table", "--phrase", "a mug").splitlines()
    assert [line.split(":")[0] for line in given[1:]] == ["  a mug", "  the table"]
    assert "does not stand" in run(capsys, "ground-phrases", picture, text, "--phrase", "cat", code=2)


def test_refer_and_caption(capsys: Captured, picture: str, tmp_path: Path, says: dict[str, str | list[int]]) -> None:
    says |= {"Segment the ducks": "here", "Describe it": "a mug.", "Describe here": "ducks"}
    says.pop("Segment")
    says["Segment a mug"] = "it is [SEG]"
    drawn = tmp_path / "o.png"
    first, second = run(capsys, "refer", picture, "a mug", "the ducks", "--overlay", drawn).splitlines()
    assert first.startswith("a mug: box") and second == "the ducks: nothing found" and drawn.is_file()
    assert run(capsys, "caption", picture) == run(capsys, "caption", picture, "--stream") == "a mug.\n"
    regions = ("--box", "1,2,30,31", "--box", "2,3,20,30", "--overlay", drawn)
    assert run(capsys, "caption", picture, *regions) == "ducks\nducks\n"


@pytest.mark.usefixtures("says")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ask", "P", " "), "the question is empty"),
        (("ask", "P", "What <bbox>"), "has no boxes"),
        (("ask", "P", "What", "--box", "900,900,999,999"), "lies outside"),
        (("ask", "P", "two " * 70), "shorten it"),
        (("ask", "P", "What", "--stream", "--json", "-"), "choose one"),
        (("caption", "P", "--point", "3,4"), "not points"),
        (("grounded-caption", "P", "--overlay", "o.xyz"), "unknown picture type"),
    ],
)
def test_mistakes_are_one_line(capsys: Captured, picture: str, arguments: tuple[str, ...], message: str) -> None:
    found = [picture if a == "P" else a for a in arguments]
    assert message in run(capsys, *found, code=1 if "xyz" in found[-1] else 2)


@pytest.mark.usefixtures("says")
def test_tasks_of_the_other_family(capsys: Captured, picture: str) -> None:
    assert "cannot trace" in run(capsys, "trace", picture, "a mug", code=1)
    assert "cannot segment" in run(capsys, "segment", picture, "--box", "1,2,30,31", code=1)


def test_an_overlay_shows_phrases_in_their_colours() -> None:
    image = np.full((200, 300, 3), 90, np.uint8)
    left, right = np.zeros((200, 300), bool), np.zeros((200, 300), bool)
    left[20:80, 20:120], right[100:180, 180:280] = True, True
    masks = [Mask.from_array(m) for m in (left, right)]
    whole = GroundedText(
        "a mug on a table here",
        (
            GroundedPhrase("a mug", 0, 5, masks[0], masks[0].box, 0.5),
            GroundedPhrase("a table", 9, 16),
            GroundedPhrase("here", 17, 21, Mask.from_array(np.zeros((200, 300), bool))),
        ),
        (masks[1],),
        ("a phrase has no [SEG]: 'a table'",),
    )
    drawn = draw_grounded(image, whole)
    bare = draw_grounded(image, GroundedText(whole.text))
    scale = drawn.shape[1] / 300
    for mask in (left, right):  # tinted with different colours, the rest only dimmed
        y, x = (int(v.mean() * scale) for v in np.nonzero(mask))
        assert np.ptp(drawn[y, x].astype(int)) > 20
    assert np.ptp(drawn[int(150 * scale), int(60 * scale)].astype(int)) < 5
    assert drawn.shape[0] > bare.shape[0]  # problems have their lines


def test_a_real_bundle(capsys: Captured, picture: str) -> None:
    on = ("--bundle", TINY, "--device", "cpu", "--threads", 1, "--max-new-tokens", 8)
    [result] = json.loads(run(capsys, "ask", picture, "<bbox>?", "--box", "1,2,30,31", *on, "--json", "-"))["results"]
    assert len(result["ids"]) <= 8
    assert "takes boxes" in run(capsys, "inspect", TINY)
    assert "outputs agree" in run(capsys, "verify", TINY, "--device", "cpu", "--threads", 1)


def test_a_real_bundle_chats_as_it_answers(picture: str) -> None:
    """Turn by turn through the graphs' cache against one pass over all that was said."""
    with deixis.load(TINY, device="cpu", threads=1) as model:
        scenes = model.encode([picture, fakes.pictures(2)[1]])
        with scenes[0].chat() as chat:
            first, second = chat.ask("what is it?"), chat.ask("and there <bbox>?", [(3, 4, 20, 30)])
            assert first == scenes[0].ask("what is it?") and chat.stream("more?").result.ids
        assert second.ids
        answers = model.grounded_caption_batch(scenes)
        for scene, answer in zip(scenes, answers, strict=True):
            alone = scene.grounded_caption()
            assert answer.ids == alone.ids and [p.text for p in answer.phrases] == [p.text for p in alone.phrases]
            assert scene.stream_grounded_caption().result == alone
        text = "a red mug on the table"
        for phrase in scenes[0].ground_phrases(text, ["red mug", "the table"]).phrases:
            assert phrase.mask is not None and phrase.mask.size == (40, 60)


@pytest.mark.parametrize("command", ["grounded-caption", "ask", "chat", "ground-phrases"])
def test_without_a_bundle_it_is_said_what_to_do(
    capsys: Captured, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("deixis.cli.tasks.TALKING_BUNDLE", "absent-glamm")  # whatever lies in the checkout
    monkeypatch.setattr("deixis.cli.arguments.TALKING_BUNDLE", "absent-glamm")
    monkeypatch.chdir(tmp_path)
    text = ["what is it?"] if command in ("ask", "ground-phrases") else []
    assert "--bundle (docs/training.md" in run(capsys, command, picture, *text, code=1)
    assert "no bundle named 'other'" in run(capsys, command, picture, *text, "--bundle", "other", code=1)


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are in the checkout, not in the wheel")
def test_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section of docs/tasks.md on this family, on the tiny bundle under the demo's name."""
    section = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8").split("## Conversations with masks")[1]
    section = section.split("\n## ")[0]
    shutil.copytree(TINY, tmp_path / "tabletop-glamm")
    shutil.copytree(ROOT / "models" / "pictures", tmp_path / "models" / "pictures")
    monkeypatch.setenv("DEIXIS_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"^```py\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    exec(compile(code, "docs/tasks.md", "exec"), {"deixis": deixis})
    [lines] = re.findall(r"^```shell\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for line in lines.splitlines():
        arguments.parser().parse_args(shlex.split(line)[1:])
    assert (tmp_path / "grounded.png").is_file()


@pytest.mark.usefixtures("says")
def test_the_demo_asks_what_the_model_can(
    capsys: Captured, picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "load", tasks.load)
    asked = {"file": "p.png", "trace": "a mug", "refer": ["it"], "boxes": [[1, 2, 30, 31]], "points": [[3, 4]]}
    (tmp_path / "prompts.json").write_text(json.dumps([asked]))
    run(capsys, "demo", "--bundle", TINY, "--pictures", tmp_path, "--out", tmp_path / "out")
    made = [record["task"] for record in json.loads((tmp_path / "out" / "results.json").read_text())["pictures"]]
    assert made == ["caption", "grounded caption", "phrases of a text", "refer", "caption of a region"]
