"""`gdn_in_proj` in PyTorch; the formula is the docstring of `polyfuse.spec.gdn_in_proj`."""

import torch

from polyfuse._torch.projections import (
    Pair,
    Projection,
    choose,
    is_recorded,
    one_bias,
    one_weight,
    product,
    product_into,
    rounded_once,
    without_gaps,
)
from polyfuse._torch.streams import execute_in_parallel
from polyfuse.spec import Capability


def project(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """One of the two results; of two products, each is written to its columns of it."""
    weight, following, bias = projection
    if following is None:
        return product(x, weight, bias)
    if projection.is_small:
        return product(x, torch.cat([weight, following]), bias)
    sizes = [len(weight), len(following)]
    biases = (None, None) if bias is None else bias.split(sizes)
    if is_recorded(x, *projection):
        return torch.cat([product(x, weight, biases[0]), product(x, following, biases[1])], dim=-1)
    rows = x.flatten(0, -2)
    result = x.new_empty(len(rows), projection.width)
    for columns, w, b in zip(result.split(sizes, dim=1), (weight, following), biases, strict=True):
        product_into(columns, rows, w, b)
    return result.unflatten(0, x.shape[:-1])


def sequential(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """One product after the other."""
    return project(x, large), project(x, small)


def parallel(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """The products of the small projection run on an auxiliary stream."""
    qkvz, ba = execute_in_parallel(lambda: project(x, large), lambda: project(x, small), device=x.device)
    return qkvz, ba


def merged(x: torch.Tensor, large: Projection, small: Projection) -> Pair:
    """One product of weights that are one matrix; the results are views of one buffer.

    Where gradients are recorded, each weight has to get its own: the products run one by one.
    """
    whole = one_weight(large, small)
    if is_recorded(x, *large, *small):
        both = torch.cat([project(x, large), project(x, small)], dim=-1)
    else:
        both = product(x, whole, one_bias(large, small))
    qkvz, ba = both.split([large.width, small.width], dim=-1)
    return qkvz, ba


STRATEGIES = {"sequential": sequential, "parallel": parallel, "merged": merged}

CAPABILITY = Capability(attrs={"strategy": ("auto", *STRATEGIES)}, differentiable=True)


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
) -> Pair:
    """Returns qkvz and ba, each rounded once."""
    if strategy == "auto":
        strategy = choose(x, w_qkvz, w_ba, tuple(STRATEGIES), w_z=w_z, w_a=w_a)
    large, small = Projection(w_qkvz, w_z, without_gaps(bias_qkvz)), Projection(w_ba, w_a, without_gaps(bias_ba))
    with rounded_once(x):
        return STRATEGIES[strategy](x, large, small)
