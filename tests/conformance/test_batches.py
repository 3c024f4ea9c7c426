"""Batches and other values of ops whose boundaries have names that conformance has never heard of."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyfuse.conformance import Case, inputs
from polyfuse.conformance.batches import Batch, batches
from polyfuse.conformance.other import other_inputs
from polyfuse.spec import Call, OpSpec, bind
from polyfuse.spec._types import AttrSpec, Boundaries, Cost, OutputSpec, TensorSpec

FLOAT, INT = ("float32",), ("int32",)


def op(boundaries: Boundaries, sizes: str, divides: Callable[[Call], Any] = lambda call: {}) -> OpSpec:
    """An op on rows [M, D] with a weight for each of P parts, which `splits` divides."""
    return OpSpec(
        name="part_scale",
        version=1,
        summary="",
        formula="",
        source="",
        rows="M",
        tensors=(
            TensorSpec("x", ("M", "D"), FLOAT, ""),
            TensorSpec("splits", (sizes,), INT, "", optional=True, boundaries=boundaries),
            TensorSpec("weight", ("P",), FLOAT, "", optional=True),
        ),
        attrs=(AttrSpec("pad_to", "int", 1, ""), AttrSpec("slope", "int", 3, "")),
        outputs=(OutputSpec("y", ("M", "D"), "float32", ""),),
        errors=(),
        edge_cases=(),
        core=(),
        cost=lambda call: Cost(0, 0, 0),
        derive=divides,
        groups=("P",),
    )


PACKED = op(Boundaries(starts=True), "N")
STOPS = op(Boundaries(alignment="pad_to"), "P")
X = np.arange(14, dtype=np.float32).reshape(7, 2)


def found(spec: OpSpec, splits: list[int] | None, parts: int, **attrs: int) -> dict[str, Batch]:
    given = None if splits is None else np.array(splits, np.int32)
    weight = np.arange(parts, dtype=np.float32) if parts else None
    made = {**spec.parameters, "x": X, "splits": given, "weight": weight, **attrs}
    return {batch.name: batch for batch in batches(Case("made", {}), made, bind(spec, made), many=8)}


def test_packed_parts_are_taken_with_their_rows_and_weights() -> None:
    batch = found(PACKED, [1, 3, 3, 7], parts=3)["the sequences in reverse"]
    np.testing.assert_array_equal(batch.values["x"], X[[3, 4, 5, 6, 1, 2]])
    np.testing.assert_array_equal(batch.values["splits"], [0, 4, 4, 6])
    np.testing.assert_array_equal(batch.values["weight"], [2, 1, 0])
    assert batch.values["splits"].dtype == np.int32
    here, there = batch.same["y"]
    np.testing.assert_array_equal(here, range(6))
    np.testing.assert_array_equal(there, [3, 4, 5, 6, 1, 2])


def test_rows_without_parts_are_one_sequence_that_looks_back() -> None:
    batch = found(PACKED, None, parts=1)["the first half of the rows"]
    np.testing.assert_array_equal(batch.values["x"], X[:4])


def test_rows_of_parts_with_ends_stand_without_them() -> None:
    batch = found(STOPS, [2, 4, 7], parts=0, pad_to=2, slope=5)["row 6 alone"]
    np.testing.assert_array_equal(batch.values["x"], X[6:])
    assert batch.values["splits"] is None
    assert (batch.values["pad_to"], batch.values["slope"]) == (1, 5)
    assert found(STOPS, [2, 4, 7], parts=3) == {}  # without its part a row has no weight


@pytest.mark.parametrize(
    ("spec", "ends", "want"), [(PACKED, (1, 3, 3, 7), [1, 5, 5, 7]), (STOPS, (2, 4, 7), [2, 5, 7])]
)
def test_other_values_of_boundaries_do_not_decrease(
    spec: OpSpec, ends: Any, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "suite", lambda name: SimpleNamespace(FILLS={}))
    case = Case(
        "made", {"M": 7, "D": 2, "N": 4, "P": 3}, host={"splits": ends}, as_tensor=("splits",), present=("splits",),
        dtypes={"splits": "int32"},
    )  # fmt: skip
    made = inputs.make_inputs(spec, case, 0)
    assert made["splits"].tolist() == list(ends)
    assert other_inputs(spec, case, made, 1).made["splits"].tolist() == want
