"""The plain PyTorch backend of `gated_rms_norm`: any device, differentiable."""

import torch

from polyfuse.spec import FP32_TINY, Capability
from polyfuse.torch_impl._gdn import sigmoid
from polyfuse.torch_impl._sums import fixed_sum

CAPABILITY = Capability(differentiable=True)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    activation: str = "silu",
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Returns y [..., V], rounded once."""
    rows = x.float().contiguous()  # summed in the same order whatever the layout
    mean = fixed_sum(rows.square(), -1) / max(x.shape[-1], 1)
    normalised = rows * (mean + max(eps, FP32_TINY)).rsqrt()  # never of 0: a zero row must give zeros
    wide = gate.float()
    act = sigmoid(wide)
    if activation == "silu":
        act = wide * act  # a quotient by 1 + exp(-gate) would have NaN as its gradient far below 0
    return (normalised * (weight.float() + weight_offset) * act).to(x.dtype).contiguous()
