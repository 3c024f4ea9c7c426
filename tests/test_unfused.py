from inspect import signature
from itertools import product
from math import inf, nan
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

import polyfuse
from polyfuse.spec import FLOATS, OPS, SpecError
from polyfuse.spec.block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS
from polyfuse.torch_impl.silu_mul_block_quant import silu_mul_block_quant
from polyfuse.unfused import block_quant, silu_mul

QUANT_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "int8")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_rounds_silu_and_then_the_product(dtype: str) -> None:
    x = normal(5, 2 * 48, dtype=getattr(torch, dtype))
    gate, up = x.chunk(2, -1)
    y = silu_mul(x)
    assert y.dtype == x.dtype
    assert torch.equal(y, silu(gate) * up)


def test_silu_mul_clamps_gate_from_above_and_up_on_both_sides() -> None:
    gate, up = torch.tensor([-9.0, 9.0, 1.0, nan]), torch.tensor([9.0, -9.0, 0.5, 1.0])
    want = silu(torch.tensor([-9.0, 2.0, 1.0, nan])) * torch.tensor([2.0, -2.0, 0.5, 1.0])
    torch.testing.assert_close(silu_mul(torch.cat([gate, up])[None], limit=2)[0], want, equal_nan=True)


def test_block_quant_gives_what_its_formula_says() -> None:
    y = torch.tensor([[0.0, 0.0, 448.0, -1.0, 3.0, nan, inf, 1.0]])
    q, scale = block_quant(y, group_size=2, scale_min=0.25)
    assert q.float()[0, :4].tolist() == [0.0, 0.0, 448.0, -1.0]
    assert scale[0].tolist()[:2] == [0.25, 1.0]
    assert scale[0, 2].isnan()
    assert q.float()[0, 4:6].isnan().all()
    assert scale[0, 3] == inf
    assert q.float()[0, 6].isnan()
    assert q.float()[0, 7] == 0


def test_scale_min_0_keeps_the_scale_and_divides_by_1e_12_at_least() -> None:
    y = torch.tensor([[0.0, 0.0, 1e-11, -1e-10]])
    q, scale = block_quant(y, group_size=2, scale_min=0)
    assert torch.equal(scale, torch.tensor([[0.0, 1e-10]]) / torch.tensor(448.0))
    want = (torch.tensor([0.0, 0.0, 1e-11, -1e-10]) / 1e-12).to(torch.float8_e4m3fn)
    assert torch.equal(q.float()[0], want.float())


@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
def test_reciprocal_scales_are_products_with_the_rounded_reciprocal(quant_dtype: str) -> None:
    y, qmax = normal(64, 128), torch.tensor(QMAX[quant_dtype])
    amax = y.abs().amax(-1, keepdim=True)
    _, scale = block_quant(y, quant_dtype=quant_dtype, reciprocal=True)
    assert torch.equal(scale, amax * qmax.reciprocal())
    assert not torch.equal(scale, amax / qmax)


