"""Formats as others define them, written out here, against what the torch backends give."""

from collections.abc import Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

import polyfuse
from polyfuse.dispatch import to_numpy

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = ["torch", "triton"]
FLOAT4 = torch.float4_e2m1fn_x2
POWERS_OF_TWO = [
    *product(["ue8m0", "ue8m0_packed"], ["row_major", "col_major", "col_major_tma"]),
    ("ue8m0", "swizzled_128x4"),
]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def amax_of_every_binade() -> Any:
    """From 2**-118 to 2**120: each power of two, the same times 1.75, as 448 is, what is next to both, and others."""
    powers = np.ldexp(np.float32(1), np.arange(-118, 121)).astype(np.float32)
    edges = np.concatenate([powers, np.float32(1.75) * powers])
    sides = [np.nextafter(edges, np.float32(end)) for end in (0, np.inf)]
    between = powers[:, None] * np.random.default_rng(1).uniform(1, 2, (len(powers), 4)).astype(np.float32)
    amax = np.concatenate([edges, *sides, between.ravel()])
    return amax[(amax >= 2.0**-118) & (amax <= 2.0**120)]


def blocks_of(amax: Any) -> Any:
    """A block of 32 numbers for each of these largest magnitudes, which have either sign."""
    rng = np.random.default_rng(2)
    parts = rng.uniform(-1, 1, (len(amax), 32)).astype(np.float32)
    parts[np.arange(len(amax)), rng.integers(0, 32, len(amax))] = rng.choice([-1, 1], len(amax))
    return parts * amax[:, None]


def mxfp8(x: Any) -> tuple[Any, Any]:
    """Numbers and exponent bytes [T, G] of blocks of 32, with exponents rounded up."""
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    exponent = np.ceil(np.log2(np.abs(blocks).max(-1) / 448))
    ratio = blocks / np.exp2(exponent)[..., None]
    return ratio.astype(ml_dtypes.float8_e4m3fn).reshape(x.shape), (exponent + 127).astype(np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mxfp8_is_that_of_rounding_exponents_up(backend: str) -> None:
    x = blocks_of(amax_of_every_binade())
    want_q, want = mxfp8(x)
    q, scale = polyfuse.block_quant(
        torch.from_numpy(x), group_size=32, scale_format="ue8m0_packed", fill=1.0, backend=backend
    )
    got = to_numpy(scale).view(np.uint8).reshape(-1, 4)
    np.testing.assert_array_equal(got[:, :1], want)
    assert (got[:, 1:] == 127).all()
    np.testing.assert_array_equal(to_numpy(q).view(np.uint8), want_q.view(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["row_major", "swizzled_128x4"])
@pytest.mark.parametrize(("quant_dtype", "qmax"), [("float8_e4m3fn", 448), ("float4_e2m1", 6)])
def test_microscaling_formats_are_those_of_torchao(quant_dtype: str, qmax: int, layout: str, backend: str) -> None:
    """In its mode RCEIL, which takes a logarithm in float32 where there is no instruction for the exponent.

    The logarithm of what lies less than 2**-18 above a power of two may round to that power's: such blocks, which it
    would saturate, are left out.
    """
    amax = amax_of_every_binade()
    mantissa = np.frexp(amax.astype(np.float64) / qmax)[0] * 2
    x = torch.from_numpy(blocks_of(amax[(mantissa == 1) | (mantissa > 1 + 2.0**-18)]))
    assert len(x) > 1900
    swizzled = layout == "swizzled_128x4"
    dtype = torch.float8_e4m3fn if quant_dtype == "float8_e4m3fn" else FLOAT4
    want_scale, want_q = to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL, is_swizzled_scales=swizzled)
    q, scale = polyfuse.block_quant(
        x, group_size=32, quant_dtype=quant_dtype, scale_format="ue8m0", scale_layout=layout, backend=backend
    )
    exponents = scale if swizzled else scale.to(torch.float8_e8m0fnu).view(torch.uint8)
    assert torch.equal(exponents.flatten(), want_scale.view(torch.uint8).flatten())
    assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "quant_dtype"), [(torch.float8_e4m3fn, "float8_e4m3fn"), (FLOAT4, "float4_e2m1")])
