"""The documents' performance tables: what reports say, where goals stand, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench_reports import bench_report, rival
from deixis_bench import tables
from deixis_bench.goals import COMMANDS, GOALS, Goal, Reached, best_of, figure

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "A | Processor", "cores": 2}


class Checkout:
    """A checkout with one document and some reports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = root / "benchmarks" / "results"
        self.results.mkdir(parents=True)
        self.readme = root / "README.md"

    def write(self, *marks: str) -> None:
        text = "".join(f"<!-- bench:{mark} -->\nas it was\n<!-- /bench -->\n\n" for mark in marks)
        self.readme.write_text(f"# Before\n\n{text}after\n", encoding="utf-8")

    def report(self, name: str, report: dict[str, Any]) -> None:
        (self.results / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")

    def run(self, *arguments: str) -> int:
        return tables.main(["--root", str(self.root), *arguments])

    def rows(self) -> list[list[str]]:
        """Cells of the document's table rows, rules left out."""
        lines = self.readme.read_text(encoding="utf-8").splitlines()
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|") and "---" not in line]
        return [[cell.strip() for cell in row] for row in cells]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_documents_say_what_the_reports_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check", "--root", str(ROOT)]) == 0, capsys.readouterr().err
    assert "bench:goals" in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_make_bench_runs_the_commands_that_the_goals_name() -> None:
    makefile = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for name, command in COMMANDS.items():
        if name.endswith(".json"):
            continue  # a file of the checkout
        [line] = [line for line in makefile.splitlines() if f"{name}.json" in line]
        assert command.removeprefix("python -m ").removeprefix("deixis ") in line


def test_tables_of_a_report(checkout: Checkout) -> None:
    checkout.report("one", bench_report())
    checkout.write("stages one", "requests one", "rivals one", "roofline one", "memory one")
    assert checkout.run() == 0
    rows = checkout.rows()
    step = ["`decoder_step`", "`caption`", "16", "6.00", "2.00", "2.40", "3.40", "4.77\xa0MB", "86\xa0%", "70\xa0%"]
    assert step in rows
    assert ["`decoder_step`", "2.00", "memory", "1.72", "86\xa0%", "4.48"] in rows  # 16 x (2.00 - 1.72) ms above
    assert ["`sam_encoder`", "90.0", "arithmetic", "63.0", "70\xa0%", "27.0"] in rows
    assert ["`refer`", "900", "150", "180", "255", "285", "105", "2.10", "480", "5.25", "61.5"] in rows
    assert ["ctranslate2 1.2.3", "decoder_step fp32", "10.2", "1.45×", "1.30 to 1.67", "the same", ""] in rows
    assert ["torch compiled", "image encoder", "not measured", "", "", "", "not installed"] in rows
    assert ["at most", "260"] in rows
    text = checkout.readme.read_text(encoding="utf-8")
    assert text.startswith("# Before\n\n<!-- bench:stages one -->\n|") and text.endswith("<!-- /bench -->\n\nafter\n")
    assert (
        "as it was" not in text
        and text.count("Measured on A Processor with 2 cores, 2 cores, threads: 2, rounds: 5.") == 5
    )


def test_check_writes_nothing_and_fails_until_it_is_put_right(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.report("one", bench_report())
    checkout.write("stages one")
    before = checkout.readme.read_bytes()
    assert checkout.run("--check") == 1
    assert "README.md: not what benchmarks/results says" in capsys.readouterr().err
    assert checkout.readme.read_bytes() == before
    assert checkout.run() == 0 and checkout.run("--check") == 0
    report = bench_report()
    report["stages"][2]["warm_ms"]["p50"] = 91.0
    checkout.report("one", report)
    assert checkout.run("--check") == 1


def test_goals_are_met_missed_or_not_measured(checkout: Checkout) -> None:
    rivals = [rival("ctranslate2", 1.29, part="text fp32"), rival("ctranslate2", 2.6, part="text int8")]
    checkout.report("rivals-text", {"rivals": rivals, "machine": MACHINE})
    metrics = {f"fp32/bandwidth_share/{name}": x for name, x in (("median", 0.914), ("least", 0.88), ("most", 0.93))}
    checkout.report("decoder-step", {"metrics": metrics, "machine": MACHINE})
    checkout.report("bench-tabletop", bench_report())
    checkout.write("goals")
    assert checkout.run() == 0
    rows = {row[0].split("<br>")[-1]: row[1:] for row in checkout.rows()}
    assert len(rows) == len(GOALS) + 1
    wanted, reached, ends, met, report = rows["fp32 against CTranslate2 fp32"]
    assert (wanted, reached, ends, met, report) == ("≥ 1.3×", "1.29×", "1.16 to 1.48", "**no**", "`rivals-text`")
    assert rows["8-bit against CTranslate2 int8"][1:4] == ["2.60×", "2.34 to 2.99", "yes"]
    assert rows["fp32, share of the measured bandwidth"][:4] == ["≥ 90\xa0%", "91.4\xa0%", "88.0 to 93.0", "yes"]
    assert rows["Python around a greedy step (the demo's)"][:4] == ["≤ 100\xa0µs", "61.5\xa0µs", "–", "yes"]
    assert rows["demo bundle, process start to first result"][1:4] == ["1.25\xa0s", "–", "yes"]
    bound = rows["resident memory over 1.6 × loaded weights + 200 MB"]
    assert bound[1:4] == ["0.898×", "–", "yes"]  # 240 / (1.6 x 42 + 200); after the first it is 210 / 248
    assert rows["8-bit, share of the measured bandwidth"][1:4] == ["not measured", "", ""]
    text = checkout.readme.read_text(encoding="utf-8")
    assert "- `rivals-text`: `python -m deixis_bench.rivals --part text`; A | Processor, 2 cores" in text
    assert "- `serving`: not written yet; `python -m deixis_bench.serving models/tabletop` does\n" in text


def test_evidence_of_a_search_for_precisions(checkout: Checkout) -> None:
    drifts = {"precision": "int8", "drift": 0.31, "time": None, "points": {}, "verdict": "drifts by more than 0.2"}
    chosen = {"precision": "w8", "drift": 0.012, "time": 0.41, "points": {"cIoU": -0.2}, "verdict": "chosen"}
    evidence = {
        "judged_by": "100 pictures of test", "machine": "A Processor", "trials": {"decoder_step": [drifts, chosen]},
        "fp32": {"cIoU": 0.74, "caption CIDEr": 5.0}, "chosen": {"cIoU": 0.737, "caption CIDEr": 4.98},
    }  # fmt: skip
    manifest = checkout.root / "models" / "tabletop" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"precision_search": evidence}), encoding="utf-8")
    checkout.write("precision models/tabletop/manifest.json", "goals")
    assert checkout.run() == 0
    rows = checkout.rows()
    assert ["`decoder_step`", "int8", "3.1e-01", "–", "drifts by more than 0.2"] in rows
    assert ["`decoder_step`", "w8", "1.2e-02", "0.41", "chosen"] in rows
    assert ["caption CIDEr", "5.0000", "4.9800"] in rows
    # cIoU lost 0.3 of 0.5 points, CIDEr 2 hundredths of 500, which is 0.4 per cent
    assert [row[1:5] for row in rows if "auto" in row[0]] == [["≤ 0.5\xa0points", "0.400\xa0points", "–", "yes"]]
    manifest.write_text("{}", encoding="utf-8")
    assert checkout.run() == 0
    assert "were not chosen by a search" in checkout.readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(("value", "at_most", "met"), [(3.0, False, True), (2.9, False, False), (3.1, True, False)])
