"""`gdn_in_proj` in PyTorch; the formula is the docstring of `polyfuse.spec.gdn_in_proj`."""

import torch
from torch.nn.functional import linear

from polyfuse._torch.projections import Bias, Pair, choose, one_bias, one_weight
from polyfuse._torch.streams import execute_in_parallel
from polyfuse.spec import Capability


def sequential(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """One product after the other."""
    return linear(x, w1, b1), linear(x, w2, b2)


def parallel(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """The second product runs on an auxiliary stream."""
    large, small = execute_in_parallel(lambda: linear(x, w1, b1), lambda: linear(x, w2, b2), device=x.device)
    return large, small


def merged(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: Bias, b2: Bias) -> Pair:
    """One product with both weights as one matrix; the results are views of one buffer."""
    large, small = linear(x, one_weight(w1, w2), one_bias(b1, b2, (w1, w2))).split([len(w1), len(w2)], dim=-1)
    return large, small


STRATEGIES = {"sequential": sequential, "parallel": parallel, "merged": merged}

CAPABILITY = Capability(attrs={"strategy": ("auto", *STRATEGIES)}, differentiable=True)


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
