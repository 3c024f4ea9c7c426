from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.reference._numerics import round_to, to_f64
from polyfuse.spec import Unsupported
from polyfuse.spec.block_quant import QMAX
from polyfuse.triton_impl import _blocks, _common
from polyfuse.triton_impl import silu_mul_block_quant as module
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl.silu_mul_block_quant import silu_mul_block_quant
from tests._torch.cases import SILU_MUL_BLOCK_QUANT
from tests.triton_impl.helpers import POISON, CompilingKernel

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

Floats = NDArray[np.float32]

NAME = "silu_mul_block_quant"
INTERPRETED = _common.INTERPRETED.value
DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [*(case for case in cases(NAME) if case.repeat == 1), *SILU_MUL_BLOCK_QUANT]
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 4 else []) for n, case in enumerate(CASES)]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers, so that NaN equals NaN."""
    return tensor.cpu().view(torch.uint8 if tensor.element_size() == 1 else torch.int32)


def assert_same_bits(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(raw(one), raw(other))


@pytest.fixture
def kernel(forget_plans: Callable[[], None], remembers: None, monkeypatch: pytest.MonkeyPatch) -> CompilingKernel:
    """The op's kernel, which notes how it is launched."""
    kernel = CompilingKernel(module._kernel)
    monkeypatch.setattr(module, "_launch", Launcher(NAME, kernel))
    return kernel


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_equals_the_oracle_in_one_launch(case: Case, kernel: CompilingKernel, poisoned_memory: None) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    before = {k: to_numpy(v).tobytes() for k, v in arrays.items()}
    q, scale = silu_mul_block_quant(**arrays, **call.attrs)
    assert trial.check((q, scale), call) is None
    assert {k: to_numpy(arrays[k]).tobytes() for k in before} == before
    assert kernel.how == ["jit"] * (q.numel() > 0)


def test_the_public_function_runs_it() -> None:
    assert Trial(NAME, SILU_MUL_BLOCK_QUANT[0], 0).on(registry().get("triton"), DEVICE) == ("passed", "")


@pytest.mark.parametrize("scale_layout", ["row_major", "col_major_tma"])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_rows_past_num_rows_are_not_touched(scale_format: str, scale_layout: str, poisoned_memory: None) -> None:
    x = normal(4, 6, 2 * 160)
    options: Any = {"group_size": 32, "scale_format": scale_format, "scale_layout": scale_layout}
    q, scale = silu_mul_block_quant(x, num_rows=torch.tensor([2, -5, 6, 99]).int().to(DEVICE), **options)
    for expert, count in enumerate((2, 0, 6, 6)):
        alone = silu_mul_block_quant(x[expert], **options)
        assert_same_bits((q[expert, :count], scale[expert, :count]), tuple(part[:count] for part in alone))
        assert (q[expert, count:].view(torch.uint8) == POISON).all()
        assert (raw(scale[expert, count:]) == -1).all()


@pytest.mark.parametrize("group", [32, 7, 1])
def test_a_row_does_not_depend_on_the_batch(group: int) -> None:
    x = normal(9, 2 * 224, dtype=torch.float32)
    q, scale = silu_mul_block_quant(x, group_size=group)
    assert q.float().count_nonzero() > 0.9 * q.numel()
    for i in range(len(x)):
        assert_same_bits(silu_mul_block_quant(x[i : i + 1], group_size=group), (q[i : i + 1], scale[i : i + 1]))


