"""The validator's messages: the argument, what was expected, what was got."""

import re

import numpy as np
import pytest

from polyfuse.conformance import cases
from polyfuse.spec import OPS, Capability, Deferral, Output, SpecError, bind

SPEC = OPS["pos_embed_interpolate"]
TABLE = np.zeros((36, 8), np.float32)
DEFAULTS = {a.name: a.default for a in SPEC.attrs} | {"base": None}


def call(**changes):
    return bind(SPEC, DEFAULTS | {"table": TABLE, "grid_thw": [[1, 2, 4]]} | changes)


def test_binds_dims_attributes_and_outputs():
    bound = call(base=np.zeros((8, 8), np.float16))
    assert dict(bound.dims) == {"N": 6, "D": 8, "I": 1, "rows": 8}
    assert call(table_height=4).dims["N"] == 9
    assert SPEC.cost(call(table_height=4, grid_thw=[[1, 64, 64]])).bytes_read == 36 * 8 * 4
    assert bound.outputs == (Output("out", (8, 8), "float16"),)
    assert bound.host == {"grid_thw": ((1, 2, 4),)}


def test_a_dtype_attribute_takes_a_name_or_a_dtype():
    assert call(out_dtype=np.dtype("float16")).outputs[0].dtype == "float16"
    assert call(out_dtype=np.float16).outputs[0].dtype == "float16"
    assert call(out_dtype="bfloat16").outputs[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid_thw": []}, "grid_thw: expected at least one row, got []"),
        ({"grid_thw": [[1, 3, 4]]}, "grid_thw[0]: expected h and w divisible by merge_size=2, got [1, 3, 4]"),
        ({"grid_thw": [[1, 2, 2], [1, -2, 2]]}, "grid_thw[1]: expected t, h, w >= 1, got [1, -2, 2]"),
        ({"grid_thw": [[0, 0, 0]]}, "grid_thw[0]: expected t, h, w >= 1, got [0, 0, 0]"),
        ({"grid_thw": [[1, 2]]}, "grid_thw[0]: expected 3 integers, got [1, 2]"),
        ({"grid_thw": [[1, 2, 2.0]]}, "grid_thw[0]: expected 3 integers, got [1, 2, 2.0]"),
        ({"grid_thw": 5}, "grid_thw: expected rows of 3 integers, got 5"),
        ({"grid_thw": np.zeros((1, 3), np.float32)}, "grid_thw: expected dtype int32 or int64, got float32"),
        ({"grid_thw": np.zeros((1, 4), np.int64)}, "grid_thw: expected shape [I, 3], got [1, 4]"),
        ({"grid_thw": [[1, 2, 2**30]]}, "grid_thw[0]: expected 2*max(NH, N)*max(h, w) below 2**31 with max(NH, N)=6"),
        (
            {"grid_thw": [[1, 2, 2**26]], "table_height": 36},
            "grid_thw[0]: expected 2*max(NH, N)*max(h, w) below 2**31 with max(NH, N)=36",
        ),
        ({"table": None}, "table: expected an array, got None"),
        ({"table": 3}, "table: expected an array, got int"),
        ({"table": np.zeros((35, 8), np.float32)}, "table: expected a square number of rows in [N*N, D], got 35"),
        (
            {"table_height": 5},
            "table: expected a size divisible by table_height=5 in [table_height*N, D], got 36",
        ),
        ({"table": np.zeros((0, 8), np.float32)}, "table: expected at least one row, got [0, D]"),
        ({"table": np.zeros((0, 8), np.float32), "table_height": 2}, "table: expected at least one row, got [0, D]"),
        ({"table_height": 0}, "table_height: expected an integer >= 1, got 0"),
        ({"table_height": 6.0}, "table_height: expected an integer, got 6.0"),
        ({"table": np.zeros(36, np.float32)}, "table: expected shape [N*N, D], got [36]"),
        ({"table": np.zeros((36, 8))}, "table: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"base": np.zeros((9, 8), np.float32)}, "base: expected rows=8 in [rows, D], got [9, 8]"),
        ({"base": np.zeros((8, 9), np.float32)}, "base: expected D=8 in [rows, D], got [8, 9]"),
        ({"mode": "cubic"}, "mode: expected one of bilinear, bicubic, got 'cubic'"),
        ({"align_corners": 1}, "align_corners: expected True or False, got 1"),
        ({"merge_size": 0}, "merge_size: expected an integer >= 1, got 0"),
        ({"merge_size": 2.0}, "merge_size: expected an integer, got 2.0"),
        ({"merge_size": None}, "merge_size: expected a value (default 2), got None"),
        ({"out_dtype": "int8"}, "out_dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"out_rows": 7}, "out_rows: expected at least the 8 rows of grid_thw, got 7"),
        ({"out_rows": -1}, "out_rows: expected an integer >= 0, got -1"),
    ],
)
def test_bad_calls(changes, message):
    with pytest.raises(SpecError, match=re.escape("pos_embed_interpolate: " + message)):
        call(**changes)


def test_a_grid_tensor_with_out_rows_is_not_read():
    grid = np.array([[1, 3, 3]])
    assert call(grid_thw=grid, out_rows=16).host == {}
    with pytest.raises(SpecError, match="divisible"):
        call(grid_thw=grid)


def test_without_reading_the_host_a_dependent_size_is_unknown():
    bound = bind(SPEC, DEFAULTS | {"table": TABLE, "grid_thw": np.array([[1, 2, 2]])}, read_host=False)
    assert bound.outputs == (Output("out", (None, 8), "float32"),)


@pytest.mark.parametrize("op", OPS)
def test_every_spec_is_complete(op):
    spec = OPS[op]
    assert spec.formula
    assert spec.source
    assert spec.summary.endswith(".")
    assert {o.name for o in spec.outputs} <= {e.value for e in spec.errors}
    assert all(e.reason for e in spec.errors)
    names = [c.name for c in cases(spec.name)]
    assert len(names) == len(set(names))
    for attr in spec.attrs:
        if attr.values:
            used = {c.attrs.get(attr.name, attr.default) for c in cases(spec.name)}
            assert used >= set(attr.values), f"no case of {op} uses {attr.name} {set(attr.values) - used}"


@pytest.mark.parametrize(
    ("capability", "mistake"),
    [
        (Capability(attrs={"stratgy": ("auto",)}), "attrs: expected one of strategy, got 'stratgy'"),
        (
            Capability(attrs={"strategy": "auto"}),  # type: ignore[dict-item]
            "attrs['strategy']: expected a tuple of values, got 'auto'",
        ),
        (
            Capability(attrs={"strategy": ("sequental",)}),
            "attrs['strategy']: expected values of 'auto', 'sequential', 'parallel', 'merged', 'fused', "
            "got 'sequental'",
        ),
        (
            Capability(dtypes={"x": ("fp32",)}),
            "dtypes['x']: expected values of 'float32', 'bfloat16', 'float16', got 'fp32'",
        ),
        (Capability(multiples={"D": 128}), "multiples: expected one of M1, M2, N1, N2, NA, NZ, hidden, got 'D'"),
        (Capability(ranges={"dim": (16, 128)}), "ranges: expected one of M1, M2, N1, N2, NA, NZ, hidden, got 'dim'"),
        (
            Capability(defers=(Deferral("cuda", "slow", multiples={"dim": 32}),)),
            "defers: expected one of M1, M2, N1, N2, NA, NZ, hidden, got 'dim'",
        ),
        (Capability(devices="cpu"), "devices: expected a tuple of device kinds, got 'cpu'"),
        (Capability(host_reads="x"), "host_reads: expected a tuple of arrays, got 'x'"),
        (
            Capability(host_reads=("x", "strategy")),
            "host_reads: expected arrays of x, w_qkvz, w_ba, w_z, w_a, bias_qkvz, bias_ba, got 'strategy'",
        ),
    ],
)
def test_a_capability_speaks_of_its_op(capability, mistake):
    assert capability.mistakes(OPS["gdn_in_proj"]) == [mistake]
    right = Capability(
        attrs={"strategy": ("auto",)},
        multiples={"hidden": 8},
        ranges={"N1": (1, 64)},
        defers=(Deferral("cuda", "slow", multiples={"N2": 2}),),
        host_reads=("x",),
    )
    assert right.mistakes(OPS["gdn_in_proj"]) == []


def projection(hidden=8, small=4):
    arrays = {"x": (3, hidden), "w_qkvz": (6, hidden), "w_ba": (small, hidden)}
    values = {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}
    return bind(OPS["gdn_in_proj"], OPS["gdn_in_proj"].parameters | values)


def test_a_range_claims_its_ends_and_nothing_beyond():
    capability = Capability(ranges={"hidden": (8, 16)})
    refusals = {size: capability.refusal(projection(hidden=size), "cpu") for size in (7, 8, 16, 17)}
    assert refusals == {7: "hidden=7: must be 8 to 16", 8: None, 16: None, 17: "hidden=17: must be 8 to 16"}


def test_a_deferral_concerns_calls_that_meet_all_of_it():
    capability = Capability(defers=(Deferral("cuda", "another is faster", multiples={"N2": 4, "hidden": 8}),))
    assert capability.deferral(projection(), "cuda") == "another is faster"
    assert capability.deferral(projection(), "cpu") is None
    assert capability.deferral(projection(small=6), "cuda") is None
    assert capability.deferral(projection(hidden=12), "cuda") is None
    assert capability.refusal(projection(), "cuda") is None  # it is claimed all the same
