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
    w_z: torch.Tensor | None = None,
    w_a: torch.Tensor | None = None,
    bias_qkvz: torch.Tensor | None = None,
    bias_ba: torch.Tensor | None = None,
    strategy: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkvz and ba, one product after the other, each rounded once."""
    return _project(x, w_qkvz, w_z, bias_qkvz), _project(x, w_ba, w_a, bias_ba)


def _project(
    x: torch.Tensor, weight: torch.Tensor, following: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """One result, the columns of the weight that follows after those of the first."""
    if following is None:
        return _product(x, weight, bias)
    sizes = [len(weight), len(following)]
    biases = (None, None) if bias is None else bias.split(sizes)
    return torch.cat([_product(x, weight, biases[0]), _product(x, following, biases[1])], dim=-1)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, rounded once: where x is no matrix, `linear` may round before it adds the bias."""
    return linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