@pytest.mark.parametrize(("constant", "value"), [("TILE", 64), ("TILE", 2**16), ("WIDE_PAIRS", 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_and_wide_numbers_do_not_change_bits(
    constant: str, value: int, masked: bool, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(2, 5, 2 * 96)
    num_rows = torch.full((2,), 5, dtype=torch.int32, device=DEVICE) if masked else None
    options: Any = {"num_rows": num_rows, "group_size": 48, "scale_format": "ue8m0_packed"}
    want = silu_mul_block_quant(x, **options)
    forget_plans()
    if constant == "TILE":
        for tiles in ("TILES", "SMALL_GROUP_TILES"):
            monkeypatch.setattr(_blocks, tiles, ((2**63, value, 32),))
    else:
        monkeypatch.setattr(_blocks, constant, value)
    assert_same_bits(silu_mul_block_quant(x, **options), want)


def test_strides_of_leading_dimensions() -> None:
    x = normal(3, 8, 2 * 64)
    gaps = x[:, 1:6]
    for y in (gaps, gaps.transpose(0, 1), gaps[:, :, None].expand(3, 5, 2, 128)):
        assert_same_bits(silu_mul_block_quant(y, group_size=32), silu_mul_block_quant(y.contiguous(), group_size=32))
    num_rows = torch.tensor([5, 9, 0, 9, 5], dtype=torch.int32, device=DEVICE)
    q, scale = silu_mul_block_quant(gaps, num_rows=num_rows[::2], group_size=32)
    want = silu_mul_block_quant(gaps.contiguous(), num_rows=num_rows[::2].contiguous(), group_size=32)
    assert_same_bits((q[::2], scale[::2]), (want[0][::2], want[1][::2]))


def column_slices(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A gate and an up [..., 96] that lie in buffers of different widths; up begins at no multiple of 16 bytes."""
    return normal(*lead, 200)[..., 8:104], normal(*lead, 151)[..., 53:149]


@pytest.mark.parametrize("options", [{}, {"materialize": True, "limit": 0.75, "scale_format": "ue8m0_packed"}], ids=str)
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3), (3, 2, 2)], ids=str)
def test_gate_and_up_as_two_tensors(lead: tuple[int, ...], options: dict[str, Any]) -> None:
    gate, up = column_slices(*lead)
    want = silu_mul_block_quant(torch.cat([gate, up], -1), group_size=32, **options)
    assert_same_bits(silu_mul_block_quant(gate, up=up, group_size=32, **options), want)


def test_gate_and_up_of_experts_as_two_tensors(poisoned_memory: None) -> None:
    gate, up = column_slices(4, 6)
    up = up.transpose(0, 1).contiguous().transpose(0, 1)
    num_rows = torch.tensor([2, -5, 6, 99]).int().to(DEVICE)
    want = silu_mul_block_quant(torch.cat([gate, up], -1), num_rows=num_rows, group_size=32)
    q, scale = silu_mul_block_quant(gate, up=up, num_rows=num_rows, group_size=32)
    assert_same_bits((q, scale), want)
    assert (q[1].view(torch.uint8) == POISON).all()


def test_gate_and_up_are_read_in_place(passed: list[tuple[Any, ...]]) -> None:
    gate, up = column_slices(5)
    silu_mul_block_quant(gate, up=up, group_size=32)
    assert [x if isinstance(x, int) else x.data_ptr() for x in passed[0][:2]] == [gate.data_ptr(), up.data_ptr()]


def test_calls_that_differ_in_up_alone_have_plans_of_their_own(kernel: CompilingKernel) -> None:
    """In its strides, and in whether it begins at a multiple of 16 bytes."""
    gate = normal(4, 96)
    values = normal(4, 96, dtype=torch.float32).to(torch.bfloat16).flip(0)
    ups = []
    for width, first in ((96, 0), (128, 0), (128, 8), (128, 3)):
        buffer = torch.zeros(4, width, dtype=torch.bfloat16, device=DEVICE)
        ups.append(buffer[:, first : first + 96].copy_(values))
    turned = values.t().contiguous().t()
    for up in (*ups, turned, *ups):
        want = silu_mul_block_quant(torch.cat([gate, values], -1), group_size=32)
        assert_same_bits(silu_mul_block_quant(gate, up=up, group_size=32), want)
    joined, apart = kernel.how[::2], kernel.how[1::2]
    assert joined == ["jit", *["compiled"] * 8]
    assert apart == ["jit", "jit", "compiled", "jit", "jit", *["compiled"] * 4]


def test_a_repeated_signature_starts_the_compiled_kernel(kernel: CompilingKernel) -> None:
    memory = normal(1 + 4 * 2 * 64)
    aligned, unaligned = (memory[i : i + 4 * 2 * 64].view(4, 2 * 64) for i in (0, 1))
    for x, limit in ((aligned, None), (aligned, None), (unaligned, None), (aligned, 0.5), (aligned, 0.25)):
        got = silu_mul_block_quant(x, group_size=64, limit=limit)
        y = x.float()
        gate, up = y.chunk(2, -1) if limit is None else (y[:, :64].clamp(max=limit), y[:, 64:].clamp(-limit, limit))
        assert torch.allclose(got[1], (silu(gate) * up).abs().amax(-1, keepdim=True) / 448)
    assert kernel.how == ["jit", "compiled", "jit", "jit", "compiled"]


def test_a_group_wider_than_a_program_is_declined() -> None:
    x = torch.zeros(1, 2 * 2**16, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(Unsupported, match=r"^silu_mul_block_quant: group_size=65536: .* up to 32768$"):
        silu_mul_block_quant(x, group_size=2**16)


def quantised_as_they_are(values: Floats, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """q and scale of y = `values` [groups, group_size]: silu(64) is 64, and a product with it is exact."""
    x = torch.from_numpy(np.concatenate([np.full_like(values, 64), values / 64], -1)).to(DEVICE)
    return silu_mul_block_quant(x, group_size=values.shape[1], **options)


def hard_values(quant_dtype: str) -> Floats:
    """Every finite bfloat16, and every midpoint between neighbours of the format with the float32 on each side."""
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    if quant_dtype == "int8":
        grid = np.arange(-128, 129, dtype=np.float32)
    else:
        grid = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, quant_dtype)).astype(np.float32)
        grid = np.unique(grid[np.isfinite(grid)])
    middle = (grid[1:] + grid[:-1]) / 2
    sides = [np.nextafter(middle, np.float32(end), dtype=np.float32) for end in (-np.inf, np.inf)]
    return np.concatenate([every[np.isfinite(every)], middle, *sides]).astype(np.float32)


@pytest.mark.parametrize("quant_dtype", list(QMAX)[:4])
@pytest.mark.parametrize("emulated", [True, *([] if INTERPRETED else [False])])
def test_rounding_onto_the_grid(
    quant_dtype: str, emulated: bool, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulated:
        monkeypatch.setattr(_blocks, "_converts", lambda *_: False)
    qmax, values = QMAX[quant_dtype], hard_values(quant_dtype)
    values = np.pad(values, (0, -len(values) % 255)).reshape(-1, 255)
    pinned = np.pad(values, ((0, 0), (1, 0)), constant_values=qmax)  # with scale_ub=1 every scale is 1
    q, scale = quantised_as_they_are(pinned, quant_dtype=quant_dtype, scale_ub=1.0)
    assert (scale == 1).all()
    want = round_to(np.clip(pinned.astype(np.float64), -qmax, qmax), quant_dtype)
    np.testing.assert_array_equal(to_f64(to_numpy(q)), to_f64(want))


@pytest.mark.parametrize("quant_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_scales_round_up_to_powers_of_two(quant_dtype: str) -> None:
    power = np.ldexp(np.float32(1), np.arange(-14, 100)).astype(np.float32)
    largest = power * np.float32(QMAX[quant_dtype])
    below, above = (np.nextafter(largest, np.float32(end), dtype=np.float32) for end in (0, np.inf))
    for amax, want in ((below, power), (largest, power), (above, 2 * power)):
        for options in ({"scale_format": "ue8m0"}, {"scale_format": "ue8m0_packed"}):
            _, scale = quantised_as_they_are(amax[:, None], quant_dtype=quant_dtype, **options)
            got = scale.cpu().flatten() if scale.dtype == torch.float32 else torch.exp2(scale.cpu().flatten() - 127.0)
            np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("quant_dtype", list(QMAX)[:4])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_scales_from_the_reciprocal_are_the_rounded_products(scale_format: str, quant_dtype: str) -> None:
    qmax = np.float32(QMAX[quant_dtype])
    edges = np.ldexp(qmax, np.arange(-10, 40)).astype(np.float32)
    sides = [np.nextafter(edges, np.float32(end), dtype=np.float32) for end in (0, np.inf)]
    amax = np.concatenate([np.geomspace(1, 1e10, 200, dtype=np.float32), edges, *sides])
    product = amax * (np.float32(1) / qmax)
    want = product if scale_format == "float32" else np.exp2(np.ceil(np.log2(product.astype(np.float64))))
    _, scale = quantised_as_they_are(
        amax[:, None], quant_dtype=quant_dtype, scale_format=scale_format, scale_min=1e-9, reciprocal=True
    )
    np.testing.assert_array_equal(scale.cpu().flatten().numpy(), want)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's exp is NumPy's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_materialize_changes_no_bit_of_the_unfused_ops(dtype: torch.dtype) -> None:
    """Every 16-bit gate up to 10000; as many normal 32-bit ones."""
    gate = (
        torch.arange(2**16, device=DEVICE)
        .to(torch.int16)
        .view(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    )
    gate = gate[gate.abs() < 1e4] if dtype.itemsize == 2 else normal(2**22, dtype=dtype)
    gate = gate[: len(gate) // 128 * 128].view(-1, 128)
    up = normal(*gate.shape, dtype=dtype)
    y = (silu(gate) * up).float()
    amax = y.abs().amax(-1, keepdim=True)
    for divisor, reciprocal in ((torch.full_like(amax, 448), False), (448.0, True)):
        scale = (amax / divisor).clamp(min=1 / (448 * 512))
        q = (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        got = silu_mul_block_quant(torch.cat([gate, up], -1), materialize=True, reciprocal=reciprocal)
        assert_same_bits(got, (q, scale))


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_a_captured_graph_follows_its_inputs() -> None:
    x, num_rows = normal(2, 6, 2 * 128), torch.tensor([6, 6], dtype=torch.int32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    silu_mul_block_quant(x, num_rows=num_rows)
    with torch.cuda.graph(graph):
        q, scale = silu_mul_block_quant(x, num_rows=num_rows)
    x.copy_(x.flip(1))
    num_rows.copy_(torch.tensor([3, 6]))
    graph.replay()
    want = silu_mul_block_quant(x, num_rows=num_rows)
    assert_same_bits((q[0, :3], q[1], scale[0, :3], scale[1]), (want[0][0, :3], want[0][1], want[1][0, :3], want[1][1]))


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl._blocks import tile
from polyfuse.triton_impl.silu_mul_block_quant import _kernel

ABSENT = "up_ptr up_expert up_row up_column weight_ptr weight_expert weight_row num_rows_ptr ends_ptr global_scale_ptr"
ABSENT = dict.fromkeys([*ABSENT.split(), "scale_ub", "limit", "alpha", "up_offset"])
FLAGS = dict(SWIZZLED=False, PADDING=0, RECIPROCAL=False, INTERLEAVED=False, LIMIT_ON="input", MATERIALIZE=False)
FLAGS |= dict(WIDE=False, ALIGNMENT=1, CHUNK=256, x_column=1)
FLAGS |= dict(D=2048, DTYPE="float8_e4m3fn", QMAX=448.0, FLOOR=1 / (448 * 512))

def compiled(group, scale_format, scale, given={}, q="*fp8e4nv", **flags):
    block, warps = tile(group, 4, 2**30, False)
    types = {n: "i32" for n in _kernel.arg_names} | {"x_ptr": "*bf16", "q_ptr": q, "scale_ptr": scale} | given
    constants = ABSENT | FLAGS | dict(GROUP=group, FORMAT=scale_format, BLOCK=block) | flags
    constants = {name: value for name, value in constants.items() if name not in given}
    aligned = ["x_ptr", "q_ptr", "scale_ptr", "x_row", "x_expert", *(n for n in given if n in ("up_ptr", "up_row"))]
    code, spilled = compile_for_hopper(_kernel, types, constants, aligned, warps)
    code = code.replace("cp.async.cg.shared.global", "ld.global.v4.b32")  # a copy of 16 bytes on its way
    accesses = re.findall(r"(ld|st)\\.global\\S*?\\.(v4\\.b32|v2\\.b32|b\\d+)", code)
    return [" ".join(access) for access in accesses], code.count("cvt.rn.satfinite.e4m3x2.f32"), spilled

for group, scale_format, scale in ((128, "float32", "*fp32"), (64, "ue8m0_packed", "*i32")):
    accesses, conversions, spilled = compiled(group, scale_format, scale)
    print(*accesses, conversions, spilled, sep=", ")
    up = {"up_ptr": "*bf16", "up_expert": "i32", "up_row": "i32"}
    apart = compiled(group, scale_format, scale, up, up_column=1)
    print("gate and up apart", apart[0] == accesses, apart[2], sep=", ")
wide = ["ld v4.b32"] * 2
weight = {"weight_ptr": "*fp32", "weight_expert": "i32", "weight_row": "i32"}
gpt_oss = {"alpha": "fp32", "up_offset": "fp32", "limit": "fp32"}
nvfp4 = dict(q="*u8", DTYPE="float4_e2m1", QMAX=6.0, SWIZZLED=True)
for name, found in {
    "num_rows": compiled(128, "float32", "*fp32", {"num_rows_ptr": "*i32"}),
    "expert_ends": compiled(128, "float32", "*fp32", {"ends_ptr": "*i32"} | weight, ALIGNMENT=128),
    "gpt_oss": compiled(32, "ue8m0", "*u8", gpt_oss, SWIZZLED=True, INTERLEAVED=True, FLOOR=2.0**-126),
    "nvfp4": compiled(16, "e4m3", "*u8", {"global_scale_ptr": "*fp32"}, FLOOR=2.0**-126, **nvfp4),
    "partial": compiled(32, "ue8m0_packed", "*i32", D=2056, FLOOR=2.0**-126),
}.items():
    print(name, "ld v4.b32" in found[0], found[2], sep=", ")
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_accesses(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """A thread's loads and stores of 8 and of 16 elements, its conversions of 2, what spills; no GPU is needed."""
    assert run_uninterpreted(COMPILE) == [
        "ld v4.b32, ld v4.b32, st v2.b32, st b32, 4, []",
        "gate and up apart, True, []",
        "ld v4.b32, ld v4.b32, ld v4.b32, ld v4.b32, st v4.b32, st b8, 8, []",
        "gate and up apart, True, []",
        "num_rows, True, []",
        "expert_ends, True, []",
        "gpt_oss, True, []",
        "nvfp4, True, []",
        "partial, True, []",
    ]
