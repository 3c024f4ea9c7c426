"""`polyfuse conformance diff` and `merge`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from polyfuse.cli import main
from polyfuse.conformance.report import read
from tests.conformance.reports import made

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def polyfuse(*args):
    return CliRunner().invoke(main, ["conformance", *map(str, args)], prog_name="polyfuse")


@pytest.fixture
def files(tmp_path):
    """Reports in files, by name: one right, one wrong, and one of another backend."""
    reports = {"right": made("pp"), "wrong": made("pf"), "other": made("p", backend="other")}
    return {name: report.write_file(tmp_path / f"{name}.json") for name, report in reports.items()}


def test_diff_exits_1_on_a_regression_and_0_otherwise(files):
    done = polyfuse("diff", files["right"], files["wrong"])
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "worse: a on mine: conformant -> failed (1 case failed)",
        "worse: a on mine, case1: passed -> failed",
        "2 worse, 0 better, 0 new, 0 changed",
    ]
    done = polyfuse("diff", files["wrong"], files["right"])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "0 worse, 2 better, 0 new, 0 changed")


def test_diff_exits_2_for_a_file_that_it_cannot_read(files, tmp_path):
    (tmp_path / "broken.json").write_text('{"schema": 99}')
    done = polyfuse("diff", files["right"], tmp_path / "broken.json")
    assert (done.exit_code, "expected 2, got 99" in done.output) == (2, True)
    assert polyfuse("diff", files["right"], tmp_path / "none.json").exit_code == 2


def test_diff_compares_with_a_committed_file(tmp_path):
    old = RESULTS / "conformance_h200_af79ec6.json"
    now = read(old)
    now.results.pop()
    done = polyfuse("diff", old, now.write_file(tmp_path / "now.json"))
    assert done.exit_code == 1
    assert "passed -> missing" in done.output


def test_merge_writes_the_file_that_the_suffix_names(files, tmp_path):
    whole = tmp_path / "whole.json"
    done = polyfuse("merge", whole, files["right"], files["other"])
    assert (done.exit_code, done.output) == (0, f"written: {whole}\n")
    assert json.loads(whole.read_text())["conformant"] == {"mine": ["a"], "other": ["a"]}
    assert polyfuse("merge", tmp_path / "whole.html", whole).exit_code == 0
    assert (tmp_path / "whole.html").read_text().startswith("<!doctype html>")


def test_merge_refuses_parts_of_different_runs(tmp_path):
    parts = [made(commit=c, backend=c).write_file(tmp_path / f"{c}.json") for c in ("abc", "def")]
    done = polyfuse("merge", tmp_path / "whole.json", *parts)
    assert (done.exit_code, "commit: expected the same" in done.output) == (2, True)
    assert not (tmp_path / "whole.json").exists()
