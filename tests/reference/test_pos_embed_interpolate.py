"""The oracle of `pos_embed_interpolate` on numbers that a reader can check with a pencil."""

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from polyfuse.reference import oracle
from polyfuse.spec import SpecError

pos_embed_interpolate = oracle("pos_embed_interpolate")

ULP = 2.0**-24  # one float32 rounding, as the spec counts them
FLUSH = 2.0**-126  # what a flushed number can change


def ramp(side: int, dtype: Any = np.float32, height: int | None = None) -> np.ndarray:
    """A table of one column whose cell (y, x) is 10 * y + x: interpolated, it reads back the source coordinates."""
    y, x = np.divmod(np.arange((height or side) * side), side)
    return (10 * y + x)[:, None].astype(dtype)


def impulse(side: int, cell: int) -> np.ndarray:
    """A table of one column that is 1 in one cell of its first row, and 0 elsewhere."""
    table = np.zeros((side * side, 1), np.float32)
    table[cell] = 1
    return table


def column(out: np.ndarray) -> list[float]:
    return out.astype(np.float64).reshape(-1).tolist()


def test_bilinear_with_aligned_corners() -> None:
    # Three positions on a side of 2: source = i * (2 - 1) / (3 - 1) = 0, 1/2, 1.
    out = pos_embed_interpolate(ramp(2), [[1, 3, 3]], merge_size=1)
    assert column(out) == [0, 0.5, 1, 5, 5.5, 6, 10, 10.5, 11]


def test_bilinear_with_half_pixels() -> None:
    # Four on a side of 2: source = ((2 * i + 1) * 2 - 4) / 8 = -1/4, 1/4, 3/4, 5/4, of which the outer two are moved to
    # the border; one row: ((2 * 0 + 1) * 2 - 1) / 2 = 1/2.
    out = pos_embed_interpolate(ramp(2), [[1, 1, 4]], merge_size=1, align_corners=False)
    assert column(out) == [5, 5.25, 5.75, 6]


def test_one_position_reads_the_first_cell_with_aligned_corners() -> None:
    assert column(pos_embed_interpolate(ramp(3), [[1, 1, 1]], merge_size=1)) == [0]


@pytest.mark.parametrize(
    ("cell", "want"),
    [
        # Seven positions on a side of 4: source = i / 2. Half-way, f = g = 1/2, the weights of the four taps are
        # -3/4 * 1/8 = -0.09375, 1/2 * (1 + 1/2 - 5/4 * 1/4) = 0.59375, and the same mirrored.
        (1, [0, 0.59375, 1, 0.59375, 0, -0.09375, 0]),
        # At the border the outer tap falls on the same cell: 0.59375 - 0.09375.
        (0, [1, 0.5, 0, -0.09375, 0, 0, 0]),
        (3, [0, 0, 0, -0.09375, 0, 0.5, 1]),
    ],
)
def test_bicubic(cell: int, want: Any) -> None:
    out = pos_embed_interpolate(impulse(4, cell), [[1, 1, 7]], merge_size=1, mode="bicubic")
    assert column(out) == want


def test_bicubic_with_half_pixels() -> None:
    # Two on a side of 4: source = ((2 * i + 1) * 4 - 2) / 4 = 1/2, 5/2; of both axes.
    out = pos_embed_interpolate(impulse(4, 0), [[1, 2, 2]], mode="bicubic", align_corners=False)
    near, far = 0.5, 0  # as at the border above; cell 0 is no tap of 5/2
    assert column(out) == [near * near, near * far, far * near, far * far]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("corners", [True, False])
def test_a_table_with_a_height_of_its_own(corners: bool, mode: str) -> None:
    # As many patches as cells: each patch reads its own cell.
    options: Any = {"merge_size": 1, "align_corners": corners, "mode": mode}
    table = ramp(4, height=2)
    want = [0, 1, 2, 3, 10, 11, 12, 13]
    assert column(pos_embed_interpolate(table, [[1, 2, 4]], table_height=2, **options)) == want
    with pytest.raises(SpecError, match="a square number of rows"):
        pos_embed_interpolate(table, [[1, 2, 4]], **options)


