"""The Triton backend of `gdn_post_conv`: one launch for all five outputs.

The first programs compute the gates; each of the others a tile of tokens x heads x width of q, k or v.
"""

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse.spec import FP32_TINY
from polyfuse.triton_impl._common import capability, next_power_of_2, round_to, widen
from polyfuse.triton_impl._gdn import gate_layout, gate_tile, l2_normalise, new_outputs
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, contiguous
from polyfuse.triton_impl._tuning import Ranges, Tiles

NAME = "gdn_post_conv"

CAPABILITY = capability()

# Up to this many tokens: elements per program, of which 128 threads load 16 bytes at a time, and g and beta per
# program. Of a short call a program takes few, so that there are many programs.
RANGES: Ranges = ((256, (1024, 128)), (2**63, (4096, 512)))
COLUMNS = 1024  # per program: whole pages of a row
STRIDED_ELEMENTS = 8192  # where the tokens are what is contiguous: 64 of one head of 128


@triton.jit
def _heads(
    in_ptr,
    out_ptr,  # [length, COUNT, WIDTH]
    length,
    tile,
    first_head,
    first_column,
    in_row,
    in_column,
    eps,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Computes TOKENS x HEADS heads of the q, k or v whose columns in `in_ptr` begin at `first_column`."""
    PADDED: tl.constexpr = next_power_of_2(WIDTH)
    row = (tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    lane = tl.arange(0, PADDED)[None, None, :]
    column = (first_head + tl.arange(0, HEADS))[None, :, None] * WIDTH + lane  # [1, HEADS, PADDED]
    mask = row < length
    if PADDED != WIDTH:
        mask = mask & (lane < WIDTH)
    source = in_ptr + row * in_row + (first_column + column).to(tl.int64) * in_column
    value = tl.load(source, mask=mask, other=0.0, eviction_policy="evict_first")  # [TOKENS, HEADS, PADDED]
    if NORMALISE:
        value = round_to(l2_normalise(widen(value), eps), value.dtype)
    tl.store(out_ptr + row * (COUNT * WIDTH) + column, value, mask=mask)


@triton.jit(do_not_specialize=["length"])
def _kernel(
    conv_ptr,  # [length, 2*H*K + HV*V]
    a_ptr,  # [length, HV / GROUP, GROUP]
    b_ptr,  # [length, HV / GROUP, GROUP]
    A_log_ptr,  # [HV]
    dt_bias_ptr,  # [HV]
    q_ptr,  # [length, H, K]
    k_ptr,  # [length, H, K]
    v_ptr,  # [length, HV, V]
    g_ptr,  # [length, HV]
    beta_ptr,  # [length, HV]
    length,
    eps,
    conv_row,
    conv_column,
    a_row,
    a_group,
    a_column,
    b_row,
    b_group,
    b_column,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HV: tl.constexpr,
    V: tl.constexpr,
    L2NORM: tl.constexpr,
    G_EXP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_V: tl.constexpr,
    GATE_TOKENS: tl.constexpr,
):
    QK_BLOCKS: tl.constexpr = H // HEADS
    BLOCKS: tl.constexpr = 2 * QK_BLOCKS + HV // HEADS_V
    program = tl.program_id(0)
    gate_programs = tl.cdiv(length, GATE_TOKENS)
    if program < gate_programs:
        gates = (a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr)
        gate_strides = (a_row, a_group, a_column, b_row, b_group, b_column)
        gate_tile(gates, gate_strides, program, length, GROUP, HV, GATE_TOKENS, G_EXP)
    else:
        tile = (program - gate_programs) // BLOCKS
        block = (program - gate_programs) % BLOCKS
        if block < 2 * QK_BLOCKS:
            part = block // QK_BLOCKS  # 0: q, 1: k
            out_ptr = q_ptr
            if part == 1:
                out_ptr = k_ptr
            start = part * (H * K)
            head = block % QK_BLOCKS * HEADS
            _heads(
                conv_ptr, out_ptr, length, tile, head, start, conv_row, conv_column, eps, H, K, TOKENS, HEADS, L2NORM
            )
        else:
            start = 2 * H * K
            head = (block - 2 * QK_BLOCKS) * HEADS_V
            _heads(
                conv_ptr, v_ptr, length, tile, head, start, conv_row, conv_column, eps, HV, V, TOKENS, HEADS_V, False
            )


_launch = Launcher(NAME, _kernel)
TILES = Tiles(_launch, ("elements", "gates"), RANGES, ((1024, 2048, 4096, 8192), (128, 256, 512)))


def _tile(elements: int, gates: int, strided: bool, H: int, K: int, HV: int, V: int) -> tuple[int, int, int, int, int]:
    """What a program takes: tokens, heads of q and k, heads of v, tokens of gates; and its warps."""
    width, width_v = next_power_of_2(K), next_power_of_2(V)
    gate_tokens = max(1, gates // next_power_of_2(HV or 1))
    if strided:
        return max(1, min(64, STRIDED_ELEMENTS // max(width, width_v))), 1, 1, gate_tokens, 8
    heads = gcd(H, max(1, COLUMNS // width))
    heads_v = gcd(HV, max(1, COLUMNS // width_v))
    tokens = max(1, elements // max(heads * width, heads_v * width_v))
    return tokens, heads, heads_v, gate_tokens, 4


def _plan(
    inputs: tuple[Any, ...], H: int, K: int, V: int, l2norm: bool, l2norm_eps: float, g_exp: bool, forced: Any
) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched.

    `forced` is what chooses the tiles in place of what was measured: with another one the same call has another plan.
    """
    taken = Taken(inputs, {3: contiguous, 4: contiguous})
    conv_out, a, b, A_log, _ = taken.ready
    length, HV, strides = conv_out.shape[0], A_log.shape[0], conv_out.stride()
    elements, gates = TILES.choose(length, conv_out.device)
    *tile, warps = _tile(elements, gates, strides[1] != 1, H, K, HV, V)
    tokens, heads, heads_v, gate_tokens = tile
    blocks = 2 * (H // heads) + HV // heads_v
    programs = -(-length // gate_tokens) + -(-length // tokens) * blocks
    numbers = length, max(l2norm_eps, FP32_TINY)  # a zero vector must give zero
    fixed = *strides, *gate_layout(a, b, H, HV), H, K, HV, V, l2norm, g_exp, *tile
    return Plan(taken, Step(_launch, (programs, 1, 1), taken, numbers, fixed, warps))


_plans = Plans(_plan)


def gdn_post_conv(
    conv_out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Returns q, k, v, g and beta, each rounded once."""
    length, value_heads = conv_out.shape[0], A_log.shape[0]
    outputs = new_outputs(conv_out, length, value_heads, num_k_heads, head_k_dim, head_v_dim)
    if length:
        inputs = conv_out, a, b, A_log, dt_bias
        settings = num_k_heads, head_k_dim, head_v_dim, l2norm, l2norm_eps, output_g_exp, TILES.forced
        plan, addresses = _plans(inputs, *settings)
        plan(inputs, addresses, outputs)
    return outputs
