"""docs/compatibility.md is what the repository holds, and says of nothing that it was run which was not."""

import json
import re
from pathlib import Path
from typing import Any

from polyfuse.bench.compatibility import devices, measured, parts, platforms, render, versions
from polyfuse.integrations.transformers._parts import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
RUN = {"device": "cuda:0 (Chip)", "versions": {"python": "3.12.1", "torch": "2.11.0"}}
RUN |= {"made": {"by": "x", "commit": "0123456", "date": "2026-01-02"}}


def report(*rows: tuple[str, str, str]) -> dict[str, Any]:
    return RUN | {"results": [{"op": op, "backend": backend, "status": status} for op, backend, status in rows]}


def cells(page: str, first: str) -> list[str]:
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.+)\|$", page, flags=re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


def test_the_page_is_up_to_date() -> None:
    assert render(ROOT) == PAGE, "run: make docs"


def test_only_ops_with_a_passed_case_count_as_run() -> None:
    results = {
        "conformance_a": report(("f", "triton", "passed"), ("f", "triton", "passed"), ("f", "jax", "skipped")),
        "conformance_b": report(("g", "triton", "passed"), ("h", "triton", "failed")),
        "speed": RUN,
    }
    row = cells(devices(results), "cuda (Chip)")
    assert row == ["triton 2", "[speed](../benchmarks/results/speed.json)"]


def test_a_kind_of_device_without_results_is_said_to_have_none() -> None:
    table = platforms(ROOT, {"speed": RUN})
    assert cells(table, "rocm")[-1] == "no committed run"
    assert cells(table, "cuda")[-1] == "results above"
    assert cells(table, "cpu")[:2] == ["torch, triton", "jax, pallas"]


def test_versions_are_those_of_the_project_its_ci_and_its_results() -> None:
    table = versions(ROOT, [RUN])
    python = cells(table, "Python")
    assert python[0] == ">=3.11"
    assert python[1].split(", ") == re.findall(r'"(3\.\d+)"', (ROOT / ".github/workflows/ci.yml").read_text())[-3:]
    assert python[2] == "3.12.1"
    assert cells(table, "torch")[2] == "2.11.0"
    assert cells(table, "jax")[2] == ""


def test_every_kind_of_part_and_every_measured_model_is_there() -> None:
    assert re.findall(r"^\| (\w+) \|", parts(), flags=re.MULTILINE)[1:] == list(KINDS)
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        if "model" in json.loads(path.read_text()):
            assert f"[{path.stem}](" in PAGE
    assert cells(measured({"a": RUN | {"model": "m"}}), "m") == [
        "-",
        "cuda (Chip)",
        "2026-01-02",
        "0123456",
        "[a](../benchmarks/results/a.json)",
    ]
