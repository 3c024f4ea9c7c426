"""The Triton backend of `gdn_in_proj`: `fused`, one launch over both weights, and the GEMMs of the other strategies.

The kernel streams the weights once, so it is for few rows, where that is what the time goes to. A program
computes a block of columns of one projection; weights are the left operand, so that the matrix unit's long side
is filled by them and its short side by the rows.
"""

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from polyfuse._torch.projections import Bias, Pair, choose, one_bias, one_weight
from polyfuse._torch.streams import execute_in_parallel
from polyfuse.spec import Capability
from polyfuse.triton_impl._common import INTERPRETED, round_to
from polyfuse.triton_impl._launch import Launcher

NAME = "gdn_in_proj"

CAPABILITY = Capability(devices=("cuda", "rocm", "xpu", "cpu"), interpreted=("cpu",))

BLOCK_N, BLOCK_K, STAGES, WARPS = 32, 256, 3, 4
LEAST_ROWS, MOST_ROWS = 16, 64  # rows a program computes: what the matrix unit takes, and what registers hold


@triton.jit
def _project(activation, projection, block, row, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[row, block of columns] = x[row] @ w[block of columns].T + bias."""
    x_ptr, x_stride, rows, hidden = activation
    w_ptr, w_stride, bias_ptr, out_ptr, columns = projection
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, row.shape[0]], tl.float32)
    w_row = w_ptr + column.to(tl.int64) * w_stride
    x_row = x_ptr + row.to(tl.int64) * x_stride
    for start in tl.range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_row[:, None] + k[None, :], mask=(column < columns)[:, None] & (k < hidden)[None, :], other=0.0)
        x = tl.load(x_row[None, :] + k[:, None], mask=(row < rows)[None, :] & (k < hidden)[:, None], other=0.0)
        if INTERPRETED:
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
    target = out_ptr + row.to(tl.int64)[None, :] * columns + column[:, None]
    mask = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(target, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr,  # [rows, hidden]
    w1_ptr,  # [n1, hidden]
    w2_ptr,  # [n2, hidden]
    bias1_ptr,  # [n1] or None
    bias2_ptr,  # [n2] or None
    out1_ptr,  # [rows, n1]
    out2_ptr,  # [rows, n2]
    rows,
    n1,
    n2,
    hidden,
    x_stride,
    w1_stride,
    w2_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    blocks1 = tl.cdiv(n1, BLOCK_N)
    activation = (x_ptr, x_stride, rows, hidden)
    if block < blocks1:
        projection = (w1_ptr, w1_stride, bias1_ptr, out1_ptr, n1)
        _project(activation, projection, block, row, BLOCK_N, BLOCK_K)
    else:
        projection = (w2_ptr, w2_stride, bias2_ptr, out2_ptr, n2)
        _project(activation, projection, block - blocks1, row, BLOCK_N, BLOCK_K)


_launch = Launcher(NAME, _kernel, num_stages=STAGES)


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def fused(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """Both products in one launch."""
    hidden, n1, n2 = x.shape[-1], len(w1), len(w2)
    out1 = torch.empty((*x.shape[:-1], n1), dtype=x.dtype, device=x.device)
    out2 = torch.empty((*x.shape[:-1], n2), dtype=x.dtype, device=x.device)
    flat = _unit_stride(x.reshape(-1, hidden))
    rows = len(flat)
    if rows == 0 or n1 + n2 == 0:
        return out1, out2
    w1, w2 = _unit_stride(w1), _unit_stride(w2)
    block_rows = min(max(LEAST_ROWS, triton.next_power_of_2(rows)), MOST_ROWS)
    inputs = (
        *(flat, w1, w2),
        None if b1 is None else _unit_stride(b1),
        None if b2 is None else _unit_stride(b2),
    )
    fixed = n1, n2, hidden, flat.stride(0), w1.stride(0), w2.stride(0), block_rows, BLOCK_N, BLOCK_K
    grid = triton.cdiv(n1, BLOCK_N) + triton.cdiv(n2, BLOCK_N), triton.cdiv(rows, block_rows), 1
    _launch(grid, inputs, (out1, out2), (rows,), fixed, WARPS)
    return out1, out2


def sequential(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """One product of PyTorch's after the other."""
    return linear(x, w1, b1), linear(x, w2, b2)


def parallel(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """The second product runs on an auxiliary stream."""
    large, small = execute_in_parallel(lambda: linear(x, w1, b1), lambda: linear(x, w2, b2), device=x.device)
    return large, small


def merged(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """One product with both weights as one matrix; the results are views of one buffer."""
    large, small = linear(x, one_weight(w1, w2), one_bias(b1, b2, (w1, w2))).split([len(w1), len(w2)], dim=-1)
    return large, small


STRATEGIES = {"sequential": sequential, "parallel": parallel, "merged": merged, "fused": fused}


def gdn_in_proj(
    x: torch.Tensor,
    w_qkvz: torch.Tensor,
    w_ba: torch.Tensor,
    *,
    bias_qkvz: torch.Tensor | None = None,
    bias_ba: torch.Tensor | None = None,
    strategy: str = "auto",
) -> Pair:
    """Returns qkvz and ba, each rounded once."""
    if strategy == "auto":
        strategy = choose(x, w_qkvz, w_ba, tuple(STRATEGIES))
    return STRATEGIES[strategy](x, w_qkvz, w_ba, bias_qkvz, bias_ba)
