"""`gdn_in_proj` in PyTorch; the formula is the docstring of `polyfuse.spec.gdn_in_proj`."""

import torch

from polyfuse._torch.projections import STRATEGIES, choose
from polyfuse.spec import Capability

CAPABILITY = Capability(attrs={"strategy": ("auto", *STRATEGIES)}, differentiable=True)


def gdn_in_proj(
    x: torch.Tensor,
    w_qkvz: torch.Tensor,
    w_ba: torch.Tensor,
    *,
    bias_qkvz: torch.Tensor | None = None,
    bias_ba: torch.Tensor | None = None,
    strategy: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkvz and ba, each rounded once."""
    if strategy == "auto":
        strategy = choose(x, w_qkvz, w_ba, tuple(STRATEGIES))
    return STRATEGIES[strategy](x, w_qkvz, w_ba, bias_qkvz, bias_ba)
