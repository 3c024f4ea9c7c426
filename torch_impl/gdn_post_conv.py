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
    v = _copy(v.unflatten(1, (heads_v, head_v_dim)))
    if l2norm:
        q, k = _l2_normalised(q, l2norm_eps), _l2_normalised(k, l2norm_eps)
    else:
        q, k = _copy(q), _copy(k)
    # -logsigmoid(-x) is softplus(x), without the threshold of torch's own.
    g = A_log.float().exp() * logsigmoid(-(a.float() + dt_bias.float()))
    # torch.sigmoid on a CPU depends on an element's place in its vector register.
    beta = logsigmoid(b.float()).exp()
    if output_g_exp:
        g = g.exp()
    return q, k, v, g.contiguous(), beta.contiguous()


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _l2_normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float().contiguous()  # summed in the same order whatever the layout
    total = wide.square().sum(-1, keepdim=True) + max(eps, FP32_TINY)  # never 0: a zero vector must give zero
    return (wide * total.rsqrt()).to(x.dtype)