def test_every_amax_of_bfloat16_is_as_in_torchao(dtype: torch.dtype, quant_dtype: str) -> None:
    """From 2**-118 on, and with the product that a GPU computes for the division.

    An exact quotient is a power of two or 2**-8 away from one at least: no logarithm in float32 mistakes it.
    """
    amax = torch.arange(0x0480, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    assert (amax[0], len(amax)) == (2.0**-118, 31488)
    x = (torch.rand(len(amax), 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).double()
    x = (x * amax.double()[:, None]).bfloat16()
    x[:, 5] = -amax
    want_scale, want_q = to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL)
    for reciprocal in (False, True):
        q, scale = polyfuse.block_quant(
            x, group_size=32, quant_dtype=quant_dtype, scale_format="ue8m0", reciprocal=reciprocal, backend="torch"
        )
        assert torch.equal(scale.to(torch.float8_e8m0fnu).view(torch.uint8), want_scale.view(torch.uint8))
        assert torch.equal(q.view(torch.uint8), want_q.view(torch.uint8))


def nvfp4(x: Any, global_scale: float) -> tuple[Any, Any]:
    """Bytes and scales by the nearest of the fifteen numbers, the one of an even code where two are as near."""
    groups = x.astype(np.float64).reshape(len(x), -1, 16)
    scale = np.minimum(np.abs(groups).max(-1) / (6 * global_scale), 448).astype(ml_dtypes.float8_e4m3fn)
    divisor = scale.astype(np.float64) * global_scale
    ratio = np.where(divisor[..., None] == 0, 0, groups / np.where(divisor == 0, 1, divisor)[..., None])
    distance = np.abs(np.abs(np.clip(ratio, -6, 6))[..., None] - np.array(E2M1))
    code = np.argmin(distance + 1e-9 * (np.arange(8) % 2), axis=-1) + 8 * np.signbit(ratio)
    code = code.reshape(x.shape)
    return (code[:, 0::2] + 16 * code[:, 1::2]).astype(np.uint8), scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["row_major", "swizzled_128x4"])
def test_nvfp4_is_that_of_an_independent_packer(layout: str, backend: str) -> None:
    """Also where a scale is the largest, subnormal or 0, and in the middle between two numbers."""
    x, global_scale = 10 * normal(130, 80), 2.0**-5
    x[1] *= 1000
    x[2], x[3], x[4] = x[2] / 2**14, x[3] / 2**20, 0
    x[5:7] = np.random.default_rng(3).integers(-24, 25, (2, 80)) / 4
    x[5:7, ::16] = 6
    want_q, want_scale = nvfp4(x, global_scale)
    numbers = want_scale.astype(np.float64)
    assert (numbers[1] == 448).all()
    assert ((numbers[2] > 0) & (numbers[2] < 2.0**-6)).all()
    assert not numbers[3:5].any()
    q, scale = polyfuse.block_quant(
        torch.from_numpy(x),
        group_size=16,
        quant_dtype="float4_e2m1",
        scale_format="e4m3",
        scale_layout=layout,
        global_scale=torch.tensor(global_scale),
        backend=backend,
    )
    np.testing.assert_array_equal(to_numpy(q), want_q)
    got = to_numpy(scale).view(np.uint8)
    if layout == "row_major":
        np.testing.assert_array_equal(got, want_scale.view(np.uint8))
        return
    assert got.shape == (256, 8)
    memory, used = got.ravel(), set()
    for r in range(130):
        for c in range(5):
            place = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
            assert memory[place] == want_scale.view(np.uint8)[r, c]
            used.add(place)
    assert not memory[[i for i in range(memory.size) if i not in used]].any()


