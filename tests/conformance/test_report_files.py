"""The files of a report: whole, well-formed, and the same when they are read again."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyfuse import SpecError
from polyfuse.conformance import Result
from polyfuse.conformance.report import SCHEMA, printable, read
from tests.conformance.reports import NASTY, made, varied

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = varied()
    report.results[2] = replace(report.results[2], margins={"y": {"share": 4.0, "at": [2, 0]}})
    path = report.save(tmp_path)
    assert read(path) == report
    data = json.loads(path.read_text())
    assert data["schema"] == SCHEMA == 2
    assert data["ok"] is False
    assert data["counts"] == {"passed": 4, "failed": 2, "waived": 1, "skipped": 4}
    assert data["verdicts"][0] == {
        "op": "a", "backend": "mine", "status": "failed", "why": "2 cases failed", "claimed": 5, "asked": 5,
    }  # fmt: skip


def test_a_margin_that_is_no_number_is_null_and_numbers_of_numpy_are_numbers(tmp_path):
    report = made("p")
    margins = {"y": {"share": np.float32(0.5), "at": [np.int64(3)]}, "z": {"share": float("nan"), "at": []}}
    report.results = [Result("a", "mine", "c", "passed", margins=margins)]
    (result,) = json.loads(report.save(tmp_path).read_text(), parse_constant=pytest.fail)["results"]
    assert result["margins"] == {"y": {"share": 0.5, "at": [3]}, "z": {"share": None, "at": []}}
    assert read(tmp_path / "conformance.json").results[0].margins["z"]["share"] is None


def test_a_file_is_replaced_at_once_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    made("p").write(tmp_path)
    with (tmp_path / "conformance.json").open("rb") as reader:
        made("pp").save(tmp_path)
        before = (tmp_path / "conformance.json").read_bytes()
        assert len(json.load(reader)["results"]) == 1  # what a reader has begun, it ends

    def full(self, text, encoding):
        self.write_bytes(text.encode()[:20])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        made("ppp").save(tmp_path)
    assert (tmp_path / "conformance.json").read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"conformance.json", "junit.xml", "conformance.md", "conformance.html"}


def test_a_line_of_the_json_file_is_a_result(tmp_path):
    lines = varied().save(tmp_path).read_text().splitlines()
    assert sum('"case": ' in line for line in lines) == 11


def test_the_page_on_reports_has_every_field_in_the_files_order(tmp_path):
    text = (ROOT / "docs/reports.md").read_text(encoding="utf-8")
    derived, run, backend, result = (
        [name for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
        for part in re.split(r"^\| field \| type .*$", text.split("## JUnit")[0], flags=re.MULTILINE)[1:]
    )
    data = json.loads(varied().save(tmp_path).read_text())
    assert derived + run == list(data)
    assert backend == list(data["backends"]["mine"])
    assert result == list(data["results"][0])


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "schema: expected 2, got 3; try the polyfuse that wrote the file"),
        ({"state": "done"}, "state: .*got Input should be 'running', 'complete' or 'interrupted'"),
        ({"colour": "red"}, "colour: .*got Unexpected keyword argument"),
        ({"results": [{"op": "a"}]}, "results.0.backend: .*got Field required"),
    ],
)
def test_a_file_that_is_no_report_is_refused_with_the_place(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message):
        read(edited(made().save(tmp_path), **changes))


@pytest.mark.parametrize("text", ["", "[1]", "\xff", '{"schema": '])
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SpecError, match="expected a report's JSON file, got "):
        read(path)


def test_an_unknown_kind_of_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"expected a name that ends in .json, .xml, .md, .html, got '.txt'"):
        made().write_file(tmp_path / "report.txt")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("conformance_*.json")), ids=lambda path: path.stem)
def test_committed_reports_are_read(path):
    report, data = read(path), json.loads(path.read_text())
    assert dict(report.counts()) == data["counts"]
    assert report.ok
    assert report.commit == data["commit"]
    assert all(r.reason for r in report.results if r.status == "skipped")


def test_junit_is_well_formed_whatever_a_backend_says_and_tells_errors_from_failures(tmp_path):
    suite = ET.parse(varied().write(tmp_path)[1]).getroot()
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "11", "failures": "1", "errors": "1", "skipped": "5",
    }  # fmt: skip
    (failure,) = suite.findall("testcase/failure")
    assert failure.get("message") == "y: [2, 0]: expected 1.0 to 1.5, got 2.0"
    assert failure.get("type") == "values,inputs"
    assert failure.text.splitlines()[1] == f"scale: {printable(NASTY)}"
    (error,) = suite.findall("testcase/error")
    assert (error.get("type"), error.get("message")) == ("timed_out", f"no answer {printable(NASTY)}".strip())
    properties = {p.get("name"): p.get("value") for p in suite.findall("properties/property")}
    assert properties["chip.driver"] == "570.1"
    assert properties["spec.a"] == "2"
    assert properties["verdict.b.mine"].startswith("conformant: ")
    assert properties["ok"] == "false"


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_junit_of_a_run_that_was_cut_short_has_an_error(state):
    from polyfuse.conformance.report._junit import junit

    suite = ET.fromstring(junit(made("pp", state=state, planned=5)).partition("\n")[2])
    assert (suite.get("tests"), suite.get("errors")) == ("3", "1")
    (error,) = suite.findall("testcase/error")
    assert error.get("message") == f"{state}: 2 of 5 planned results"


def test_printable_escapes_what_cannot_be_shown_and_leaves_the_rest():
    assert printable("\x00\x1b\x7f\x85\ud800\ufffe\u202e\r") == r"\x00\x1b\x7f\x85\ud800\ufffe\u202e\x0d"
    assert printable("tab\t line\n é 漢 \U0001f9ea") == "tab\t line\n é 漢 \U0001f9ea"


def test_markdown_gives_the_verdicts_the_failures_and_what_was_not_proven(tmp_path):
    text = varied().write(tmp_path)[2].read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table == [
        "| op | mine | other |",
        "| a | **failed**; 100% claimed; 2 passed, 2 failed, 1 waived | **not run**: does not implement a |",
        "| b | **conformant**; 50% claimed; 1 passed | **conformant**; 100% claimed; 1 passed |",
    ]
    assert "- a on mine, wrong: y: \\[2, 0\\]: expected 1.0 to 1.5, got 2.0" in text
    assert "- a on mine, hangs: timed out no answer" in text
    assert "- 1 case too large for the level\n  - mine, 1 case: more elements than the level runs" in text
    assert "- a on mine: that a call with ends does not wait for the device, or can be captured in a graph." in text
    assert (
        "- mine: what changes with a second call or another layout, beyond the core cases and a sample of the" in text
    )
    assert "claims that a kernel is compiled for each new kind of call." in text
    assert "claims that it is emulated." not in text  # there, but not on this device
    assert "- How fast anything is." in text
    assert "- values: Every element lies in the oracle's interval." in text
    assert not re.search(r"(?<!\\)<", text)


def test_markdown_of_a_run_that_was_cut_short_says_so(tmp_path):
    text = made("p", state="interrupted", planned=2, filters={"cases": ["c*"]}).write(tmp_path)[2].read_text()
    assert "**This run was interrupted.**" in text
    assert "**Only 1 of 2 planned results are here.**" in text
    assert "**A filter chose the cases: c\\*.**" in text
    assert "**Therefore nothing in it is conformant.**" in text
