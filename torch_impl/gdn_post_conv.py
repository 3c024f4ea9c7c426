"""The plain PyTorch backend of `gdn_post_conv`: any device, differentiable."""

import torch

from polyfuse.spec import Capability
from polyfuse.torch_impl._gdn import gates, heads

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
    """Returns q, k, v, g and beta, each rounded once."""
    eps = l2norm_eps if l2norm else None
    q, k, v = heads(conv_out, num_k_heads, head_k_dim, len(A_log), head_v_dim, eps, conv_out.dtype)
    return q, k, v, *gates(a, b, A_log, dt_bias, output_g_exp)
