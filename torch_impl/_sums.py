"""Sums in an order that nothing beside them changes."""

import torch
from torch.nn.functional import pad


def fixed_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a dimension, which is kept, in an order that only its size decides.

    PyTorch's own sum on a GPU shares out the numbers over more threads the fewer sums there are.
    """
    size = x.shape[dim]
    if x.device.type == "cpu" or not size:
        return x.sum(dim, keepdim=True)
    x = x.movedim(dim, -1)
    x = pad(x, (0, (1 << (size - 1).bit_length()) - size))
    while x.shape[-1] > 1:
        first, second = x.chunk(2, -1)
        x = first + second
    return x.movedim(-1, dim)
