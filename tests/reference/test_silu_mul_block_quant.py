"""The oracle of `silu_mul_block_quant` on numbers that a reader can check with a pencil, and where it leaves a choice.

Of a gate of 40 and more sigmoid is 1 in float64, so that y is gate * up. Groups whose largest |y| is qmax have scale 1.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyfuse
from polyfuse.conformance.checks.values import compare
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.reference import oracle
from polyfuse.spec.block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS

silu_mul_block_quant = oracle("silu_mul_block_quant")
exact = silu_mul_block_quant.intervals

ULP = 2.0**-24  # one float32 rounding, as the spec counts them
FLUSH = 2.0**-126  # what a flushed number can change

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def rows_of(*y: list[float], dtype: Any = np.float32) -> Any:
    """Rows x whose y are these: a gate of 64, and up of y / 64."""
    up = np.array(y) / 64
    return np.concatenate([np.full(up.shape, 64.0), up], axis=-1).astype(dtype)


def call(x: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """q and scale as nested lists of numbers; groups of two columns."""
    q, scale = silu_mul_block_quant(x, **{"group_size": 2} | options)
    return q.astype(np.float64).tolist(), scale.tolist()


def float32(value: float) -> float:
    return float(np.float32(value))


def test_silu_times_up_over_the_scale_of_each_group() -> None:
    # max |y| / 448: 448 / 448 = 1 and 896 / 448 = 2.
    assert call(rows_of([448, -224, 896, 32])) == ([[448, -224, 448, 16]], [[1, 2]])


def test_a_gate_below_zero() -> None:
    # -1 * sigmoid(-1) = -1 / (1 + e), times up; each group of one has q = +-448.
    q, scale = call(np.array([[-1, 1, 3, 5]], np.float32), group_size=1)
    assert q == [[-448, 448]]
    assert scale == [[float32(3 / (1 + np.e) / 448), float32(5 / (1 + np.exp(-1.0)) / 448)]]


@pytest.mark.parametrize(
    ("quant_dtype", "y", "want"),
    [
        # From 16 on the step of e4m3 is 2, from 128 on 16: ties go to 16, 20, 128, 160.
        ("float8_e4m3fn", [448, 17, 19, 136, -152, 0], [448, 16, 20, 128, -160, 0]),
        ("float8_e4m3fnuz", [224, 17, 19, -136, 5, 0], [224, 16, 20, -128, 5, 0]),
        # From 16 on the step of e5m2 is 4.
        ("float8_e5m2", [57344, 18, 22, -18, 5, 0], [57344, 16, 24, -16, 5, 0]),
        ("int8", [127, 2.5, 3.5, -2.5, 0.5, 0], [127, 2, 4, -2, 0, 0]),
    ],
)
def test_each_dtype_rounds_to_nearest_ties_to_even(quant_dtype: str, y: list[float], want: list[float]) -> None:
    assert call(rows_of(y), group_size=6, quant_dtype=quant_dtype) == ([want], [[1]])


@pytest.mark.parametrize("quant_dtype", list(QMAX)[:4])
def test_the_largest_of_a_group_becomes_qmax(quant_dtype: str) -> None:
    qmax = QMAX[quant_dtype]
    assert call(rows_of([3 * qmax, -3 * qmax]), quant_dtype=quant_dtype) == ([[qmax, -qmax]], [[3]])


def test_a_group_of_zeros_has_the_least_scale() -> None:
    assert call(rows_of([0, 0])) == ([[0, 0]], [[float32(1 / (448 * 512))]])
    assert call(rows_of([0, 0]), quant_dtype="int8") == ([[0, 0]], [[2.0**-23]])
    assert call(rows_of([0, 0]), scale_format="ue8m0") == ([[0, 0]], [[2.0**-126]])
    assert call(rows_of([0, 0]), scale_min=0.25) == ([[0, 0]], [[0.25]])
    assert call(rows_of([0, 0]), scale_min=0.0) == ([[0, 0]], [[0]])


def test_scale_min() -> None:
    # 224 / 448 = 0.5 is raised to 4: 224 / 4 = 56.
    assert call(rows_of([224, 0]), scale_min=4.0) == ([[56, 0]], [[4]])
    # With 0 the scale stays, but what divides y is at least 1e-12: 448e-14 / 1e-12 = 4.48, nearest to 4.5.
    q, scale = call(rows_of([448e-14, 0]), scale_min=0.0)
    assert q == [[4.5, 0]]
    assert scale == [[float32(float(np.float32(448e-14 / 64)) * 64 / 448)]]


def test_scale_ub() -> None:
    # 896 / 448 = 2 is lowered to 1: q saturates. An upper bound below the floor loses against it.
    assert call(rows_of([896, 100]), scale_ub=1.0) == ([[448, 96]], [[1]])
    assert call(rows_of([896, -896]), scale_ub=1.0) == ([[448, -448]], [[1]])
    assert call(rows_of([224, 0]), scale_ub=0.5, scale_min=4.0) == ([[56, 0]], [[4]])
    # With int8, 127 / 127 = 1 lowered to the float32 nearest to 0.1.
    assert call(rows_of([127, 0]), quant_dtype="int8", scale_ub=0.1) == ([[127, 0]], [[float32(0.1)]])


def test_gate_and_up_as_two_arrays() -> None:
    # 64 * 7 = 448 and 64 * -3.5 = -224. In the other order a gate of -3.5 would have a sigmoid.
    gate, up = np.full((1, 2), 64, np.float32), np.array([[7, -3.5]], np.float32)
    assert call(gate, up=up) == ([[448, -224]], [[1]])
    assert call(up, up=gate) != ([[448, -224]], [[1]])
    # The limit of gate is above, that of up on both sides: 64 * 2 over the scale 128 / 448.
    assert call(gate, up=up, limit=2.0)[1] == [[float32(2 / (1 + np.exp(-2.0)) * 2 / 448)]]


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_two_arrays_are_the_two_side_by_side(masked: bool, materialize: bool) -> None:
    """In the results, and in the intervals; each array has strides of its own."""
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((3, 2, 4, 96)).astype(ml_dtypes.bfloat16)[:2, :, :, 8:72]
    up = np.asfortranarray(up)
    counts = np.array([1, 4], np.int32) if masked else None
    options: Any = {"num_rows": counts, "group_size": 32, "materialize": materialize, "limit": 0.75}
    joined = np.concatenate([gate, up], -1)
    for one, other in zip(
        silu_mul_block_quant(gate, up=up, **options), silu_mul_block_quant(joined, **options), strict=True
    ):
        assert one.tobytes() == other.tobytes()
    together = exact(joined, **options)
    for name, found in exact(gate, up=up, **options).items():
        for end in ("low", "value", "high"):
            np.testing.assert_array_equal(getattr(found, end), getattr(together[name], end))


def test_limit_clamps_gate_from_above_and_up_on_both_sides() -> None:
    # min(gate, 64) * clip(up, -64, 64): 64 * 7, 64 * -64, 64 * 8, and -1000 * sigmoid(-1000) * 1 = 0.
    x = np.array([[100, 64, 100, -1000, 7, -100, 8, 1]], np.float32)
    q, scale = call(x, limit=64.0, group_size=1)
    assert q == [[448, -448, 448, 0]]
    assert scale == [[1, float32(4096 / 448), float32(512 / 448), float32(1 / (448 * 512))]]


def test_materialize_rounds_silu_and_the_product_to_the_dtype_of_x() -> None:
    # silu(1) = 0.7310586 is 187.15 steps of 2**-8 in bfloat16. 129 * 3 = 387 is a tie of 386 and 388, which is even.
    x = np.array([[1, 129, 1, 3]], ml_dtypes.bfloat16)
    unrounded, materialized = (call(x, group_size=1, materialize=given)[1] for given in (False, True))
    assert unrounded == [[float32(1 / (1 + np.exp(-1.0)) / 448), float32(387 / 448)]]
    assert materialized == [[float32(187 / 256 / 448), float32(388 / 448)]]


def test_a_reciprocal_is_rounded_and_so_is_the_product() -> None:
    # 2**26 / 7 = 9586980.57, so that 1/7 in float32 is 9586981 * 2**-26, and 1/448 that * 2**-6.
    reciprocal = 9586981 * 2.0**-32
    products = [float32(y * reciprocal) for y in (100, 101, 102, 103)]
    quotients = [float32(y / 448) for y in (100, 101, 102, 103)]
    assert call(rows_of([100, 101, 102, 103]), group_size=1, reciprocal=True)[1] == [products]
    assert call(rows_of([100, 101, 102, 103]), group_size=1)[1] == [quotients]
    assert products != quotients


def test_a_power_of_two_scale_is_rounded_up_and_divides_y() -> None:
    # 448 / 448 = 1 is one; 449 / 448 is not: with 2, 449 is 224.5, nearest to 224, and 32 is 16.
    for scale_format in SCALE_FORMATS[1:3]:
        q, _ = call(rows_of([448, 32, 449, 32]), scale_format=scale_format)
        assert q == [[448, 32, 224, 16]]
    assert call(rows_of([448, 32, 449, 32]), scale_format="ue8m0")[1] == [[1, 2]]
    # A scale_ub or scale_min that is none is rounded up as well.
    assert call(rows_of([4480, 0]), scale_format="ue8m0", scale_ub=3.0)[1] == [[4]]
    assert call(rows_of([448, 0]), scale_format="ue8m0", scale_min=3.0)[1] == [[4]]


def test_four_exponent_bytes_make_an_int32() -> None:
    # Scales 1, 2, 4, 8, 16 are 2**0 to 2**4: biased by 127, and three bytes of padding.
    _, scale = silu_mul_block_quant(rows_of([448, 896, 1792, 3584, 7168]), group_size=1, scale_format="ue8m0_packed")
    assert scale.dtype == np.int32
    assert scale.tolist() == [[127 + (128 << 8) + (129 << 16) + (130 << 24) - 2**32, 131]]


def test_rows_past_num_rows_are_not_read() -> None:
    x = np.stack([rows_of([448, 0], [np.nan, 0]), rows_of([896, 0], [224, 0]), rows_of([448, 1], [448, 2])])
    # The counts 1, -1 and 9 of 2 rows are 1, 0 and 2.
    counts = np.array([1, -1, 9], np.int32)
    q, scale = call(x, num_rows=counts)
    assert q == [[[448, 0], [0, 0]], [[0, 0], [0, 0]], [[448, 1], [448, 2]]]
    assert scale == [[[1], [0]], [[0], [0]], [[1], [1]]]
    found = exact(x, num_rows=counts, group_size=2)
    for name in ("q", "scale"):
        assert np.isneginf(found[name].low).all(-1).tolist() == [[False, True], [True, True], [False, False]]
        assert np.isposinf(found[name].high).all(-1).tolist() == [[False, True], [True, True], [False, False]]


@pytest.mark.parametrize(
    ("layout", "masked", "strides"),
    [
        ("row_major", False, (6, 2, 1)),
        ("row_major", True, (6, 2, 1)),
        ("col_major", False, (3, 1, 6)),  # 2 columns of 2 * 3 rows
        ("col_major_tma", False, (3, 1, 8)),  # padded to a multiple of 4 rows
        ("col_major", True, (6, 1, 3)),  # per expert 2 columns of 3 rows
        ("col_major_tma", True, (8, 1, 4)),
    ],
)
def test_layouts_are_the_same_scales(layout: str, masked: bool, strides: tuple[int, ...]) -> None:
    x = rows_of(*([448 * 2.0**i, 448 * 2.0**-i] for i in range(6))).reshape(2, 3, 4)
    counts = np.array([3, 3], np.int32) if masked else None
    _, scale = silu_mul_block_quant(x, num_rows=counts, group_size=1, scale_layout=layout)
    assert scale.reshape(6, 2).tolist() == [[2.0**i, 2.0**-i] for i in range(6)]
    assert tuple(step // 4 for step in scale.strides) == strides


def test_any_strides_are_the_same_numbers() -> None:
    x = rows_of([448, -224], [896, 32])
    assert call(np.asfortranarray(x)) == call(x)


@pytest.mark.parametrize("quant_dtype", list(QMAX)[:4])
def test_nan_spoils_its_group_and_no_other(quant_dtype: str) -> None:
    qmax = QMAX[quant_dtype]
    q, scale = call(rows_of([np.nan, 1, qmax, 0]), quant_dtype=quant_dtype)
    missing = 0 if quant_dtype == "int8" else np.nan
    np.testing.assert_array_equal(q, [[missing, missing, qmax, 0]])
    np.testing.assert_array_equal(scale, [[np.nan, 1]])


@pytest.mark.parametrize("quant_dtype", list(QMAX)[:4])
def test_an_infinite_amax_has_an_infinite_scale_whatever_scale_ub_says(quant_dtype: str) -> None:
    # 2**100 * 2**100 is beyond float32, and so infinite. Infinity over infinity is NaN, 5 over infinity 0.
    x = np.array([[2.0**100, 64, 2.0**100, 5 / 64]], np.float32)
    q, scale = call(x, quant_dtype=quant_dtype, scale_ub=1.0)
    np.testing.assert_array_equal(q, [[0 if quant_dtype == "int8" else np.nan, 0]])
    assert scale == [[np.inf]]


def test_packed_nan_and_infinity_are_exponent_255() -> None:
    x = np.concatenate([rows_of([np.nan], [448]), np.array([[np.inf, 1]], np.float32)])
    assert call(x, group_size=1, scale_format="ue8m0_packed")[1] == [[255], [127], [255]]


def test_a_gate_of_minus_infinity_is_nan() -> None:
    assert np.isnan(call(np.array([[-np.inf, 1]], np.float32), group_size=1)[1]).all()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS[:3])
def test_no_rows_and_no_columns(scale_format: str) -> None:
    columns = 1 if scale_format == "ue8m0_packed" else 2
    for layout in SCALE_LAYOUTS[:3]:
        options = {"group_size": 2, "scale_format": scale_format, "scale_layout": layout}
        q, scale = silu_mul_block_quant(np.zeros((0, 8), np.float32), **options)
        assert (q.shape, scale.shape) == ((0, 4), (0, columns))
        q, scale = silu_mul_block_quant(np.zeros((3, 0), np.float32), **options)
        assert (q.shape, scale.shape) == ((3, 0), (3, 0))


def ends(name: str, x: Any, **options: Any) -> tuple[list[float], list[float], list[float]]:
    """low, value and high of a result of one row."""
    found = exact(x, **options)[name]
    return found.low[0].tolist(), found.value[0].tolist(), found.high[0].tolist()


def y_error(y: float) -> float:
    """10 roundings of |y|, as the gate is 64; a flushed sigmoid and silu, times up; a flushed y, and up times 64."""
    return 10 * ULP * y + 65 * FLUSH * (y / 64) + FLUSH * (1 + 64)


def test_the_interval_of_the_scale() -> None:
    # 2 roundings more for the division by qmax.
    low, high = (448 - y_error(448)) / 448, (448 + y_error(448)) / 448
    assert ends("scale", rows_of([448]), group_size=1) == ([low * (1 - 2 * ULP)], [1], [high * (1 + 2 * ULP)])
    # A product with 1 / qmax has none.
    reciprocal = float32(1 / 448)
    assert ends("scale", rows_of([448]), group_size=1, reciprocal=True) == (
        [float32((448 - y_error(448)) * reciprocal)],
        [1],
        [float32((448 + y_error(448)) * reciprocal)],
    )


def test_the_interval_of_q() -> None:
    # The lowest y over the largest scale, and the highest over the least, with 3 roundings more for the division.
    (low,), _, (high,) = ends("scale", rows_of([448, 28]), group_size=2)
    least, most = (28 - y_error(28)) / high, (28 + y_error(28)) / low
    found = ends("q", rows_of([448, 28]), group_size=2)
    assert found[1] == [448, 28]
    assert (found[0][1], found[2][1]) == (least - 3 * ULP * least, most + 3 * ULP * most)
    assert found[2][0] == 448  # q saturates
    # Below 0 the ends change places.
    found = ends("q", rows_of([448, -28]), group_size=2)
    assert (found[0][1], found[2][1]) == (-most - 3 * ULP * most, -least + 3 * ULP * least)


def test_an_infinite_silu_that_is_clamped_is_the_limit() -> None:
    # silu is 0.75 without an error: y has those of the product, and the scale 2 more for the division by qmax.
    x, y = np.array([[np.inf, 0.5]], np.float32), 0.75 * 0.5
    options: Any = {"group_size": 1, "limit": 0.75, "limit_on": "silu"}
    error = 10 * ULP * y + FLUSH * (1 + 0.75)
    low, high = (y - error) / 448 * (1 - 2 * ULP), (y + error) / 448 * (1 + 2 * ULP)
    assert ends("scale", x, **options) == ([low], [y / 448], [high])
    nothing = np.zeros(1, np.float32)
    least = float32(2.0**-23)
    assert ends("scale", x, row_weight=nothing, scale_min=least, **options) == ([least], [least], [least])


def test_materialized_y_and_a_power_of_two_leave_no_choice() -> None:
    # 10 roundings of 64 * 65 are 0.0025: silu rounds to 64 all the same. 448 / 448 must not be pushed over 1.
    options: Any = {"group_size": 2, "materialize": True}
    x = rows_of([448, 17], dtype=ml_dtypes.bfloat16)
    assert ends("q", x, scale_format="ue8m0", **options) == ([448, 17], [448, 17], [448, 17])
    assert ends("scale", x, scale_format="ue8m0", **options) == ([1], [1], [1])
    # The same numbers as a float32 scale know neither.
    assert ends("scale", x, **options) == ([1 - 2 * ULP], [1], [1 + 2 * ULP])
    assert ends("q", x, **options)[0][1] == 17 / (1 + 2 * ULP) - 3 * ULP * (17 / (1 + 2 * ULP))
    # Without materialize y is no point, and a scale of 1 might be 2.
    assert ends("scale", x, scale_format="ue8m0", group_size=2) == ([1], [1], [2])


def test_a_subnormal_scale_may_be_flushed() -> None:
    low, value, _ = ends("scale", rows_of([448 * 2.0**-127]), group_size=1, scale_min=0.0)
    assert (low, value) == ([0], [2.0**-127])


def underflowing(dtype: Any) -> Any:
    """Rows of one group of 4: an infinite up beside a gate whose sigmoid is small, normal, or whose silu is small."""
    gate = np.array([[-89.0, 1, 1, 1], [-2000.0, 1, 1, 1], [-86.0, 1, 1, 1], [1e-39, 1, 1, 1], [0, 1, 1, 1]])
    up = np.tile([np.inf, 1, -2, 3], (len(gate), 1))
    return np.concatenate([gate, up], -1).astype(dtype)


@pytest.mark.parametrize("quant_dtype", ["float8_e4m3fn", "int8"])
def test_an_infinite_up_where_sigmoid_or_silu_may_count_as_zero(quant_dtype: str) -> None:
    found = exact(underflowing(np.float32), group_size=4, quant_dtype=quant_dtype)
    nan = 0.0 if quant_dtype == "int8" else np.nan

    def allowed(q: float, scale: float) -> list[bool]:
        """Per row, whether these are right for the finite elements and the scale."""
        qs = np.full((5, 4), q)
        qs[:, 0] = nan
        scales = np.full((5, 1), scale, np.float32)
        right = []
        for i in range(5):
            rows = {name: type(e)(e.value[i], e.low[i], e.high[i]) for name, e in found.items()}
            target = np.dtype(getattr(ml_dtypes, quant_dtype, quant_dtype))
            problems = (
                compare("q", qs[i].astype(target), rows["q"], quant_dtype),
                compare("scale", scales[i], rows["scale"], "float32"),
            )
            right.append(problems == (None, None))
        return right

    assert allowed(0.0, np.inf) == [True, True, True, True, False]
    assert allowed(nan, np.nan) == [True, True, False, True, True]
    assert allowed(0.0, 1.0) == [False] * 5


@pytest.mark.parametrize("name", ["numpy", "jax", "pallas", "torch", "triton"])
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_every_backend_takes_one_of_the_two(name: str, materialize: bool, scale_format: str) -> None:
    x = underflowing(ml_dtypes.bfloat16)
    options: Any = {"group_size": 4, "materialize": materialize, "scale_format": scale_format}
    backend = registry().get(name)
    with np.errstate(all="ignore"):
        got = polyfuse.silu_mul_block_quant(from_numpy(x, backend.family, "cpu"), backend=name, **options)
    dtypes = ("float8_e4m3fn", "float32" if scale_format == "float32" else "int32")
    for result, (output, want), dtype in zip(got, exact(x, **options).items(), dtypes, strict=True):
        assert compare(output, to_numpy(result), want, dtype) is None
