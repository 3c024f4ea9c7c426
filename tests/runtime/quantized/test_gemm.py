"""GEMMs of quantised activations: their values, what they refuse, and where PyTorch has them."""

from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.runtime import (
    QuantizedActivation,
    QuantizedFormat,
    block_quantized,
    block_scaled_mm,
)
from polyfuse.runtime.quantized import gemm

FP8 = torch.float8_e4m3fn


def weights(*shape: int) -> tuple[Any, Any]:
    """A weight [..., N, K] with the scales of its blocks."""
    generator = torch.Generator().manual_seed(0)
    *lead, n, k = shape
    values = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(FP8)
    return values, torch.rand(*lead, n // 128, k // 128, generator=generator) * 1e-2


def activation(rows: int, columns: int, layout: str = "row_major") -> QuantizedActivation:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return block_quantized(x, QuantizedFormat(scale_layout=layout), scale_min=0.0)


def dequantised(values: Any, scales: Any, rows: int) -> Any:
    """Values in float64, each with the scale of its block of `rows` x 128."""
    return values.double() * scales.double().repeat_interleave(rows, -2).repeat_interleave(128, -1)


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
def test_the_product_is_that_of_the_dequantised(layout: str) -> None:
    """Two blocks: each is rounded once, once more by each scale and by the sum; 2^-22 of the magnitudes is above it."""
    quantized, (weight, scale) = activation(5, 256, layout), weights(384, 256)
    got = block_scaled_mm(quantized, weight, scale, torch.float32).double()
    x, w = dequantised(quantized.values, quantized.scales, 1), dequantised(weight, scale, 128)
    assert ((got - x @ w.t()).abs() <= x.abs() @ w.abs().t() * 2.0**-22).all()
    assert got.abs().amax() > 1


@pytest.mark.parametrize(
    ("format", "weight", "scale", "message"),
    [
        (QuantizedFormat(group_size=64), *weights(128, 256), "activation: expected a format of group_size=128"),
        (QuantizedFormat(quant_dtype="int8"), *weights(128, 256), "activation: expected a format of group_size=128"),
        (
            QuantizedFormat(scale_layout="col_major_tma"),
            *weights(128, 256),
            "activation: expected scales that are row_major or col_major, got col_major_tma",
        ),
        (QuantizedFormat(), *weights(128, 384), r"weight: expected float8_e4m3fn \[N, 256\], got float8_e4m3fn \[128"),
        (QuantizedFormat(), weights(128, 256)[0].float(), torch.ones(1, 2), "weight: expected float8_e4m3fn"),
        (QuantizedFormat(), weights(128, 256)[0][:64], torch.ones(1, 2), "weight: expected multiples of 128"),
        (QuantizedFormat(), weights(128, 256)[0], torch.ones(2, 1), r"weight_scale: expected float32 \[1, 2\]"),
    ],
)
def test_what_is_refused(format: QuantizedFormat, weight: Any, scale: Any, message: str) -> None:
    with pytest.raises(polyfuse.SpecError, match=f"block_scaled_mm: {message}"):
        block_scaled_mm(block_quantized(torch.ones(4, 256), format), weight, scale, torch.bfloat16)


@pytest.mark.parametrize("columns", [128, 512])
@pytest.mark.parametrize(("skipped", "copied"), [(2, True), (4, False)])
def test_cublaslt_is_given_no_view_that_begins_in_between(
    columns: int, skipped: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two multiples of 16 bytes, as the scales of an expert's rows do."""
    given: list[Any] = []
    monkeypatch.setattr(gemm, "scaled_mm", lambda *arrays, **_: given.extend(x for x in arrays if torch.is_tensor(x)))
    real, blocks = activation(70, columns), columns // 128
    values, scale = (array.to("meta") for array in (real.values, real.scales))
    weight = torch.empty(384 * columns + skipped * 4, dtype=FP8, device="meta")[skipped * 4 :].view(384, columns)
    weight_scale = torch.empty(3 * blocks + skipped, device="meta")[skipped:].view(3, blocks)
    gemm.product(values[skipped:], scale[skipped:], weight, weight_scale, torch.bfloat16)
    shapes = [[70 - skipped, columns], [columns, 384], [70 - skipped, blocks], [4, 3]]
    assert [list(x.shape) for x in given] == shapes
    begins = [
        skipped * columns,
        0 if copied else 16,
        0 if copied or blocks > 1 else 4,
        0 if copied or blocks == 1 else 4,
    ]
    assert [x.storage_offset() for x in given] == begins


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
@pytest.mark.parametrize(("rows", "columns"), [(4, 128), (12, 512), (8, 640)])
def test_scaled_mm_takes_these_layouts(rows: int, columns: int, layout: str) -> None:
    """PyTorch's own checks of shapes and strides, on tensors without data."""
    real = activation(rows, columns, layout)
    quantized = QuantizedActivation(real.values.to("meta"), real.scales.to("meta"), real.format)
    weight, scale = (array.to("meta") for array in weights(256, columns))
    out = block_scaled_mm(quantized, weight, scale, torch.bfloat16)
    assert (out.shape, out.dtype) == ((rows, 256), torch.bfloat16)


@pytest.mark.parametrize(
    ("cuda", "capability", "expected"),
    [("13.0", (9, 0), True), ("12.9", (9, 0), True), ("12.8", (9, 0), False), ("13.0", (10, 0), False)],
)
def test_only_hopper_has_these_scales(
    cuda: str, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_scaled_mm = gemm._has_scaled_mm.__wrapped__
    assert has_scaled_mm(torch.device("cuda")) is expected
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not has_scaled_mm(torch.device("cuda"))
