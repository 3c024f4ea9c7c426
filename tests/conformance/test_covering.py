"""Covering cases: every valid pair of values stands in a case, what is refused is refused by the spec, and no more."""

from collections.abc import Iterable, Mapping
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest

from polyfuse.conformance import Case, Trial, all_cases, selected_for
from polyfuse.conformance.cases import cases, covering, covering_cases
from polyfuse.conformance.covering import ABSENT, Covering, Factor, Item
from polyfuse.conformance.inputs import make_inputs, place
from polyfuse.conformance.layouts import LAYOUTS
from polyfuse.conformance.narrow import narrow
from polyfuse.conformance.plans import plan
from polyfuse.spec import FLOATS, OPS, bind

PLANNED = [op for op in OPS if plan(op)]


def pairs(found: Covering) -> set[tuple[Item, Item]]:
    items = [(n, v) for n, factor in enumerate(found.factors) for v in range(len(factor.values))]
    return {(a, b) for a, b in combinations(items, 2) if a[0] != b[0]}


@pytest.mark.parametrize("op", PLANNED)
def test_every_pair_stands_in_a_case_or_has_a_reason(op):
    found = covering(op)
    covered = {pair for row in found.rows.values() for pair in found.shown(row)}
    assert covered | found.void.keys() == pairs(found)
    assert not covered & found.void.keys()


@pytest.mark.parametrize("op", PLANNED)
def test_no_value_is_refused_alone(op):
    found = covering(op)
    used = {item for row in found.rows.values() for item in enumerate(row)}
    assert used == {(n, v) for n, factor in enumerate(found.factors) for v in range(len(factor.values))}
    assert all(len(clause) > 1 for clause in found.clauses)


@pytest.mark.parametrize("op", PLANNED)
def test_pairs_are_void_for_arrays_that_are_absent_or_for_reasons_of_the_spec(op):
    found = covering(op)
    about = {f.name: f.under for f in found.factors if f.under}
    for pair, reasons in found.void.items():
        names = [found.value(item)[0] for item in pair]
        assert reasons or any(name in about for name in names), [found.value(item) for item in pair]


@pytest.mark.parametrize("op", PLANNED)
def test_clauses_are_minimal_and_true(op):
    """No row that is a case has the values of a clause, and other values of any one of them make a case."""
    found = covering(op)
    rows = [set(enumerate(row)) for row in found.rows.values()]
    for clause in found.clauses:
        assert not any(clause <= row for row in rows)
    for clause in (clause for clause, reason in found.clauses.items() if reason.startswith(op)):
        for item in clause:
            assert any(clause - {item} <= row for row in rows), [found.value(i) for i in clause]


@pytest.mark.parametrize("op", PLANNED)
def test_covering_cases_are_calls_of_the_spec_with_names_of_their_own(op):
    names = [case.name for case in all_cases(op)]
    assert len(set(names)) == len(names)
    for case in covering_cases(op)[::7]:
        bind(OPS[op], make_inputs(OPS[op], case))


@pytest.mark.parametrize("op", PLANNED)
def test_quick_has_every_value_and_all_fills_and_layouts_of_the_first_array_in_every_dtype(op):
    found = covering(op)
    chosen = {case.name for case, left_out in selected_for(op, "quick") if not left_out}
    rows = [row for row, case in zip(found.rows.values(), covering_cases(op), strict=True) if case.name in chosen]
    every = {item for row in found.rows.values() for item in enumerate(row)}
    assert {item for row in rows for item in enumerate(row)} == every
    first = [n for n, f in enumerate(found.factors) if f.name.startswith(f"{OPS[op].tensors[0].name}.")]
    assert {(row[0], n, row[n]) for row in rows for n in first} == {
        (t, n, v) for t in range(len(FLOATS)) for n in first for v in range(len(found.factors[n].values))
    }
    assert set(OPS[op].core) <= chosen
    assert len(chosen) < len(all_cases(op)) / 2
    assert all(not left_out for _, left_out in selected_for(op, "full"))
    assert {c.name for c in cases(op)} - chosen == {
        case.name for case, left_out in selected_for(op, "quick") if left_out and case in cases(op)
    }


