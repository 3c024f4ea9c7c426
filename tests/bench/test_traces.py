"""Traces: their shape, their statistics, and what a file may hold."""

import json
from pathlib import Path

import pytest

from polyfuse.bench.traces import load_trace, synthetic_trace, tokens
from polyfuse.spec import SpecError


def test_tokens_are_merged_patches():
    assert tokens([1, 20, 20]) == 100
    assert tokens([3, 44, 80]) == 2640
    assert tokens([1, 20, 20], merge=1) == 400


def test_a_synthetic_trace_is_that_of_its_seed():
    trace = synthetic_trace(2000, seed=3)
    assert trace == synthetic_trace(2000, seed=3)
    assert trace != synthetic_trace(2000, seed=4)
    totals = [sum(map(tokens, request)) for request in trace]
    assert {len(request) for request in trace} == set(range(1, 17))
    assert 1800 < sum(totals) / 2000 < 2000
    assert 4500 < max(totals) <= 4864
    grids = [grid for request in trace for grid in request]
    assert [1, 44, 80] in grids
    assert all(frames == 1 and rows % 2 == cols % 2 == 0 for frames, rows, cols in grids)


def test_a_synthetic_trace_of_single_images_has_them_all():
    assert max(tokens(request[0]) for request in synthetic_trace(500, max_items=1)) == 880


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"requests": -1}, "synthetic_trace: requests: expected a number >= 0, got -1"),
        ({"requests": 1, "max_items": 0}, "synthetic_trace: max_items: expected a number >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str):
    with pytest.raises(SpecError, match=message):
        synthetic_trace(**arguments)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path):
    trace = [*synthetic_trace(5), [[4, 2, 6], [1, 8, 8]]]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    assert load_trace(path) == load_trace(str(path)) == trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[", r"load_trace: path: expected a JSON file, got .*trace\.json \(Expecting value"),
        ("{}", "load_trace: path: expected a list of requests, got dict"),
        ("[[[1, 2, 2]], []]", r"load_trace: path\[1\]: expected a list of at least one grid, got \[\]"),
        ("[3]", r"load_trace: path\[0\]: expected a list of at least one grid, got 3"),
        ("[[[1, 2]]]", r"load_trace: path\[0\]\[0\]: expected \[frames, patch_rows, patch_cols\] with even rows"),
        ("[[[1, 2, 2], [1, 3, 2]]]", r"load_trace: path\[0\]\[1\]: .* got \[1, 3, 2\]"),
        ("[[[0, 2, 2]]]", r"got \[0, 2, 2\]"),
        ("[[[true, 2, 2]]]", r"got \[True, 2, 2\]"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_trace(path)
