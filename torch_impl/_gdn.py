"""The arithmetic of a Gated DeltaNet layer around its delta rule, which several ops share."""

import torch
from torch.nn.functional import logsigmoid

from polyfuse.spec import FP32_TINY
from polyfuse.torch_impl._sums import fixed_sum


def heads(
    y: torch.Tensor,
    num_k_heads: int,
    head_k_dim: int,
    heads_v: int,
    head_v_dim: int,
    l2norm_eps: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k [L, H, K] and v [L, HV, V] of y [L, 2*H*K + HV*V], each rounded once to `dtype`.

    q and k are normalised unless `l2norm_eps` is None.
    """
    width = num_k_heads * head_k_dim
    q, k, v = y.split([width, width, heads_v * head_v_dim], dim=1)
    q, k = (part.unflatten(1, (num_k_heads, head_k_dim)) for part in (q, k))
    v = _rounded(v.unflatten(1, (heads_v, head_v_dim)), dtype)
    if l2norm_eps is None:
        return _rounded(q, dtype), _rounded(k, dtype), v
    return _l2_normalised(q, l2norm_eps, dtype), _l2_normalised(k, l2norm_eps, dtype), v


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, output_g_exp: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """g, or exp(g), and beta as contiguous [L, HV] in fp32, of a and b in either of their shapes."""
    a, b = a.flatten(1), b.flatten(1)
    # -logsigmoid(-x) is softplus(x), without the threshold of torch's own.
    g = A_log.float().exp() * logsigmoid(-(a.float() + dt_bias.float()))
    if output_g_exp:
        g = g.exp()
    return g.contiguous(), sigmoid(b.float()).contiguous()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)) of a float32 x. On a CPU torch.sigmoid depends on an element's place in its vector register."""
    return logsigmoid(x).exp()


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy of x in `dtype`."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _l2_normalised(x: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(sum(x * x) + eps) over the last axis, computed in fp32 and rounded once to `dtype`."""
    wide = x.float().contiguous()  # summed in the same order whatever the layout
    total = fixed_sum(wide.square(), -1) + max(eps, FP32_TINY)  # never 0: a zero vector must give zero
    return (wide * total.rsqrt()).to(dtype)
