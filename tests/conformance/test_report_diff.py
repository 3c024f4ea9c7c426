"""Comparing reports: what counts as worse, and what only as different."""

from dataclasses import replace

import pytest

from polyfuse.conformance import Result
from polyfuse.conformance.report import compare
from tests.conformance.reports import made

RIGHT = Result("a", "mine", "c", "passed")
WRONG = Result("a", "mine", "c", "failed", detail="y: wrong\nmore")
UNCLAIMED = Result("a", "mine", "c", "skipped", reason="unclaimed")
LEFT_OUT = Result("a", "mine", "c", "skipped", reason="left_out")
WAIVED = Result("a", "mine", "c", "waived")


def pair(before, after):
    """Two reports that differ in one case; another one of the op has failed in both, so that the verdict stays."""
    reports = made("f"), made("f")
    for report, result in zip(reports, (before, after), strict=True):
        report.results += [result] if result else []
    return reports


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (RIGHT, WRONG, "passed -> failed: y: wrong"),
        (RIGHT, replace(WRONG, ending="crashed"), "passed -> crashed: y: wrong"),
        (RIGHT, UNCLAIMED, "passed -> unclaimed"),
        (RIGHT, LEFT_OUT, "passed -> left out"),
        (RIGHT, WAIVED, "passed -> waived"),
        (RIGHT, None, "passed -> missing"),
        (WRONG, UNCLAIMED, "failed -> unclaimed"),
        (WAIVED, WRONG, "waived -> failed: y: wrong"),
        (UNCLAIMED, WRONG, "unclaimed -> failed: y: wrong"),
    ],
)
def test_worse(before, after, line):
    found = compare(*pair(before, after))
    assert found.regressions == [f"a on mine, c: {line}"]
    assert (found.improvements, found.new, found.changes, found.ok) == ([], [], [], False)


@pytest.mark.parametrize(("before", "state"), [(WRONG, "failed"), (UNCLAIMED, "unclaimed"), (WAIVED, "waived")])
def test_better(before, state):
    found = compare(*pair(before, RIGHT))
    assert found.improvements == [f"a on mine, c: {state} -> passed"]
    assert (found.regressions, found.ok) == ([], True)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        (WRONG, None, "failed -> missing"),
        (WRONG, WAIVED, "failed -> waived"),
        (LEFT_OUT, UNCLAIMED, "left out -> unclaimed"),
    ],
)
def test_neither(before, after, line):
    found = compare(*pair(before, after))
    assert found.changes == [f"a on mine, c: {line}"]
    assert found.ok


def test_the_same_is_no_difference():
    found = compare(*pair(RIGHT, replace(RIGHT, seconds=3.0)))
    assert not any((found.regressions, found.improvements, found.new, found.changes))


def test_a_new_case_is_new():
    assert compare(*pair(None, RIGHT)).new == ["a on mine, c: passed"]


def test_a_verdict_that_is_lower_is_worse_though_every_case_is_as_it_was():
    found = compare(made("pp"), made("pp", state="interrupted"))
    assert found.regressions == ["a on mine: conformant -> partial (the run was interrupted)"]
    assert found.changes == ["state: complete -> interrupted"]
    assert compare(made("pp", state="interrupted"), made("pp")).improvements == [
        "a on mine: partial -> conformant (all core cases and nothing failed)"
    ]


def test_a_new_case_that_fails_lowers_the_verdict():
    before, after = made("p"), made("pf")
    assert compare(before, after).regressions == ["a on mine: conformant -> failed (1 case failed)"]


def test_versions_and_settings_that_changed_are_said():
    before = made("p", spec_versions={"a": 1, "b": 1}, versions={"torch": "2.11", "jax": "0.10"})
    after = made("p", spec_versions={"a": 2, "b": 1}, versions={"torch": "2.12"}, filters={"cases": ["c*"]})
    after.level, after.filters = "full", {}
    found = compare(before, after)
    assert found.changes == ["level: quick -> full", "spec of a: 1 -> 2", "jax: 0.10 -> none", "torch: 2.11 -> 2.12"]
    assert found.ok
