"""Merging the reports of parts of a run."""

import pytest

from polyfuse import SpecError
from polyfuse.conformance import Result
from polyfuse.conformance.report import BackendFacts, merge
from polyfuse.dispatch import Support
from tests.conformance.reports import made


def part(backend, statuses="p", **fields):
    claims = {"a": Support("a", backend, "torch", None)}
    fields = {"backends": {backend: BackendFacts("torch", claims=claims)}, "spec_versions": {"a": 1}, **fields}
    return made(statuses, backend=backend, planned=len(statuses), **fields)


def test_parts_become_one_report_in_their_order():
    one, two = part("x", "pp", started="2026-11-30T01", command="run x"), part("y", "pf", started="2026-11-29T01")
    one.finished, two.finished = "2026-11-30T02", "2026-11-29T02"
    whole = merge([one, two])
    assert [r.backend for r in whole.results] == ["x", "x", "y", "y"]
    assert (whole.planned, whole.complete, whole.ok) == (4, True, False)
    assert (whole.started, whole.finished, whole.command) == ("2026-11-29T01", "2026-11-30T02", "run x")
    assert list(whole.backends) == ["x", "y"]
    assert whole.conformant("x") == ["a"]
    assert (len(one.results), one.planned) == (2, 2)


def test_the_ops_of_one_backend_are_put_together():
    one, two = part("x"), part("x")
    two.results = [Result("b", "x", "case0", "passed", core=True)]
    two.backends = {"x": BackendFacts("torch", claims={"b": Support("b", "x", "torch", None)})}
    two.spec_versions = {"b": 3}
    whole = merge([one, two])
    assert list(whole.backends["x"].claims) == ["a", "b"]
    assert whole.spec_versions == {"a": 1, "b": 3}
    assert whole.conformant("x") == ["a", "b"]


@pytest.mark.parametrize("state", ["interrupted", "running"])
def test_a_part_that_is_not_complete_keeps_the_whole_from_it(state):
    whole = merge([part("x"), part("y", state=state), part("z")])
    assert (whole.state, whole.ok, whole.conformant("x")) == (state, False, [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"commit": "def"}, "commit: expected the same in every report, 'abc', got 'def'"),
        ({"versions": {"torch": "2", "jax": "1"}}, "versions: expected the same in every report, jax None, got jax 1"),
        ({"chip": {"name": "other"}}, "chip: expected the same"),
        ({"filters": {"cases": ["c"]}}, "filters: expected the same"),
        ({"spec_versions": {"a": 2}}, "spec_versions: a: expected the same in every report, 1, got 2"),
        ({"checks": {"values": "Other."}}, "checks: values: expected the same"),
    ],
)
def test_parts_that_were_made_otherwise_are_refused(fields, message):
    same = {"versions": {"torch": "2"}, "checks": {"values": "Right."}}
    with pytest.raises(SpecError, match=message):
        merge([part("x", **same), part("y", **{**same, **fields})])


@pytest.mark.parametrize(("name", "value"), [("device", "cuda (other)"), ("level", "full"), ("seed", 1)])
def test_parts_of_another_device_level_or_seed_are_refused(name, value):
    other = part("y")
    setattr(other, name, value)
    with pytest.raises(SpecError, match=f"merge: {name}: expected the same in every report"):
        merge([part("x"), other])


def test_a_case_that_is_there_twice_is_refused():
    with pytest.raises(SpecError, match="expected each case once, got case0 of a on x twice"):
        merge([part("x"), part("x")])


def test_a_backend_of_two_versions_is_refused():
    other = part("x", backends={"x": BackendFacts("torch", version="2")})
    other.results = []
    with pytest.raises(SpecError, match="backends: x: expected the same"):
        merge([part("x"), other])
