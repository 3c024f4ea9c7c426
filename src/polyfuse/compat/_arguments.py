"""What the functions of both engines do with arguments: refusals, and rows of batches as packed sequences."""

from typing import NoReturn

import torch

from polyfuse.spec import fail


def refuse(function: str, argument: str, got: object, instead: str) -> NoReturn:
    """Raise `NotImplementedError` for an argument of the engine's that no op of polyfuse has."""
    raise NotImplementedError(f"{function}: {argument}={got!r} is not supported; {instead}")


def packed(
    function: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """The arrays of `gated_delta_rule`, without the batch of [B, T, ...], and the boundaries of its sequences.

    g and beta become float32, which represents all of their values.
    """
    arrays = {"q": (q, 4), "k": (k, 4), "v": (v, 4), "g": (g, 3), "beta": (beta, 3)}
    for name, (array, dims) in arrays.items():
        if array.dim() != dims:
            fail(function, name, f"[B, T, ...] of {dims} dimensions", list(array.shape))
        if array.shape[:2] != q.shape[:2]:
            fail(function, name, f"the B and T of q, {list(q.shape[:2])}", list(array.shape[:2]))
    batch, rows = q.shape[:2]
    if cu_seqlens is not None:
        if batch != 1:
            fail(function, "q", "B=1 with cu_seqlens", batch, "q.flatten(0, 1)[None]")
    elif batch != 1:
        cu_seqlens = torch.arange(batch + 1, device=q.device, dtype=torch.int64) * rows
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), g.flatten(0, 1).float(), beta.flatten(0, 1).float())
    return flat, cu_seqlens


def transposed_states(
    function: str, states: torch.Tensor | None, q: torch.Tensor, v: torch.Tensor
) -> torch.Tensor | None:
    """States [S, HV, V, K] as [S, HV, K, V], without a copy."""
    if states is None:
        return None
    heads, value_dim, key_dim = v.shape[2], v.shape[3], q.shape[3]
    if states.dim() != 4 or states.shape[1:] != (heads, value_dim, key_dim):
        fail(function, "initial_state", f"[S, HV={heads}, V={value_dim}, K={key_dim}]", list(states.shape))
    return states.mT


def gated_norm_arguments(
    function: str,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None,
    group_size: int | None,
    norm_before_gate: bool,
) -> torch.Tensor:
    """The gate, after a refusal of what `gated_rms_norm` is not."""
    if bias is not None:
        refuse(function, "bias", list(bias.shape), "add it to the result")
    if z is None:
        refuse(function, "z", None, "torch.nn.functional.rms_norm normalises without a gate")
    if group_size not in (None, x.shape[-1]):
        refuse(function, "group_size", group_size, "give x with the group as its last dimension")
    if not norm_before_gate:
        refuse(function, "norm_before_gate", norm_before_gate, "only the gate after the norm is an op")
    return z