def refusal(chosen: Mapping[str, Any]) -> str:
    """Three factors rule one another out in two ways."""
    if chosen["a"] == 2 and chosen["b"] == 2:
        return "a with b"
    return "all three" if (chosen["a"], chosen["b"], chosen["c"]) == (1, 1, 1) else ""


def test_reasons_are_found_by_changing_one_value_at_a_time():
    factors = [Factor("a", (0, 1, 2)), Factor("b", (0, 1, 2)), Factor("c", (0, 1)), Factor("d", (0, 1), False)]
    found = Covering(factors, refusal)
    named = {frozenset(map(found.value, clause)): reason for clause, reason in found.clauses.items()}
    assert named[frozenset({("a", 2), ("b", 2)})] == "a with b"
    assert set(named.values()) <= {"a with b", "all three"}
    assert found.void == {((0, 2), (1, 2)): ("a with b",)}
    covered = {pair for row in found.rows.values() for pair in combinations(enumerate(row), 2)}
    assert covered == pairs(found) - found.void.keys()


def test_what_is_about_an_absent_array_has_no_value():
    factors = [Factor("x", (ABSENT, "float32")), Factor("n", (1, 2)), Factor("x.fill", (None, "zeros"), False, "x")]
    found = Covering(factors, lambda chosen: "")
    rows = [found.chosen(row) for row in found.rows.values()]
    assert all((row["x.fill"] is None) == (row["x"] == ABSENT) for row in rows)
    assert {(row["n"], row["x.fill"]) for row in rows} == {(1, None), (2, None), (1, "zeros"), (2, "zeros")}


def test_first_values_that_make_no_case_are_an_error():
    with pytest.raises(ValueError, match="the first values of all factors make no case: never"):
        Covering([Factor("a", (0, 1)), Factor("b", (0, 1))], lambda chosen: "never")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["numpy", "torch"])
def test_a_layout_keeps_its_strides_and_its_place_and_what_lies_around_it_is_nan(layout, family):
    values = LAYOUTS[layout](np.arange(24.0, dtype=np.float32).reshape(2, 3, 4))
    placed = place({"x": values}, family, "cpu")["x"]
    steps = [stride // 4 for stride in values.strides]
    assert (list(placed.stride()) if family == "torch" else [s // 4 for s in placed.strides]) == steps
    assert np.asarray(placed).tolist() == values.tolist()
    if family == "torch":
        storage = placed.new_empty(0).set_(placed.untyped_storage())
        assert set(storage[~storage.isnan()].tolist()) == set(values.ravel().tolist())
        behind = ("misaligned", "offset", "second_half", "one_of_three", "sliced")
        assert (placed.storage_offset() > 0) == (layout in behind)


def rejects(op: str, mutant: Any, chosen: Iterable[Case]) -> bool:
    for case in chosen:
        trial = Trial(op, case, seed=1)
        values, call = trial.inputs()
        if trial.check(mutant(**values), call):
            return True
    return False


def can_show(op: str, name: str, case: Case) -> bool:
    """Whether a case could reject a mistake: a quick look, as running one takes longer."""
    tensor = OPS[op].tensors[0]
    dtype = case.dtypes[tensor.dtype_var or tensor.name]
    if name == "float16_subnormals_flushed":
        return dtype == "float16" and "subnormal" in case.fill.values()
    return not name.startswith("nan_lost") or (name.endswith(dtype) and any("nan" in f for f in case.fill.values()))


MISTAKES = [(op, name) for op in PLANNED for name in narrow(op)]
SOME = [pytest.param(*mistake, marks=[pytest.mark.slow] if n % 3 else []) for n, mistake in enumerate(MISTAKES)]


@pytest.mark.parametrize(("op", "name"), SOME)
def test_narrow_mistakes_are_rejected(op, name):
    long = (case for case in cases(op) if "1030" in case.name)  # the only ones of some ops with so many rows
    assert rejects(op, narrow(op)[name], chain(long, (c for c in covering_cases(op) if can_show(op, name, c))))


@pytest.mark.slow
@pytest.mark.parametrize("op", PLANNED)
def test_hand_picked_cases_let_narrow_mistakes_pass(op):
    """Else a mistake shows nothing of the covering cases: at least three of each op are such."""
    own = [case for case in cases(op) if case.repeat == 1 and "1030" not in case.name]
    assert sum(not rejects(op, mutant, own) for mutant in narrow(op).values()) >= 3