def test_a_reciprocal_product_decides_about_its_power_of_two() -> None:
    amax = torch.tensor([[127.0], [127.0]]).nextafter(torch.tensor([[0.0], [inf]]))
    for reciprocal, want in ((False, [1.0, 2.0]), (True, [1.0, 1.0])):
        _, scale = block_quant(amax, group_size=1, quant_dtype="int8", scale_format="ue8m0", reciprocal=reciprocal)
        assert scale.flatten().tolist() == want


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_layout", ["row_major", "col_major", "col_major_tma"])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0", "ue8m0_packed"])
def test_together_they_are_the_op(scale_format: str, scale_layout: str, dtype: str) -> None:
    x = normal(2, 3, 2 * 192, dtype=getattr(torch, dtype))
    for quant_dtype, reciprocal in product(QUANT_DTYPES, (False, True)):
        options: Any = {"scale_format": scale_format, "scale_layout": scale_layout, "quant_dtype": quant_dtype}
        options["reciprocal"] = reciprocal
        q, scale = block_quant(silu_mul(x), group_size=32, **options)
        want = silu_mul_block_quant(x, group_size=32, materialize=True, **options)
        assert torch.equal(q.view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scale, want[1])
        assert scale.stride() == want[1].stride()


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 32, "scale_format": "ue8m0", "scale_layout": "swizzled_128x4"},
        {"group_size": 16, "scale_format": "e4m3", "quant_dtype": "float4_e2m1"},
        {"group_size": 128},
    ],
    ids=["mxfp8", "nvfp4", "fewer_columns_in_the_last_group"],
)
def test_it_gives_what_the_op_gives_in_formats_of_others(options: dict[str, Any]) -> None:
    x = normal(5, 3 * 64)
    for got, want in zip(block_quant(x, **options), polyfuse.block_quant(x, **options, backend="torch"), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_a_compiled_call_checks_its_arguments_too() -> None:
    compiled = torch.compile(block_quant, backend="eager", fullgraph=True)
    for rows in (2, 3):
        y = normal(rows, 128)
        for got, want in zip(compiled(y, quant_dtype="int8"), block_quant(y, quant_dtype="int8"), strict=True):
            assert torch.equal(got, want)
    with pytest.raises(Exception, match="scale_layout: expected one of row_major"):
        compiled(normal(2, 128), scale_layout="rows")


def test_results_are_contiguous_whatever_their_input_is() -> None:
    assert all(result.is_contiguous() for result in block_quant(normal(256, 9).t(), group_size=64))


def test_quant_dtype_may_be_a_dtype() -> None:
    assert block_quant(normal(2, 128), quant_dtype=torch.int8)[0].dtype is torch.int8


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int32), {}, "x: expected dtype float32 or bfloat16 or float16, got int32"),
        (torch.zeros(2, 5), {}, r"x: expected an even last dimension, got \[2, 5\]"),
        (torch.zeros(()), {}, r"x: expected an even last dimension, got \[\]"),
        (torch.zeros(2, 4), {"limit": 0.0}, r"limit: expected a number > 0, got 0\.0"),
    ],
)
def test_silu_mul_refuses(x: torch.Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=f"^silu_mul: {message}$"):
        silu_mul(x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(2, 4).double()}, "x: expected dtype float32 or bfloat16 or float16, got float64"),
        ({"x": torch.zeros(4)}, "x: expected at least 2 dimensions, got 1"),
        ({"x": None}, "x: expected an array, got None"),
        ({"group_size": 0}, "group_size: expected an integer >= 1, got 0"),
        ({"quant_dtype": "int4"}, f"quant_dtype: expected one of {', '.join(QMAX)}, got 'int4'"),
        ({"scale_format": "e8"}, f"scale_format: expected one of {', '.join(SCALE_FORMATS)}, got 'e8'"),
        ({"scale_layout": "rows"}, f"scale_layout: expected one of {', '.join(SCALE_LAYOUTS)}, got 'rows'"),
        ({"scale_ub": -1.0}, r"scale_ub: expected a number > 0, got -1\.0"),
        ({"scale_min": 1e-40}, r"scale_min: expected 0 or a number from 2\*\*-126 to 2\*\*127, got 1e-40"),
        ({"scale_min": nan}, r"scale_min: expected 0 or a number from 2\*\*-126 to 2\*\*127, got nan"),
        (
            {"scale_min": 0.0, "scale_format": "ue8m0"},
            r"scale_min: expected a number > 0 with scale_format=ue8m0, got 0\.0",
        ),
    ],
)
def test_block_quant_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=f"^block_quant: {message}$"):
        block_quant(**{"x": torch.zeros(2, 4), "group_size": 2, **options})


def test_block_quant_takes_what_the_op_takes() -> None:
    attributes = {attr.name: attr.default for attr in OPS["block_quant"].attrs}
    del attributes["expert_alignment"], attributes["fill"]  # of experts, and of rows that are not valid
    parameters = signature(block_quant).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == attributes


def test_block_quant_compiles_with_numbers_that_change() -> None:
    """From the second value on torch.compile traces a number as a symbol."""
    compiled = torch.compile(block_quant, fullgraph=True, backend="eager")
    x = torch.linspace(-3, 3, 8 * 256).view(8, 256)
    for group_size in (128, 64, 32):
        for scale_min in (None, 0.0, 1e-12, 0.5):
            got = compiled(x, group_size=group_size, scale_min=scale_min)
            want = block_quant(x, group_size=group_size, scale_min=scale_min)
            assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
            assert torch.equal(got[1], want[1])
