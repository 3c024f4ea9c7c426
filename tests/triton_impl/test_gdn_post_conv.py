from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from polyfuse.conformance import Case, cases
from polyfuse.conformance.checks.values import compare
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.reference.gdn_post_conv import sigmoid, softplus
from polyfuse.spec import OPS, bind
from polyfuse.triton_impl import gdn_post_conv as module  # noqa: F401 (for `launches`)
from polyfuse.triton_impl._common import INTERPRETED
from polyfuse.triton_impl.gdn_post_conv import gdn_post_conv

exact = oracle("gdn_post_conv").intervals

SPEC = OPS["gdn_post_conv"]
DEVICE = "cpu" if INTERPRETED.value else "cuda"
HEADS = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
BF16: dict[str, str] = dict.fromkeys(("T", "a", "b", "A_log", "dt_bias"), "bfloat16")
TOKENS_ADJACENT: dict[str, str] = dict.fromkeys(("conv_out", "a", "b"), "token_stride_1")
CASES = [
    *(case for case in cases(SPEC.name) if case.repeat == 1),
    Case("qwen3_5_35b", {"L": 3, "HV": 32}, HEADS, BF16),
    Case("qwen3_5_397b", {"L": 2, "HV": 64}, HEADS, BF16),
    Case("qwen3_next_80b-as_transformers", {"L": 21, "HV": 32}, HEADS, BF16, layout=TOKENS_ADJACENT),
    Case("long", {"L": 260, "HV": 4}, HEADS | {"num_k_heads": 2}, BF16),
    Case("long-adjacent", {"L": 260, "HV": 4}, HEADS | {"num_k_heads": 2}, BF16, layout=TOKENS_ADJACENT),
    Case("heads_3_and_5", {"L": 9, "HV": 5}, {"num_k_heads": 3, "head_k_dim": 32, "head_v_dim": 16}, BF16),
    Case("no_value_heads", {"L": 5, "HV": 0}, {"num_k_heads": 2, "head_k_dim": 32, "head_v_dim": 16}, BF16),
    Case("least_eps", {"L": 5, "HV": 2}, HEADS | {"num_k_heads": 1, "l2norm_eps": 1e-60}, fill={"conv_out": "zeros"}),
]

# NumPy's, from the interpreter: 0 * inf in a head that holds an infinity.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """What the dispatcher passes."""
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    return {**values, **arrays}


