"""The Triton backend of `gdn_in_proj`: `fused`, one launch over all weights, and the GEMMs of the other strategies.

The kernel streams the weights once, so it is for few rows, where that is what the time goes to. A program
computes a block of columns that belong to one weight; weights are the left operand, so that the matrix unit's long
side is filled by them and its short side by the rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from polyfuse._torch.memory import new
from polyfuse._torch.projections import (
    Pair,
    Projection,
    choose,
    one_bias,
    one_weight,
    product,
    product_into,
    rounded_once,
    without_gaps,
)
from polyfuse._torch.streams import execute_in_parallel
from polyfuse.triton_impl._common import INTERPRETED, capability, round_to
from polyfuse.triton_impl._launch import Launcher
from polyfuse.triton_impl._plans import Plan, Plans, Step, Taken, adjacent, contiguous

NAME = "gdn_in_proj"

CAPABILITY = capability()

BLOCK_N, BLOCK_K, STAGES, WARPS = 32, 128, 4, 2
LEAST_ROWS, MOST_ROWS = 16, 64  # rows a program computes: what the matrix unit takes, and what registers hold


@triton.jit
def _project(activation, weight, result, block, row, tile: tl.constexpr):
    """out[row, first + block of columns] = x[row] @ w[block of columns].T + bias[first + block of columns]."""
    BLOCK_N: tl.constexpr = tile[0]
    BLOCK_K: tl.constexpr = tile[1]
    x_ptr, x_stride, rows, hidden = activation
    w_ptr, w_stride, w_step, columns = weight
    out_ptr, bias_ptr, first, width = result
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, row.shape[0]], tl.float32)
    w_row = w_ptr + column.to(tl.int64) * w_stride
    x_row = x_ptr + row.to(tl.int64) * x_stride
    for start in tl.range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_at = w_row[:, None] + k.to(tl.int64)[None, :] * w_step
        w = tl.load(w_at, mask=(column < columns)[:, None] & (k < hidden)[None, :], other=0.0)
        x = tl.load(x_row[None, :] + k[:, None], mask=(row < rows)[None, :] & (k < hidden)[:, None], other=0.0)
        if INTERPRETED:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + first + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row.to(tl.int64)[None, :] * width + (first + column)[:, None]
    mask = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(target, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr,  # [rows, hidden]
    w1_ptr,  # [n1, hidden]
    wz_ptr,  # [nz, hidden] or None
    w2_ptr,  # [n2, hidden]
    wa_ptr,  # [na, hidden] or None
    bias1_ptr,  # [n1 + nz] or None
    bias2_ptr,  # [n2 + na] or None
    out1_ptr,  # [rows, n1 + nz]
    out2_ptr,  # [rows, n2 + na]
    rows,
    hidden,
    x_stride,
    n1,
    w1_stride,
    w1_step,
    nz,
    wz_stride,
    wz_step,
    n2,
    w2_stride,
    w2_step,
    na,
    wa_stride,
    wa_step,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    activation = (x_ptr, x_stride, rows, hidden)
    end1 = tl.cdiv(n1, BLOCK_N)
    endz = end1 + tl.cdiv(nz, BLOCK_N)
    end2 = endz + tl.cdiv(n2, BLOCK_N)
    # Triton 3.9 wants what branches assign to be of one type in all of them, and a weight or bias may be None.
    tile: tl.constexpr = (BLOCK_N, BLOCK_K)
    if block < end1:
        _project(activation, (w1_ptr, w1_stride, w1_step, n1), (out1_ptr, bias1_ptr, 0, n1 + nz), block, row, tile)
    elif block < endz:
        if wz_ptr is not None:
            z = (wz_ptr, wz_stride, wz_step, nz)
            _project(activation, z, (out1_ptr, bias1_ptr, n1, n1 + nz), block - end1, row, tile)
    elif block < end2:
        _project(
            activation, (w2_ptr, w2_stride, w2_step, n2), (out2_ptr, bias2_ptr, 0, n2 + na), block - endz, row, tile
        )
    else:
        if wa_ptr is not None:
            a = (wa_ptr, wa_stride, wa_step, na)
            _project(activation, a, (out2_ptr, bias2_ptr, n2, n2 + na), block - end2, row, tile)


_launch = Launcher(NAME, _kernel, num_stages=STAGES)
BIASES = 5, 6  # their places among the inputs


def fused(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """All products in one launch."""
    lead = x.shape[:-1]
    qkvz, ba = new(x.device, ((*lead, large.width), x.dtype), ((*lead, small.width), x.dtype))
    flat = x if len(lead) == 1 else x.flatten(0, -2)
    if flat.shape[0] and qkvz.shape[-1] + ba.shape[-1]:
        inputs = flat, large.weight, large.following, small.weight, small.following, large.bias, small.bias
        plan, addresses = _plans(inputs)
        plan(inputs, addresses, (qkvz, ba))
    return qkvz, ba


def _plan(inputs: tuple[Any, ...]) -> Plan:
    """How a call with these inputs, in the order of the kernel's parameters, is launched."""
    taken = Taken(inputs, {0: adjacent, **dict.fromkeys(BIASES, contiguous)})
    x, *weights, _, _ = taken.ready
    rows, hidden = x.shape
    sizes = [0 if w is None else w.shape[0] for w in weights]
    layouts = [(0, 0) if w is None else w.stride() for w in weights]
    block_rows = min(max(LEAST_ROWS, 1 << (rows - 1).bit_length()), MOST_ROWS)
    described = [number for size, layout in zip(sizes, layouts, strict=True) for number in (size, *layout)]
    fixed = hidden, x.stride(0), *described, block_rows, BLOCK_N, BLOCK_K
    # Divided as Python does it: Triton's own cdiv takes microseconds on the host.
    grid = sum([-(-size // BLOCK_N) for size in sizes]), -(-rows // block_rows), 1
    return Plan(taken, Step(_launch, grid, taken, (rows,), fixed, WARPS))


_plans = Plans(_plan)


def _product(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """One result by PyTorch's GEMMs: that of a second weight begins in its buffer where that of the first ends."""
    first, second, bias = projection
    if second is None:
        return product(x, first, bias)
    if projection.is_small:
        return product(x, torch.cat([first, second]), bias)
    n, flat = len(first), x.flatten(0, -2)
    out = torch.empty((len(flat), projection.width), dtype=x.dtype, device=x.device)
    biases = (None, None) if bias is None else (bias[:n], bias[n:])
    for columns, weight, its_bias in zip((out[:, :n], out[:, n:]), (first, second), biases, strict=True):
        product_into(columns, flat, weight, its_bias)
    return out.view(*x.shape[:-1], projection.width)


def sequential(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """One product of PyTorch's after the other."""
    return _product(x, large), _product(x, small)


def parallel(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """The small projection's products run on an auxiliary stream."""
    qkvz, ba = execute_in_parallel(lambda: _product(x, large), lambda: _product(x, small), device=x.device)
    return qkvz, ba


def merged(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """One product of weights that are one matrix; the results are views of one buffer."""
    both = product(x, one_weight(large, small), one_bias(large, small))
    qkvz, ba = both.split([large.width, small.width], dim=-1)
    return qkvz, ba


PRODUCTS = {"sequential": sequential, "parallel": parallel, "merged": merged}  # by PyTorch's GEMMs


def gdn_in_proj(
    x: torch.Tensor,
    w_qkvz: torch.Tensor,
    w_ba: torch.Tensor,
    *,
    w_z: torch.Tensor | None = None,
    w_a: torch.Tensor | None = None,
    bias_qkvz: torch.Tensor | None = None,
    bias_ba: torch.Tensor | None = None,
    strategy: str = "auto",
) -> Pair:
    """Returns qkvz and ba, each rounded once."""
    if strategy == "auto":
        strategy = choose(x, w_qkvz, w_ba, ("fused", *PRODUCTS), w_z=w_z, w_a=w_a)
    large, small = Projection(w_qkvz, w_z, without_gaps(bias_qkvz)), Projection(w_ba, w_a, without_gaps(bias_ba))
    if strategy == "fused":
        return fused(x, large, small)
    with rounded_once(x):
        return PRODUCTS[strategy](x, large, small)