def test_a_goal_is_met_from_its_limit_on(value: float, at_most: bool, met: bool) -> None:
    goal = Goal("about", "name", 3.0, "x", "report", figure("name"), at_most)
    assert goal.met(Reached(value)) is met and goal.met(Reached(3.0))


def test_the_best_of_rivals_needs_all_of_them() -> None:
    report = {"rivals": [rival("a", 2.0, part="encoder int8"), rival("b", 1.5, part="encoder int8")]}
    found = best_of(("a", "b"), "encoder int8")(report)
    assert found is not None and found.value == 1.5
    assert best_of(("a", "c"), "encoder int8")(report) is None


def test_a_report_that_is_not_there_yet_is_said(checkout: Checkout) -> None:
    checkout.write("stages later")
    assert checkout.run() == 0
    assert "Not measured yet: `make bench` writes the report `later`." in checkout.readme.read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n<!-- bench:nothing -->\n<!-- /bench -->\n", r"README.md:2: no table 'nothing'; choose of answer_length, "),
        ("a\n<!-- bench:goals -->\nb\n", r"README.md:2: table 'goals' is not closed"),
        ("a\n<!-- /bench -->\n", r"README.md:2: <!-- /bench --> without a table"),
        ("<!-- bench:goals -->\n<!-- bench:goals -->\n", r"README.md:2: a table within the one of line 1"),
        ("<!-- bench:stages -->\n<!-- /bench -->\n", r"README.md:1: table 'stages' cannot be made .* name one report"),
        (
            "<!-- bench:stages bad -->\n<!-- /bench -->\n",
            r"README.md:1: table 'stages' cannot be made of bad: .*'stages'",
        ),
        ("<!-- bench:stages torn -->\n<!-- /bench -->\n", r"torn.json: not a report"),
        ("<!-- bench:answer_length no -->\n<!-- /bench -->\n", r"there is no benchmarks/results/no.json"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_changes_nothing(
    text: str, message: str, checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.report("bad", {"metrics": {}})
    (checkout.results / "torn.json").write_text("{", encoding="utf-8")
    checkout.readme.write_text(text, encoding="utf-8")
    assert checkout.run() == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert checkout.readme.read_text(encoding="utf-8") == text
