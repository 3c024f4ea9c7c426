"""Every way of writing the op, in all group sizes, dtypes, formats and layouts: matched, and equal to the bit."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from polyfuse.spec.block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS
from polyfuse.unfused import block_quant, silu_mul
from tests.runtime.fusion.graphs import (
    DEVICE,
    DTYPES,
    D,
    Outputs,
    assert_same_bits,
    by,
    in_format,
    in_layout,
    power_of_two_above,
    rewrite,
    rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


HALVES: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.chunk(2, -1),
    lambda x: (x[..., :D], x[..., D:]),
    lambda x: x.split(D, -1),
]


def plain(
    x: torch.Tensor, halve: Any, group: int, quant_dtype: str, form: str, layout: str
) -> tuple[torch.Tensor, ...]:
    gate, up = halve(x)
    return in_format(silu(gate) * up, group, quant_dtype, form, layout)


def library(
    x: torch.Tensor, halve: Any, group: int, quant_dtype: str, form: str, layout: str
) -> tuple[torch.Tensor, ...]:
    return block_quant(silu_mul(x), group_size=group, quant_dtype=quant_dtype, scale_format=form, scale_layout=layout)


def transformers(x: torch.Tensor, halve: Any, group: int, _: str, form: str, layout: str) -> tuple[torch.Tensor, ...]:
    """An MLP's activation, and then the quantisation of an FP8 linear layer's input."""
    gate, up = halve(x)
    y = (silu(gate) * up).float().view(*x.shape[:-1], -1, group)
    amax = y.abs().amax(-1)
    scale = amax / by(amax, 448.0)
    q = (y / scale.clamp(min=1e-12).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return q.view(*x.shape[:-1], D), in_layout(scale, layout)


@pytest.mark.parametrize(
    "dtype", [dtype if dtype is torch.bfloat16 else pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES]
)
@pytest.mark.parametrize(
    ("source", "forms"),
    [
        (plain, SCALE_FORMATS[:3]),
        (library, SCALE_FORMATS[:1]),
        pytest.param(library, SCALE_FORMATS[1:3], marks=pytest.mark.slow),
        (transformers, SCALE_FORMATS[:1]),
    ],
)
def test_every_pattern_is_matched_and_changes_no_bit(source: Any, forms: tuple[str, ...], dtype: torch.dtype) -> None:
    """Every group size, layout and format, with halvings, ranks and quantised dtypes in turn, in one graph."""
    table = list(product((32, 64, 128, D), SCALE_LAYOUTS[:3], forms))
    heads = [
        (
            rows(*((5,), (2, 3))[i % 2], dtype=dtype),
            HALVES[(i + i // 3) % 3],
            group,
            list(QMAX)[i // 2 % 4],
            form,
            layout,
        )
        for i, (group, layout, form) in enumerate(table)
    ]

    def graph(*inputs: torch.Tensor) -> Outputs:
        return [source(x, *rest) for x, (_, *rest) in zip(inputs, heads, strict=True)]

    inputs = [x for x, *_ in heads]
    want = graph(*inputs)
    got = rewrite(graph, *inputs)
    assert got.reasons == []
    assert len(got.placed) == len(table) == 12 * len(forms)
    for (group, layout, form), placed, one, other in zip(table, got.placed, got.outputs, want, strict=True):
        assert_same_bits(one, other)
        found = [placed.get(name, default) for name, default in (("group_size", 128), ("scale_format", "float32"))]
        assert found == [group, form]
        assert placed["dtype"] == str(dtype)
        columns = D // group if form != "ue8m0_packed" else -(-D // group // 4)
        layouts = {layout, "row_major"} if columns == 1 else {layout}  # in memory one column is as one row
        assert placed.get("scale_layout", "row_major") in layouts
        assert placed.get("scale_min") == {plain: float(torch.tensor(1e-10)), transformers: 0.0}.get(source)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS[:3])
def test_the_library_with_reciprocal_is_matched(scale_format: str) -> None:
    def function(x: torch.Tensor) -> Outputs:
        y = silu_mul(x)
        return [block_quant(y, quant_dtype=name, scale_format=scale_format, reciprocal=True) for name in list(QMAX)[:4]]

    x = rows(6)
    got = rewrite(function, x)
    assert [(placed.get("quant_dtype", "float8_e4m3fn"), placed["reciprocal"]) for placed in got.placed] == [
        (name, True) for name in list(QMAX)[:4]
    ]
    for one, other in zip(got.outputs, function(x), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", sorted({*list(QMAX.values())[:4]}))
def test_the_logarithm_of_a_16_bit_amax_gives_its_power_of_two(divisor: float, dtype: torch.dtype) -> None:
    """What the pass relies on, at every positive amax."""
    amax = torch.arange(1, 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    amax = amax[amax.isfinite()].float()
    number = torch.full_like(amax, divisor)
    for scale in (amax / number, amax.clamp(min=1e-4) / number, amax * (1 / divisor)):
        scale = scale[scale >= 2.0**-126]
        assert torch.equal(power_of_two_above(scale, exact=False), power_of_two_above(scale, exact=True))
