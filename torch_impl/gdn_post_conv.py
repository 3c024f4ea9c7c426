"""The plain PyTorch backend of `gdn_post_conv`: any device, differentiable."""

import torch
from torch.nn.functional import logsigmoid

from polyfuse.spec import FP32_TINY, Capability

CAPABILITY = Capability(differentiable=True)


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
    """q, k, v, g, beta, each rounded once."""
    heads_v = a.shape[1]
    width = num_k_heads * head_k_dim
    q, k, v = conv_out.split([width, width, heads_v * head_v_dim], dim=1)
    q, k = (x.unflatten(1, (num_k_heads, head_k_dim)) for x in (q, k))  # [tokens, heads, width]
    v = rounded(v.unflatten(1, (heads_v, head_v_dim)), conv_out.dtype)
    if l2norm:
        q, k = (l2_normalised(x, l2norm_eps, conv_out.dtype) for x in (q, k))
    else:
        q, k = (rounded(x, conv_out.dtype) for x in (q, k))
    return q, k, v, *gates(a, b, A_log, dt_bias, output_g_exp)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def l2_normalised(x: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Over the last axis, in fp32, rounded once to `dtype`."""
    wide = x.float().contiguous()  # summed in the same order whatever the layout
    total = wide.square().sum(-1, keepdim=True) + max(eps, FP32_TINY)  # never 0: a zero vector must give zero
    return (wide * total.rsqrt()).to(dtype)


def gates(
    a: torch.Tensor, b: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, output_g_exp: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """g and beta [L, HV], contiguous."""
    # -logsigmoid(-x) is softplus(x), without the threshold of torch's own.
    g = A_log.float().exp() * logsigmoid(-(a.float() + dt_bias.float()))
    if output_g_exp:
        g = g.exp()
    return g.contiguous(), sigmoid(b.float()).contiguous()


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Of float32. torch.sigmoid on a CPU depends on an element's place in its vector register."""
    return logsigmoid(x).exp()
