"""`QuantizedActivation`: what it takes is what the ops' spec says, and what the ops give."""

from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.runtime import (
    QuantizedActivation,
    QuantizedFormat,
    block_quantized,
    rms_norm_block_quantized,
    silu_mul_block_quantized,
)

FORMATS = {
    "blocks": QuantizedFormat(),
    "col_major": QuantizedFormat(scale_layout="col_major"),
    "tma, packed": QuantizedFormat(scale_format="ue8m0_packed", scale_layout="col_major_tma"),
    "mxfp8": QuantizedFormat(group_size=32, scale_format="ue8m0", scale_layout="swizzled_128x4"),
    "nvfp4": QuantizedFormat(group_size=16, quant_dtype="float4_e2m1", scale_format="e4m3"),
    "int8": QuantizedFormat(quant_dtype="int8"),
}


def sample(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FORMATS)
def test_producers_give_what_the_ops_give(name: str) -> None:
    format, x, weight = FORMATS[name], sample(6, 512), sample(512)
    normed, total = rms_norm_block_quantized(x, weight, format, residual=x)
    ours = [block_quantized(x, format), silu_mul_block_quantized(x[:, :256], format, up=x[:, 256:]), normed]
    want = [
        polyfuse.block_quant(x, **format.options),
        polyfuse.silu_mul_block_quant(x, **format.options),
        polyfuse.rms_norm_block_quant(x, weight, residual=x, **format.options)[:2],
    ]
    for got, (values, scales) in zip(ours, want, strict=True):
        assert torch.equal(got.values.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(got.scales.double(), scales.double())
    assert [activation.shape for activation in ours] == [(6, 512), (6, 256), (6, 512)]
    assert torch.equal(total, x + x)


def test_rows_of_experts_have_scales_of_their_own() -> None:
    format = QuantizedFormat(scale_layout="col_major", per_expert=True)
    activation = block_quantized(sample(2, 5, 256), format, num_rows=torch.tensor([3, 5], dtype=torch.int32))
    assert activation.scales.stride() == (10, 1, 5)
    with pytest.raises(polyfuse.SpecError, match=r"scales: expected strides \[5, 1, 10\]"):
        QuantizedActivation(activation.values, activation.scales, QuantizedFormat(scale_layout="col_major"))


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
def test_taken_rows_are_those_of_the_rows_taken_before(layout: str) -> None:
    format, x, rows = QuantizedFormat(scale_layout=layout), sample(5, 384), torch.tensor([4, 0, 0, 2])
    got, want = block_quantized(x, format).take(rows), block_quantized(x[rows], format)
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scales, want.scales)
    assert got.scales.stride() == want.scales.stride()


def test_rows_of_other_layouts_cannot_be_taken() -> None:
    with pytest.raises(polyfuse.SpecError, match=r"self: expected \[T, D\] with scales row_major or col_major, got 2"):
        block_quantized(sample(4, 256), FORMATS["mxfp8"]).take(torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_dtype": "float8"}, "quant_dtype: expected one of float8_e4m3fn, "),
        ({"scale_format": "e8m0"}, "scale_format: expected one of float32, ue8m0"),
        ({"scale_layout": "columns"}, "scale_layout: expected one of row_major, "),
        ({"group_size": 0}, "group_size: expected an integer >= 1, got 0"),
        ({"scale_format": "e4m3"}, "quant_dtype: expected float4_e2m1 with scale_format=e4m3"),
        ({"scale_layout": "swizzled_128x4"}, "scale_format: expected ue8m0 or e4m3 with scale_layout=swizzled_128x4"),
    ],
)
def test_formats_that_the_spec_does_not_know(options: dict[str, Any], message: str) -> None:
    with pytest.raises(polyfuse.SpecError, match=message):
        QuantizedFormat(**options)


VALUES = torch.zeros(4, 256, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUES, torch.zeros(4, 3)), r"scales: expected shape \[4, 2\], got \[4, 3\]"),
        ((VALUES, torch.zeros(4, 2, dtype=torch.float16)), "scales: expected dtype float32, got float16"),
        ((VALUES, torch.zeros(2, 4).t()), r"scales: expected strides \[2, 1\], got \[1, 4\]"),
        ((VALUES.view(torch.int8), torch.zeros(4, 2)), "values: expected dtype float8_e4m3fn, got int8"),
        ((VALUES.t(), torch.zeros(256, 1)), r"values: expected strides \[4, 1\], got \[1, 256\]"),
        ((VALUES, torch.zeros(4, 2, device="meta")), "scales: expected an array on cpu, got meta"),
        ((VALUES[0], torch.zeros(2)), "values: expected 2 dimensions, got 1"),
        ((VALUES, None), "scales: expected a tensor, got NoneType"),
        ((VALUES, torch.zeros(4, 2), "row_major"), "format: expected a QuantizedFormat, got str"),
        ((VALUES, torch.zeros(4, 2), QuantizedFormat(), torch.ones(())), "global_scale: expected None without"),
    ],
)
def test_arrays_that_are_not_of_the_format(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(polyfuse.SpecError, match=f"^QuantizedActivation: {message}"):
        QuantizedActivation(*arguments)