def test_each_axis_of_a_table_has_a_length_of_its_own() -> None:
    # Aligned: i * (2 - 1) / (3 - 1) down, and i * (4 - 1) / (3 - 1) = 0, 1.5, 3 across.
    table = ramp(4, height=2)
    out = pos_embed_interpolate(table, [[1, 3, 3]], merge_size=1, table_height=2)
    assert column(out) == [0, 1.5, 3, 5, 6.5, 8, 10, 11.5, 13]
    # Half a pixel: ((2 * i + 1) * 2 - 1) / 2 = 0.5 down, ((2 * i + 1) * 4 - 2) / 4 = 0.5 and 2.5 across.
    out = pos_embed_interpolate(table, [[1, 1, 2]], merge_size=1, table_height=2, align_corners=False)
    assert column(out) == [5.5, 7.5]


def test_a_table_of_one_row_and_one_of_one_column() -> None:
    line = np.array([[0], [2], [4]], np.float32)
    assert column(pos_embed_interpolate(line, [[1, 2, 5]], merge_size=1, table_height=1)) == [0, 1, 2, 3, 4] * 2
    assert column(pos_embed_interpolate(line, [[1, 5, 1]], merge_size=1, table_height=3)) == [0, 1, 2, 3, 4]


def test_the_height_tells_16_by_36_from_24_by_24() -> None:
    table = np.arange(16 * 36, dtype=np.float32)[:, None]
    corners = [0, 35, 15 * 36, 16 * 36 - 1]
    assert column(pos_embed_interpolate(table, [[1, 2, 2]], table_height=16)) == corners
    assert column(pos_embed_interpolate(table, [[1, 2, 2]])) == [0, 23, 23 * 24, 24 * 24 - 1]
    given = pos_embed_interpolate(table, [[1, 6, 4]], table_height=24)
    assert column(given) == column(pos_embed_interpolate(table, [[1, 6, 4]]))


@pytest.mark.parametrize(
    ("merge_size", "order"),
    [
        (1, [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]),
        (2, [0, 1, 10, 11, 2, 3, 12, 13, 20, 21, 30, 31, 22, 23, 32, 33]),
        (4, [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33]),
    ],
)
def test_rows_come_in_blocks_of_the_spatial_merge(merge_size: int, order: list[float]) -> None:
    assert column(pos_embed_interpolate(ramp(4), [[1, 4, 4]], merge_size=merge_size)) == order


@pytest.mark.parametrize("form", [tuple, np.int32, np.int64])
def test_images_one_after_the_other_and_equal_frames(form: Any) -> None:
    grid = ((2, 2, 2), (1, 2, 4))
    out = pos_embed_interpolate(ramp(4), grid if form is tuple else np.array(grid, form))
    # 2 x 2 are the corners; 2 x 4 the first and the last row of the table, in two blocks.
    assert column(out) == [0, 3, 30, 33, 0, 3, 30, 33, 0, 1, 30, 31, 2, 3, 32, 33]


def test_base_is_added_before_the_one_rounding() -> None:
    # The step of bfloat16 at 1 is 2**-7: 1 + 1/2 step is a tie, which goes to the even 1; 1 + 3/2 steps to 1 + 2 steps.
    table = np.ones((1, 1), ml_dtypes.bfloat16)
    base = np.array([[2.0**-8], [3 * 2.0**-8], [2.0**-8 + 2.0**-15], [-0.5]], ml_dtypes.bfloat16)
    out = pos_embed_interpolate(table, [[1, 2, 2]], base=base)
    assert out.dtype == ml_dtypes.bfloat16
    assert column(out) == [1, 1 + 2.0**-6, 1 + 2.0**-7, 0.5]


