"""`gdn_in_proj`; the formula is the docstring of `polyfuse.spec.gdn_in_proj`.

A product of matrices belongs to the machine's BLAS, which torch's `linear` calls; a vendor calls its own.
"""

import torch
from torch.nn.functional import linear

from polyfuse.spec import Capability

# One device without streams: nothing to run side by side, and no launches to save by merging.
CAPABILITY = Capability(devices=("cpu",), attrs={"strategy": ("auto", "sequential")})


def gdn_in_proj(
    x: torch.Tensor,
    w_qkvz: torch.Tensor,
    w_ba: torch.Tensor,
    *,
    bias_qkvz: torch.Tensor | None = None,
    bias_ba: torch.Tensor | None = None,
    strategy: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkvz and ba, one product after the other, each rounded once."""
    return linear(x, w_qkvz, bias_qkvz), linear(x, w_ba, bias_ba)
