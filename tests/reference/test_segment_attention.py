"""The oracle of `segment_attention`: values worked out by hand, and what its intervals promise."""

from dataclasses import replace
from math import exp, inf, nan
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference import Exact, oracle
from polyfuse.spec import OPS
from polyfuse.spec.segment_attention import NAME, SPEC

ENDS = np.array([0, 2, 2, 3], np.int32)  # of 4 rows: two, none, one, and one past the last


def arrays(dtype: Any = np.float32) -> dict[str, Any]:
    """One head of 2 columns: scores 0 and 2 in the first row, 0 and 0 in the second, with a scale of 1."""
    q = np.array([[1, 0], [0, 0], [5, 5], [1, 1]], dtype)
    k = np.array([[0, 0], [2, 7], [1, 1], [9, 9]], dtype)
    v = np.array([[1, -4], [3, 8], [6, 7], [5, 5]], dtype)
    return {"q": q[:, None], "k": k[:, None], "v": v[:, None], "cu_seqlens": ENDS, "scale": 1.0}


def interval(**values: Any) -> Exact:
    return oracle(NAME).intervals(**arrays() | values)["out"]


def test_values_by_hand() -> None:
    out = oracle(NAME)(**arrays())[:, 0]
    large = exp(2) / (1 + exp(2))
    np.testing.assert_allclose(out[0], [1 + 2 * large, -4 + 12 * large], rtol=1e-7)
    np.testing.assert_array_equal(out[1:3], [[2, 2], [6, 7]])


def test_the_scale_defaults_to_the_root_of_the_dim() -> None:
    large = exp(2**0.5) / (1 + exp(2**0.5))
    out = oracle(NAME)(**arrays() | {"scale": None})
    np.testing.assert_allclose(out[0, 0], [1 + 2 * large, -4 + 12 * large], rtol=1e-7)


def test_rows_past_the_last_segment_may_hold_anything() -> None:
    exact = interval()
    assert np.isneginf(exact.low[3]).all()
    assert np.isposinf(exact.high[3]).all()
    assert np.isfinite(exact.low[:3]).all()


def test_a_row_alone_is_its_value_within_the_roundings_of_its_sums() -> None:
    exact = interval()
    width = (exact.high[2] - exact.low[2])[0] / exact.value[2][0]
    assert (width > 0).all()
    assert (width < 2.0**-17).all()


@pytest.mark.parametrize(("dtype", "unit"), [(ml_dtypes.bfloat16, 2.0**-8), (np.float16, 2.0**-11)])
def test_sixteen_bits_add_one_rounding_of_each_weight(dtype: Any, unit: float) -> None:
    """Of the first row: weights times values are 0.12 and 2.64 in the first column."""
    narrow, wide = interval(**arrays(dtype)), interval()
    added = narrow.high[0, 0, 0] - wide.high[0, 0, 0]
    large = exp(2) / (1 + exp(2))
    assert added == pytest.approx(unit * (1 + 2 * large), rel=0.02)


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("q", nan, [[nan, nan], [2, 2]]),
        ("k", nan, [[nan, nan], [nan, nan]]),
        ("v", nan, [[nan, -4], [nan, 2]]),
        ("v", inf, [[inf, -4], [inf, 2]]),
        ("q", inf, [[nan, nan], [2, 2]]),  # infinity times the zero in k
    ],
)
def test_what_is_not_finite_stays_where_the_spec_says(name: str, value: float, wrong: list[list[float]]) -> None:
    changed = arrays()[name].copy()
    changed[0, 0, 0] = value
    exact = interval(**{name: changed})
    got, want = exact.value[:2, 0], np.array(wrong)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    np.testing.assert_array_equal(exact.value[2, 0], [6, 7])


def test_a_score_of_minus_infinity_makes_its_row_undefined() -> None:
    k = arrays()["k"].copy()
    k[1, 0, 0] = -inf
    exact = interval(k=k, q=np.ones_like(k))
    assert np.isneginf(exact.low[:2]).all()
    assert np.isposinf(exact.high[:2]).all()


def test_sums_beyond_float32_are_undefined() -> None:
    big = np.full_like(arrays()["v"], 2e38)
    assert np.isposinf(interval(v=big).high[:2]).all()
    assert np.isfinite(interval(v=big).high[2]).all()
    assert np.isposinf(interval(q=big, k=big).high[2]).all()


@pytest.mark.parametrize("value", [e.value for e in SPEC.errors])
def test_every_bound_is_applied(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = interval()
    errors = tuple(replace(e, steps=1e6) if e.value == value else e for e in SPEC.errors)
    changed = replace(SPEC, errors=errors)
    monkeypatch.setitem(OPS, NAME, changed)
    monkeypatch.setattr(oracle(NAME), "spec", changed)
    after = interval()
    assert (after.high[0] > before.high[0] + 1e-3).all()


def test_flushed_numbers_are_granted() -> None:
    tiny = np.full_like(arrays()["v"], 2.0**-140)
    exact = interval(v=tiny)
    assert (exact.low[:3] <= 0).all()
    assert (exact.high[:3] < 2.0**-120).all()
