"""What README and docs show, works: python blocks are executed, `deixis` lines are run or at least parsed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

from deixis.cli import arguments, main, parts

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COSTLY = ("demo", "export")  # the demo runs in the test of the wheel, the export in its own tests
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(document.read_text(encoding="utf-8")) if language in languages]


def shell_lines(document: Path) -> list[list[str]]:
    """The words of every command line in the document's shell blocks, without comments."""
    text = "\n".join(blocks(document, "sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def named(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=named)
def test_python_runs_from_top_to_bottom(document: Path, reader: Path) -> None:
    code = "\n".join(blocks(document, "python"))
    result = subprocess.run([sys.executable, "-c", code], cwd=reader, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if shell_lines(d)], ids=named)
def test_command_lines_work(document: Path, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in shell_lines(document):
        if words[0] == "deixis":
            check_deixis(words[1:])
        elif words[:2] == ["python", "-m"] and words[2] not in ("pip", "venv"):
            assert importlib.util.find_spec(words[2]), words
        elif words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), words
        else:
            assert words[0] in ("pip", "python", "git", "cd", "export", "ls"), words
    capsys.readouterr()


def check_deixis(words: list[str]) -> None:
    if words[0] in parts.known():
        assert main([words[0], "--help"]) == 0, words
        return
    arguments.parser().parse_args(words)
    if words[0] not in COSTLY:
        assert main(words) == 0, words


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = FENCE.sub("", document.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