def test_the_interpolated_value_is_not_rounded_before_base_is_added() -> None:
    # Half-way between 1 and the next bfloat16 is a tie, which goes to 1; with a little more it goes up.
    table = np.array([[1], [1 + 2.0**-7]] * 2, ml_dtypes.bfloat16)
    base = np.array([[0], [2.0**-15], [0]], ml_dtypes.bfloat16)
    assert column(pos_embed_interpolate(table, [[1, 1, 3]], merge_size=1)) == [1, 1, 1 + 2.0**-7]
    assert column(pos_embed_interpolate(table, [[1, 1, 3]], merge_size=1, base=base)) == [1, 1 + 2.0**-7, 1 + 2.0**-7]


@pytest.mark.parametrize(
    ("table", "base", "out_dtype", "want"),
    [
        ("float16", None, None, "float16"),
        ("float16", "bfloat16", None, "bfloat16"),
        ("float16", "bfloat16", "float32", "float32"),
        ("float32", None, "float16", "float16"),
    ],
)
def test_the_dtype_of_the_result(table: str, base: str | None, out_dtype: str | None, want: Any) -> None:
    dtypes = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
    added = None if base is None else np.zeros((4, 1), dtypes[base])
    out = pos_embed_interpolate(ramp(2, dtypes[table]), [[1, 2, 2]], base=added, out_dtype=out_dtype)
    assert out.dtype == dtypes[want]
    assert column(out) == [0, 1, 10, 11]


def test_padding_rows_are_zero_whatever_base_holds_there() -> None:
    base = np.array([[1.0]] * 4 + [[np.nan]] * 2, np.float32)
    out = pos_embed_interpolate(ramp(2), [[1, 2, 2], [0, 0, 0]], base=base, out_rows=6)
    assert column(out) == [1, 2, 11, 12, 0, 0]


def test_a_tap_of_zero_weight_is_not_read() -> None:
    # The corners are cells themselves; in between, half of each neighbour is read.
    table = ramp(2)
    table[1] = np.nan
    np.testing.assert_array_equal(column(pos_embed_interpolate(table, [[1, 2, 2]])), [0, np.nan, 10, 11])
    table[1] = np.inf
    between = pos_embed_interpolate(table, [[1, 1, 3]], merge_size=1)
    assert column(between) == [0, np.inf, np.inf]


@pytest.mark.parametrize(
    ("grid", "rows"),
    [
        ([[1, 2, 2], [1, 2, 2]], 7),  # 8 rows do not fit
        ([[1, 2, 2], [1, 3, 2]], 12),  # 3 is not divisible by merge_size
        ([[1, 2, 2], [-1, 2, 2]], 12),
        ([[1, 2, 2], [0, 2, 2]], 12),  # an unused image is (0, 0, 0)
        ([[1, 2, 2**29]], 12),  # 2 * 2 * 2**29 is no int32
    ],
)
def test_an_invalid_grid_on_the_device_makes_every_element_nan(grid: list[list[int]], rows: int) -> None:
    out = pos_embed_interpolate(ramp(2), np.array(grid, np.int32), out_rows=rows)
    assert out.shape == (rows, 1)
    assert np.isnan(out).all()


def test_nothing_to_compute() -> None:
    assert pos_embed_interpolate(np.zeros((4, 0), np.float32), [[1, 2, 2]]).shape == (4, 0)
    assert pos_embed_interpolate(ramp(2), np.zeros((1, 3), np.int32), out_rows=0).shape == (0, 1)
    assert column(pos_embed_interpolate(ramp(2), np.zeros((2, 3), np.int32), out_rows=2)) == [0, 0]


def interval(*arguments: Any, **options: Any) -> tuple[list[float], list[float], list[float]]:
    """low, value, high."""
    exact = pos_embed_interpolate.intervals(*arguments, **options)["out"]
    return column(exact.low), column(exact.value), column(exact.high)


