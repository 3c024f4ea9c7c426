"""Formats as others define them, written out here, against what the torch backends give."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import polyfuse
from polyfuse.dispatch import to_numpy

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = ["torch", "triton"]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mxfp8_is_that_of_rounding_exponents_up(backend: str) -> None:
    """For amax from 2**-118 to 2**120, each a power of two, the number on either side, and one in between."""
    powers = np.ldexp(np.float32(1), np.arange(-118, 121)).astype(np.float32)
    sides = [np.nextafter(powers, np.float32(end)) for end in (0, np.inf)]
    edges = [np.minimum(np.float32(1.75) * powers, np.float32(2.0**120))]  # 448 is 1.75 * 2**8
    amax = np.concatenate([powers, *sides, *edges]).astype(np.float32)
    x = (np.linspace(-1, 1, 32, dtype=np.float32) * amax[:, None]).astype(np.float32)
    exponent = np.ceil(np.log2(np.abs(x).max(-1).astype(np.float64) / 448))
    want = (np.clip(exponent, -127, 127) + 127).astype(np.uint8)
    q, scale = polyfuse.block_quant(
        torch.from_numpy(x), group_size=32, scale_format="ue8m0_packed", fill=1.0, backend=backend
    )
    got = to_numpy(scale).view(np.uint8).reshape(-1, 4)
    np.testing.assert_array_equal(got[:, 0], want)
    assert (got[:, 1:] == 127).all()
    ratio = x.astype(np.float64) / np.exp2(exponent)[:, None]
    np.testing.assert_array_equal(to_numpy(q).view(np.uint8), ratio.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


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
    x, global_scale = 10 * normal(130, 80), 2.0**-5
    want_q, want_scale = nvfp4(x, global_scale)
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


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Every element that was allocated."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["row_major", "col_major", "col_major_tma"])
@pytest.mark.parametrize("scale_format", ["ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("experts", ["num_rows", "expert_ends"])
def test_every_stored_scale_is_a_power_of_two(experts: str, scale_format: str, layout: str, backend: str) -> None:
    """On the whole buffer: rows of no expert, what pads columns to 16 bytes, and bytes behind the last group."""
    shape, rows = ((3, 5, 160), [2, 0, 9]) if experts == "num_rows" else ((13, 160), [2, 4, 9])
    options: Any = {experts: torch.tensor(rows, dtype=torch.int32)}
    options |= {"expert_alignment": 4} if experts == "expert_ends" else {}
    _, scale = polyfuse.block_quant(
        torch.from_numpy(normal(*shape)),
        group_size=32,
        scale_format=scale_format,
        scale_layout=layout,
        fill=2.0**-10,
        backend=backend,
        **options,
    )
    stored = memory_of(scale)
    exponent = stored.view(torch.uint8) if scale_format == "ue8m0_packed" else stored.view(torch.int32)
    if scale_format == "ue8m0":
        assert not (exponent & 0x7FFFFF).any()
        exponent = exponent >> 23
    assert ((exponent >= 1) & (exponent <= 254)).all()
    assert (exponent == 117).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gpt_oss_is_its_pytorch_form(backend: str) -> None:
    """The clamped SwiGLU of interleaved columns as the model writes it, then quantised."""
    x = torch.from_numpy(4 * normal(9, 192)).bfloat16()
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(min=-7.0, max=7.0)
    y = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    options: Any = {"group_size": 32, "scale_format": "ue8m0"}
    got = polyfuse.silu_mul_block_quant(
        x, interleaved=True, alpha=1.702, up_offset=1.0, limit=7.0, materialize=True, backend=backend, **options
    )
    for one, other in zip(got, polyfuse.block_quant(y, backend=backend, **options), strict=True):
        assert torch.equal(one.float(), other.float())


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
