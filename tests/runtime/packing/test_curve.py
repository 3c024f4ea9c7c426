"""`Curve`: its values between and beyond its points, and the points that it refuses."""

import math

import pytest

from polyfuse.runtime.packing.curve import Curve
from polyfuse.spec import SpecError


@pytest.mark.parametrize(
    ("points", "values"),
    [
        ([(10, 1.0), (20, 3.0), (40, 4.0)], {1: 1.0, 10: 1.0, 15: 2.0, 20: 3.0, 30: 3.5, 40: 4.0, 60: 5.0}),
        ([(20, 2.0), (10, 3.0)], {5: 3.0, 15: 2.5, 20: 2.0, 30: 2.0}),
        ([(10, 3.0)], {1: 3.0, 10: 3.0, 30: 9.0}),
    ],
)
def test_a_curve_goes_through_its_points_and_on(points: list[tuple[int, float]], values: dict[int, float]):
    curve = Curve(points)
    assert {count: curve(count) for count in values} == values
    assert curve.points == tuple(sorted(points))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "Curve: points: expected at least one point, got none"),
        ([(0, 1.0)], r"Curve: points: expected different tokens >= 1, got \[0\]"),
        ([(8, 1.0), (8, 2.0)], r"Curve: points: expected different tokens >= 1, got \[8, 8\]"),
        ([(8, math.nan)], r"Curve: points: expected finite seconds >= 0, got \(8, nan\)"),
        ([(8, -1.0)], r"Curve: points: expected finite seconds >= 0, got \(8, -1.0\)"),
    ],
)
def test_bad_curves(points: list[tuple[int, float]], message: str):
    with pytest.raises(SpecError, match=message):
        Curve(points)
