"""The plain PyTorch backend of `gdn_conv_prep`: any device, differentiable."""

import torch

from polyfuse.spec import Capability
from polyfuse.torch_impl._gdn import gates, heads, sigmoid
from polyfuse.torch_impl._pools import Slots

CAPABILITY = Capability(differentiable=True)


def gdn_conv_prep(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    output_g_exp: bool = False,
    output_final_state: bool = False,
    interleaved: bool = False,
    activation: str | None = "silu",
) -> tuple[torch.Tensor, ...]:
    """Returns q, k, v, g and beta, each rounded once, and final_state. Writes the pool."""
    dtype, before = x.dtype, weight.shape[1] - 1
    if interleaved:
        x = _in_order(x, num_k_heads, head_k_dim, len(A_log) // num_k_heads * head_v_dim)
    state, columns, owned = initial_state, before, None
    if state_pool is not None:
        sequences, columns = 1 if cu_seqlens is None else len(cu_seqlens) - 1, state_pool.shape[2]
        owned = Slots(state_pool, state_indices, sequences)
        state = owned.read(has_initial_state)
    inputs, first, last = _with_states(x, state, cu_seqlens, columns)
    c = _conv(inputs, weight, bias, first, columns - before, len(x))
    # Not silu(): on a CPU its last bit depends on the place of the element in the tensor.
    y = c * sigmoid(c) if activation else c
    eps = l2norm_eps if l2norm else None
    q, k, v = heads(y, num_k_heads, head_k_dim, len(A_log), head_v_dim, eps, dtype)
    if owned is not None:
        owned.write(_states(inputs, last))
    final_state = _states(inputs, last if output_final_state else last[:0, :before])
    final_state = final_state.to(dtype if initial_state is None else initial_state.dtype)
    return q, k, v, *gates(a, b, A_log, dt_bias, output_g_exp), final_state


def _in_order(x: torch.Tensor, num_k_heads: int, head_k_dim: int, values: int) -> torch.Tensor:
    """[q | k | v] of rows whose key heads are [q | k | v | z], where v and z have `values` columns each."""
    key_heads = x.unflatten(1, (num_k_heads, 2 * (head_k_dim + values)))
    parts = key_heads.split([head_k_dim, head_k_dim, values, values], dim=2)[:3]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _with_states(
    x: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None, before: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The inputs of all sequences in one tensor: each sequence's rows stand behind the `before` inputs that precede it.

    Its dtype holds the numbers of x and those of the states. Returned are that tensor; the places [L] in it where the
    `before` inputs before each row begin, None if these are 0, 1, ...; and the places [S, before] of the last inputs of
    each sequence.
    """
    window = torch.arange(before, device=x.device)
    if state is not None:
        x = x.to(torch.promote_types(x.dtype, state.dtype))
        state = state.to(x.dtype)
    if cu_seqlens is None:
        start = x.new_zeros(before, x.shape[1]) if state is None else state[0].t()
        return torch.cat([start, x]), None, window[None] + len(x)
    starts = cu_seqlens.contiguous()
    # 0 before the first sequence, and one more sequence past the last.
    number = torch.searchsorted(starts, torch.arange(len(x), dtype=starts.dtype, device=x.device), right=True)
    first = torch.arange(len(x), device=x.device) + before * number
    inputs = x.new_zeros(len(x) + before * (len(starts) + 1), x.shape[1]).index_copy_(0, first + before, x)
    numbers = torch.arange(1, len(starts) + 1, device=x.device)
    places = (starts + before * numbers)[:, None] + window  # of the inputs before each sequence, and the end
    if state is not None:
        inputs.index_copy_(0, places[:-1].flatten(), state.transpose(1, 2).flatten(0, 1))
    return inputs, first, places[1:] - before


def _states(inputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The inputs at these places [S, before] as states [S, C, before], which are rows in memory."""
    return inputs.index_select(0, places.flatten()).view(*places.shape, inputs.shape[1]).transpose(1, 2)


def _conv(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    first: torch.Tensor | None,
    skipped: int,
    length: int,
) -> torch.Tensor:
    """c [L, C] in fp32: the products of each window and the weights are added, the oldest first, and then the bias.

    A window begins after the `skipped` inputs that precede it in the state and that the conv does not look back at.
    """
    taps = weight.float().t().contiguous()  # [W, C]

    def inputs_at(tap: int) -> torch.Tensor:
        tap += skipped
        return inputs[tap : tap + length] if first is None else inputs.index_select(0, first + tap)  # [L, C]

    c = inputs_at(0) * taps[0]
    for tap in range(1, len(taps)):
        c += inputs_at(tap) * taps[tap]
    return c if bias is None else c + bias.float()