@pytest.mark.parametrize("factor", [None, 2.0**-9])
def test_nvfp4_is_nearly_that_of_torchao(factor: float | None) -> None:
    """Which multiplies by a reciprocal, so that ties go otherwise. A factor of None is amax / 2688."""
    x = torch.from_numpy(normal(512, 2048) * np.exp(normal(512, 1))).bfloat16()
    global_scale = x.abs().amax().float() / 2688 if factor is None else torch.tensor(factor)
    want_scale, want_q = nvfp4_quantize(x, 16, global_scale)
    q, scale = polyfuse.block_quant(
        x,
        group_size=16,
        quant_dtype="float4_e2m1",
        scale_format="e4m3",
        global_scale=global_scale,
        backend="torch",
    )
    assert torch.equal(scale.float(), want_scale.float())
    codes, want_codes = (torch.stack([pairs & 15, pairs >> 4]).int() for pairs in (q, want_q))
    distance = (codes - want_codes).abs()
    assert distance.max() == 1
    assert 1e-4 < distance.float().mean() < 2e-3


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Every element that was allocated."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale_format", "layout"), POWERS_OF_TWO)
@pytest.mark.parametrize("experts", ["num_rows", "expert_ends"])
@pytest.mark.parametrize("op", ["block_quant", "silu_mul_block_quant"])
def test_every_stored_scale_is_a_power_of_two(
    op: str, experts: str, scale_format: str, layout: str, backend: str
) -> None:
    """On the whole buffer: rows of no expert, what pads columns to 16 bytes, and bytes behind the last group."""
    shape, rows = ((3, 5, 320), [2, 0, 9]) if experts == "num_rows" else ((13, 320), [2, 4, 9])
    options: Any = {experts: torch.tensor(rows, dtype=torch.int32)}
    options |= {"expert_alignment": 4} if experts == "expert_ends" else {}
    _, scale = getattr(polyfuse, op)(
        torch.from_numpy(normal(*shape)),
        group_size=32,
        scale_format=scale_format,
        scale_layout=layout,
        fill=2.0**-10,
        backend=backend,
        **options,
    )
    stored = memory_of(scale)
    if stored.dtype == torch.float32:
        bits = stored.view(torch.int32)
        assert not (bits & 0x7FFFFF).any()
        exponent = bits >> 23
    else:
        exponent = stored.view(torch.uint8)
    assert ((exponent >= 1) & (exponent <= 254)).all()
    assert (exponent == 117).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpt_oss_is_its_pytorch_form(dtype: torch.dtype, backend: str) -> None:
    """The clamped SwiGLU of interleaved columns as the model writes it, then quantised by what is written above."""
    x = torch.from_numpy(6 * normal(9, 192)).to(dtype)
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    y = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    assert (x[..., ::2] > 7).any()
    assert (x[..., 1::2].abs() > 7).any()
    want_q, want_scale = mxfp8(y.float().numpy())
    q, scale = polyfuse.silu_mul_block_quant(
        x,
        interleaved=True,
        alpha=1.702,
        up_offset=1.0,
        limit=7.0,
        materialize=True,
        group_size=32,
        scale_format="ue8m0",
        backend=backend,
    )
    np.testing.assert_array_equal(to_numpy(q).view(np.uint8), want_q.view(np.uint8))
    np.testing.assert_array_equal(to_numpy(scale), np.exp2(want_scale.astype(np.float32) - 127))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", [300, 1500])
def test_thousands_of_empty_experts(empty: int, backend: str) -> None:
    """Two experts with rows far apart, others without, as masked rows and as rows behind one another."""
    x = torch.from_numpy(normal(empty, 2, 32))
    counts = torch.zeros(empty, dtype=torch.int32)
    counts[7], counts[-3] = 2, 1
    q, scale = polyfuse.block_quant(x, num_rows=counts, group_size=32, backend=backend)
    ends = counts.cumsum(0).int()
    rows = torch.cat([x[7], x[-3, :1], torch.full((2, 32), torch.nan)])
    behind = polyfuse.block_quant(rows, expert_ends=ends, group_size=32, backend=backend)
    want = polyfuse.block_quant(rows[:3], group_size=32, backend="torch")
    pairs: list[tuple[Callable[[Any], Any], Any]] = [
        (lambda t: torch.cat([t[7], t[-3, :1]]), (q, scale)),
        (lambda t: t[:3], behind),
    ]
    for rows_of, found in pairs:
        for one, other in zip(found, want, strict=True):
            assert torch.equal(rows_of(one).float(), other.float())
