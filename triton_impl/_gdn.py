"""The arithmetic of a Gated DeltaNet layer around its delta rule, on fp32 tiles, and its results."""

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse.triton_impl._common import INTERPRETED, LOG2_E, next_power_of_2, widen

SMALL_X = tl.constexpr(-20.0)  # below, softplus(x) is exp(x) to 1e-9
PTX = tl.constexpr(torch.version.cuda is not None and not INTERPRETED.value)
LEVELS = tl.constexpr(20)  # log2 of the longest head


@triton.jit
def sum_of_squares(x):
    """[A, B] from [A, B, a power of two]: a tree over neighbours, so that no tile or layout changes a bit."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[1]
    if x.shape[2] == 1:
        return tl.reshape(x * x, [A, B])
    else:
        even, odd = tl.split(tl.reshape(x, [A, B, x.shape[2] // 2, 2]))
        total = tl.fma(even, even, odd * odd)
        for _ in tl.static_range(LEVELS):
            if total.shape[2] > 1:
                total = tl.sum(tl.reshape(total, [A, B, total.shape[2] // 2, 2]), 3)
        return tl.reshape(total, [A, B])


@triton.jit
def l2_normalise(x, eps):
    """x / sqrt(sum(x * x) + eps) over the last axis of [A, B, a power of two]."""
    return x * tl.rsqrt(sum_of_squares(x) + eps)[:, :, None]


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(exp(-|x|)). log1p(e) is 2 * atanh(e / (2 + e)): its series keeps small values exact."""
    e = tl.exp(-tl.abs(x))
    s = tl.div_rn(e, 2.0 + e)  # 0 to 1/3
    z = s * s
    series = z * (1.0 / 15.0) + 1.0 / 13.0
    series = tl.fma(series, z, 1.0 / 11.0)
    series = tl.fma(series, z, 1.0 / 9.0)
    series = tl.fma(series, z, 1.0 / 7.0)
    series = tl.fma(series, z, 1.0 / 5.0)
    series = tl.fma(series, z, 1.0 / 3.0)
    return tl.maximum(x, 0.0) + tl.fma(2.0 * s * z, series, 2.0 * s)


@triton.jit
def log_decay(x, A_log):
    """-exp(A_log) * softplus(x)."""
    # A GPU flushes exp(x) to zero while exp(x) * exp(A_log) is still a normal number.
    small = tl.exp(tl.minimum(x, SMALL_X) + A_log)
    return -tl.where(x < SMALL_X, small, tl.exp(A_log) * softplus(x))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), whose exponential cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x >= 0, 1.0, e), 1.0 + e)


@triton.jit
def gate_tile(
    gates, strides, tile, length, GROUP: tl.constexpr, HV: tl.constexpr, TOKENS: tl.constexpr, G_EXP: tl.constexpr
):
    """Computes g and beta of TOKENS rows.

    `gates` are pointers to a, b [length, HV / GROUP, GROUP] with `strides`, A_log, dt_bias [HV], and to g, beta
    [length, HV].
    """
    a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr = gates
    a_row, a_group, a_column, b_row, b_group, b_column = strides
    HEADS: tl.constexpr = next_power_of_2(HV) if HV else 1
    token = (tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    gate = tl.arange(0, HEADS).to(tl.int64)[None, :]
    live = (token < length) & (gate < HV)
    A_log = widen(tl.load(A_log_ptr + gate, mask=gate < HV, other=0.0))
    dt_bias = widen(tl.load(dt_bias_ptr + gate, mask=gate < HV, other=0.0))
    a_gate = gate * a_column
    b_gate = gate * b_column
    if GROUP != HV:
        group = gate // GROUP
        a_gate = group * a_group + gate % GROUP * a_column
        b_gate = group * b_group + gate % GROUP * b_column
    a = widen(tl.load(a_ptr + token * a_row + a_gate, mask=live, other=0.0))
    b = widen(tl.load(b_ptr + token * b_row + b_gate, mask=live, other=0.0))
    g = log_decay(a + dt_bias, A_log)
    tl.store(g_ptr + token * HV + gate, tl.exp(g) if G_EXP else g, mask=live)
    tl.store(beta_ptr + token * HV + gate, sigmoid(b), mask=live)


@triton.jit
def _sigmoid_in_ptx(x):
    """1 / (1 + exp(-x)), flushed to 0 below the normal numbers."""
    # exp and / keep results apart that are subnormal, for seven instructions more. Here 1 + e is at least 1.
    e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -LOG2_E], tl.float32, True, 1)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], tl.float32, True, 1)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    if PTX:
        return x * _sigmoid_in_ptx(x)
    return x / (1.0 + tl.exp(-x))


@triton.jit
def fast_sigmoid(x):
    """1 / (1 + exp(-x)) in fewer instructions than `sigmoid`: below the normal numbers it may be 0."""
    if PTX:
        return _sigmoid_in_ptx(x)
    return 1.0 / (1.0 + tl.exp(-x))


def gate_layout(a: torch.Tensor, b: torch.Tensor, H: int, HV: int) -> tuple[int, ...]:
    """The strides of a, then of b, each [length, HV / GROUP, GROUP]; and that GROUP.

    It is HV where both are [length, HV]: the stride from group to group is then not used, and no argument of a kernel.
    """
    if a.ndim == b.ndim == 2:
        (a_row, a_column), (b_row, b_column) = a.stride(), b.stride()
        return a_row, 1, a_column, b_row, 1, b_column, HV
    a, b = (gate.unflatten(1, (H, HV // H)) if gate.ndim == 2 else gate for gate in (a, b))
    return *a.stride(), *b.stride(), HV // H


def new_outputs(x: torch.Tensor, length: int, HV: int, H: int, K: int, V: int) -> tuple[torch.Tensor, ...]:
    """q, k [length, H, K] and v [length, HV, V] in the dtype of x; g and beta [length, HV] in float32."""
    keys, gates = ((length, H, K), x.dtype), ((length, HV), torch.float32)
    return new(x.device, keys, keys, ((length, HV, V), x.dtype), gates, gates)
