"""The page of a benchmark report: whole, escaped, readable without colours, and nothing from outside."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench_reports import bench_report
from deixis_bench.page import page, write_page

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Collects elements and text, and fails where an element is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def text() -> str:
    return page(bench_report())


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


def test_the_page_needs_nothing_else(text: str, read: Reader) -> None:
    assert {tag for tag, _ in read.found}.isdisjoint({"script", "link", "iframe", "object", "img"})
    for tag, attributes in read.found:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in text and all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_ids_are_unique_and_references_lead_to_them(text: str, read: Reader) -> None:
    ids = [attributes["id"] for _, attributes in read.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert used and set(used) <= set(ids)


def test_plots_say_in_words_what_they_show_and_take_their_colours_from_the_style(text: str, read: Reader) -> None:
    plots = read.all("svg")
    assert len(plots) == 5 and all(plot["role"] == "img" for plot in plots)
    words = " ".join(plot["aria-label"] for plot in plots)
    # 90 ms and 16 x 2 ms of 175.4 ms; 77 MFLOP in 2 ms
    for said in ("sam_encoder 51\xa0%", "decoder_step 18\xa0%", "decoder_step 38.5\xa0GFLOP/s", "ctranslate2"):
        assert said in words
    colours = set(re.findall(r"#[0-9a-f]{6}\b", text.split("</style>", 1)[1]))
    assert colours == set(), "a colour that dark mode cannot change"


def test_tables_have_headers_and_the_figures(read: Reader) -> None:
    assert len(read.all("table")) == len(read.all("caption")) >= 7
    assert all(header["scope"] in ("row", "col") for header in read.all("th"))
    for figure in ("40.0", "86\xa0%", "1.45×", "1.30 to 1.67", "not compared", "reports no power", "A Processor with"):
        assert figure in read.text


def test_what_was_not_measured_is_said() -> None:
    report = bench_report() | {"rivals": [], "memory": None, "requests": []}
    report["stages"] = [stage | {"warm_ms": None, "cold_ms": None, "flop": None} for stage in report["stages"]]
    report["energy"] = {"joules_per_request": 2.5, "source": "NVML"}
    report["roofline"] = {"threads": 2, "read_gb_s": None, "gflop_s": {"fp32": None, "int8": None}}
    read = Reader(page(report))
    assert read.all("svg") == []
    assert read.text.count("this was not measured") == 2 and "No whole request was run." in read.text
    assert "None was run" in read.text
    assert "2.50\xa0J per request, from NVML." in read.text


HOSTILE = "</svg><script>$x_1$&\"'"


def spoilt(value: Any) -> Any:
    """The report with every text of it replaced, but for those that choose what is done."""
    if isinstance(value, dict):
        kept = ("format", "kind")
        return {key: each if key in kept else spoilt(each) for key, each in value.items()}
    if isinstance(value, list):
        return [spoilt(each) for each in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_everything_is_escaped(read: Reader) -> None:
    report = spoilt(copy.deepcopy(bench_report()))
    report["metrics"] |= {HOSTILE: 1.0}
    report["bundle"]["weight_bytes"] = {HOSTILE: 3}
    report["roofline"]["gflop_s"] = {HOSTILE: 100.0}
    hostile = Reader(page(report))
    assert hostile.all("script") == []
    assert hostile.text.count(HOSTILE) > 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a report of 'deixis bench'"),
        ({"version": 2}, "version 2; this deixis reads version 1"),
        ({"stages": ...}, "lacks stages"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    report = {key: value for key, value in (bench_report() | change).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        write_page(report, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_same_report_gives_the_same_page_in_one_file(text: str, tmp_path: Path) -> None:
    write_page(bench_report(), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
