"""Products of tiles on matrix units, and the inverse of a triangular matrix with them."""

import torch
import triton
import triton.language as tl

from polyfuse.triton_impl._common import INTERPRETED, round_to, widen

# Of products in fp32. Three products in tf32 err as little as one in fp32, and have matrix units on an NVIDIA GPU.
FP32 = tl.constexpr("ieee" if torch.version.cuda is None else "tf32x3")
# Of products whose results are rounded to bf16: one in tf32 has eight times its precision.
TO_BF16 = tl.constexpr("ieee" if torch.version.cuda is None else "tf32")


@triton.jit
def load_operand(ptr, mask):
    """A tile for `tl.dot`, zero outside of the mask."""
    value = tl.load(ptr, mask=mask, other=0.0)
    return widen(value) if INTERPRETED else value  # bf16 arithmetic is wrong in the interpreter


@triton.jit
def rounded_operand(value, DTYPE: tl.constexpr):
    """fp32 `value` as an operand of a `tl.dot` in DTYPE."""
    rounded = round_to(value, DTYPE)
    return widen(rounded) if INTERPRETED else rounded


@triton.jit
def dot(a, b, acc=None, PRECISION: tl.constexpr = FP32):
    """a b + acc in fp32, or of fp32 operands in PRECISION."""
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _diagonal(M, B: tl.constexpr, N: tl.constexpr):
    """The blocks [B, N, N] on the diagonal of M [B*N, B*N]."""
    own = tl.arange(0, B)[:, None, None, None] == tl.arange(0, B)[None, None, :, None]
    return tl.sum(tl.where(own, tl.reshape(M, [B, N, B, N]), 0.0), 2)


@triton.jit
def _corners(M, PRECISION: tl.constexpr):
    """(I + M)^-1 of strictly lower triangular M [B, 16, 16].

    Inverts blocks of 2, 4, 8 rows and so on, each from the inverses of its two halves. No powers of M are summed: they
    can overflow where the inverse is small.
    """
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    inverse = tl.where(i == j, 1.0, tl.where(i >> 1 == j >> 1, -M, 0.0))
    for level in tl.static_range(1, 4):
        below = tl.where((i >> level + 1 == j >> level + 1) & (i >> level > j >> level), M, 0.0)
        product = dot(inverse, below, None, PRECISION)
        inverse -= dot(product, inverse, None, PRECISION)
    return inverse


@triton.jit
def _merged(inverse, M, B: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """The blocks [B, 2*N, 2*N] on the diagonal of (I + M)^-1, from those of half their size."""
    row = tl.arange(0, 2)[None, :, None, None, None]
    column = tl.arange(0, 2)[None, None, None, :, None]
    halves = tl.reshape(inverse, [B, 2, N, N])
    first, second = tl.split(tl.permute(halves, [0, 2, 3, 1]))
    M = tl.reshape(_diagonal(M, B, 2 * N), [B, 2, N, 2, N])
    M = tl.sum(tl.sum(tl.where((row == 1) & (column == 0), M, 0.0), 3), 1)
    if B == 1:  # products of matrices use all warps
        first = tl.reshape(first, [N, N])
        second = tl.reshape(second, [N, N])
        M = tl.reshape(M, [N, N])
    below = dot(second, M, None, PRECISION)
    below = -dot(below, first, None, PRECISION)
    below = tl.reshape(below, [B, N, N])
    below = tl.where(row > column, below[:, None, :, None, :], 0.0)
    return tl.reshape(tl.where(row == column, halves[:, :, :, None, :], below), [B, 2 * N, 2 * N])


@triton.jit
def unit_inverse(M, PRECISION: tl.constexpr):
    """(I + M)^-1 of strictly lower triangular M [64, 64], by products in PRECISION."""
    inverse = _merged(_corners(_diagonal(M, 4, 16), PRECISION), M, 2, 16, PRECISION)
    return tl.reshape(_merged(inverse, M, 1, 32, PRECISION), [64, 64])