def test_the_interval_is_of_the_weights_along_each_axis() -> None:
    # Half-way between cells 2 and -1, in a row: (1 + 1/2) * (2 + 1) = 4.5 is the magnitude of 0.5, and of 10 roundings;
    # each of them, the value and base may flush a number.
    table = np.array([[2], [-1], [0], [0]], np.float32)
    low, value, high = interval(table, [[1, 1, 3]], merge_size=1)
    allowed = 10 * ULP * 4.5 + 12 * FLUSH
    assert value == [2, 0.5, -1]
    assert low == [2, 0.5 - allowed, -1]
    assert high == [2, 0.5 + allowed, -1]
    # base counts once, and a sum with it is rounded.
    base = np.array([[0.25]] * 3, np.float32)
    allowed = 10 * ULP * 4.75 + 12 * FLUSH
    assert interval(table, [[1, 1, 3]], merge_size=1, base=base)[2] == [2.25, 0.75 + allowed, -0.75]


def test_the_interval_of_bicubic() -> None:
    # Weights of -3/32 and 19/32 twice each, times 1 of the other axis: the sum over the taps of cells that are 1 is
    # 4 + 6/32 + 38/32 = 5.375, of 24 roundings.
    table = np.ones((16, 1), np.float32)
    low, value, high = interval(table, [[1, 1, 7]], merge_size=1, mode="bicubic")
    allowed = 24 * ULP * 5.375 + 26 * FLUSH
    assert value == [1] * 7
    assert high == [1, 1 + allowed, 1, 1 + allowed, 1, 1 + allowed, 1]
    assert low == [1, 1 - allowed, 1, 1 - allowed, 1, 1 - allowed, 1]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_grid_points_are_exact_unless_base_or_a_flush_says_otherwise(mode: str) -> None:
    steps, flushes = (10, 12) if mode == "bilinear" else (24, 26)
    table = np.array([[1], [2.0**-130], [3], [-3]], np.float32)
    base = np.array([[2.0**-30], [0], [0.5], [3]], np.float32)
    low, _, high = interval(table, [[1, 2, 2]], mode=mode)
    # A subnormal may be flushed: (1 + 1) * 2**-130 is its magnitude.
    of_subnormal = steps * ULP * 2 * 2.0**-130 + flushes * FLUSH
    assert high == [1, 2.0**-130 + of_subnormal, 3, -3]
    assert low == [1, 2.0**-130 - of_subnormal, 3, -3]
    # 1 + 2**-30 is no float32 number; 3.5 and 0 are.
    low, _, high = interval(table, [[1, 2, 2]], mode=mode, base=base)
    of_sum = steps * ULP * (2 + 2.0**-30) + flushes * FLUSH
    assert (high[0], high[2], high[3]) == (1 + 2.0**-30 + of_sum, 3.5, 0)
    assert (low[0], low[2], low[3]) == (1 + 2.0**-30 - of_sum, 3.5, 0)


def test_padding_may_be_off_by_a_flush_only() -> None:
    _, _, high = interval(ramp(2), [[1, 2, 2]], out_rows=5)
    assert high == [0, 1, 10, 11, 12 * FLUSH]


def test_infinity_and_nan_stand_for_themselves() -> None:
    table = np.array([[np.inf], [1], [np.nan], [1]], np.float32)
    for ends in interval(table, [[1, 3, 3]], merge_size=1):
        # In the middle row and column half of an infinity or NaN is read.
        np.testing.assert_array_equal(ends[:3], [np.inf, np.inf, 1])
        assert np.isnan(ends[6:8]).all()
        assert ends[8] == 1


def test_every_combination_of_options_gives_the_corners() -> None:
    corners = [0, 1, 10, 11]
    for mode, dtype, form in product(("bilinear", "bicubic"), (None, "bfloat16"), (tuple, np.array)):
        out = pos_embed_interpolate(ramp(2), form([(1, 2, 2)]), mode=mode, out_dtype=dtype)
        assert column(out) == corners