def bits(x: torch.Tensor) -> bytes:
    return to_numpy(x).tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_in_one_launch(case: Case, launches: list[tuple[int, ...]], poisoned_memory: None) -> None:
    values = make_inputs(SPEC, case)
    args = arguments(values)
    before = {k: bits(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
    results = gdn_post_conv(**args)
    wanted = exact(**values)
    for output, result in zip(bind(SPEC, values).outputs, results, strict=True):
        assert compare(output.name, to_numpy(result), wanted[output.name], output.dtype) is None
        assert result.is_contiguous()
    assert {k: bits(args[k]) for k in before} == before
    assert len(launches) == (case.dims["L"] > 0)


@pytest.mark.parametrize("l2norm", [True, False])
def test_rows_do_not_depend_on_batch_layout_or_tile(l2norm: bool) -> None:
    """300 rows, alone and together, row by row and column by column in memory: four tiles, the same bits."""
    case = Case("rows", {"L": 300, "HV": 6}, {"num_k_heads": 3, "head_k_dim": 96, "head_v_dim": 64, "l2norm": l2norm})
    args = arguments(make_inputs(SPEC, case))
    tokens = ("conv_out", "a", "b")
    want = gdn_post_conv(**args)
    columns_first: dict[str, Any] = {name: args[name].t().contiguous().t() for name in tokens}
    assert columns_first["conv_out"].stride() == (1, 300)
    for result, name in zip(gdn_post_conv(**args | columns_first), "qkvgb", strict=True):
        assert bits(result) == bits(want["qkvgb".index(name)]), name
    for rows in (slice(0, 1), slice(17, 18), slice(250, 300)):
        for source in (args, args | columns_first):
            some: dict[str, Any] = {name: source[name][rows] for name in tokens}
            part = gdn_post_conv(**source | some)
            for result, whole in zip(part, want, strict=True):
                assert bits(result) == bits(whole[rows])


def test_any_strides() -> None:
    values = make_inputs(SPEC, Case("plain", {"L": 7, "HV": 4}, {"num_k_heads": 2, "head_k_dim": 24, "head_v_dim": 8}))
    args = arguments(values)
    want = gdn_post_conv(**args)
    spread: dict[str, Any] = {}
    for name in ("conv_out", "a", "b", "A_log", "dt_bias"):
        wide = torch.full([3 * n for n in args[name].shape], torch.nan, device=DEVICE)
        spread[name] = wide[tuple(slice(1, None, 3) for _ in args[name].shape)]
        spread[name].copy_(args[name])
    assert spread["conv_out"].stride() == (3 * 3 * 128, 3)
    for result, expected in zip(gdn_post_conv(**args | spread), want, strict=True):
        assert bits(result) == bits(expected)


@pytest.mark.parametrize(("rows", "strides"), [(3, (2**30, 1)), (2, (1, 2**29))], ids=["rows", "columns"])
def test_offsets_past_2_31(rows: int, strides: tuple[int, int], tmp_path: Path) -> None:
    """Elements 2**31 and more apart, in a sparse file."""
    attrs = {"num_k_heads": 1, "head_k_dim": 2, "head_v_dim": 2}
    values = make_inputs(SPEC, Case("far", {"L": rows, "HV": 1}, attrs, {"T": "bfloat16"}))
    size = (rows - 1) * strides[0] + 5 * strides[1] + 1
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    args = arguments(values)
    memory.as_strided((rows, 6), strides).copy_(args["conv_out"])
    far: dict[str, Any] = {"conv_out": memory.to(DEVICE).as_strided((rows, 6), strides)}
    assert size > 2**31
    for result, expected in zip(gdn_post_conv(**args | far), gdn_post_conv(**args), strict=True):
        assert bits(result) == bits(expected)


def gates(x: NDArray[np.float32], A_log: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """g and beta of a = b = x."""
    heads = 64
    a = torch.from_numpy(x).view(-1, heads).to(DEVICE)
    conv_out = torch.zeros(len(a), 2 + heads, device=DEVICE)
    rate, zero = torch.full((heads,), A_log, device=DEVICE), torch.zeros(heads, device=DEVICE)
    *_, g, beta = gdn_post_conv(conv_out, a, a, rate, zero, num_k_heads=1, head_k_dim=1, head_v_dim=1)
    return to_numpy(g).astype(np.float64).ravel(), to_numpy(beta).astype(np.float64).ravel()


def test_gates_are_accurate_on_the_whole_line() -> None:
    """Relative error within 2**-24 * (8 + 2 * |x|): the rounding of x * log2(e) in an exponential grows with |x|."""
    x = np.linspace(-87, 87, 64 * 512, dtype=np.float32)
    wide = x.astype(np.float64)
    for got, want in zip(gates(x), (-softplus(wide), sigmoid(wide)), strict=True):
        assert np.max(np.abs(got / want - 1) / (8 + 2 * np.abs(wide))) < 2.0**-24


def test_decay_is_accurate_where_the_exponential_underflows() -> None:
    """exp(a) is subnormal or 0 in float32, exp(A_log) * exp(a) is not."""
    x = np.linspace(-125, -88, 64 * 8, dtype=np.float32)
    want = -np.exp(x.astype(np.float64) + 40)
    assert np.max(np.abs(gates(x, A_log=40.0)[0] / want - 1)) < 2.0**-24 * (8 + 4 * 125)


COMPILE = """
import re
from tests.triton_impl.hopper import compile_for_hopper
from polyfuse.triton_impl.gdn_post_conv import TILES, _kernel, _tile

for row, column in (("i32", 1), (1, "i32")):
    *tile, warps = _tile(*TILES.ranges[-1][1], column != 1, 16, 128, 32, 128)
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in _kernel.arg_names}
    types |= {"g_ptr": "*fp32", "beta_ptr": "*fp32", "eps": "fp32"}
    constants = dict(a_column=1, b_column=1, H=16, K=128, HV=32, V=128, L2NORM=True, G_EXP=False)
    constants |= dict(GROUP=32, a_group=1, b_group=1)
    constants |= dict(zip(("TOKENS", "HEADS", "HEADS_V", "GATE_TOKENS"), tile))
    constants |= {n: 1 for n, v in (("conv_row", row), ("conv_column", column)) if v == 1}
    aligned = [n for n in types if n.endswith(("_ptr", "_row", "_column")) and n not in constants]
    code, spilled = compile_for_hopper(_kernel, types, constants, aligned, warps)
    loads = set(re.findall(r"ld\\.global\\S*evict_first\\S*?\\.(v4\\.b32|\\w+) ", code))
    stores = re.findall(r"st\\.global\\S*?\\.(v4\\.b32|\\w+) ", code)
    print(*loads, stores.count("v4.b32"), len(stores), spilled)
"""


@pytest.mark.slow
def test_compiles_for_hopper_with_16_byte_accesses(run_uninterpreted: Callable[[str], list[str]]) -> None:
    """Accesses to conv_out, 16-byte stores and all stores, what spills; no GPU is needed."""
    assert run_uninterpreted(COMPILE) == [
        "v4.b32 10 10 []",  # 4 of q or k, 4 of v, g and beta
        "b16 8 10 []",  # where tokens are adjacent, a warp reads 32 of them; gates of 2 heads a thread
    ]
