"""The plain PyTorch backend of `gdn_decode`: any device, nothing read back to the host, only named slots touched."""

import torch

from polyfuse.spec import FP32_TINY, Capability
from polyfuse.torch_impl._gdn import gates, heads, sigmoid
from polyfuse.torch_impl._pools import Slots
from polyfuse.torch_impl._sums import fixed_sum

CAPABILITY = Capability()


def gdn_decode(
    x: torch.Tensor,
    z: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    conv_state: torch.Tensor,
    recurrent_state: torch.Tensor,
    *,
    conv_bias: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    num_accepted: torch.Tensor | None = None,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool = False,
    l2norm_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    scale: float | None = None,
) -> torch.Tensor:
    """Returns out, rounded once; both states are updated in place."""
    lead, heads_v = x.shape[:-1], len(A_log)
    if not lead[0]:
        return x.new_empty(*lead, heads_v * head_v_dim)
    batch, tokens = lead if len(lead) == 2 else (lead[0], 1)
    slots = _slots_of_tokens(batch, tokens, state_indices, x.device)
    accepted = None if num_accepted is None else num_accepted.long().clamp(1, tokens)

    inputs, gate = _parted(x.flatten(0, -2), z, num_k_heads, head_k_dim)
    inputs = inputs.unflatten(0, (batch, tokens)).transpose(1, 2)  # [B, C, T]
    owned = Slots(conv_state, slots[:, 0], batch)
    found = owned.states
    window = _window(found, accepted, conv_weight.shape[1] - 1)
    c = _conv(torch.cat([window.float(), inputs.float()], dim=2), conv_weight, conv_bias, tokens)
    shifted = torch.cat([found if len(lead) == 1 else window, inputs.to(found.dtype)], dim=2)[:, :, 1:]
    if len(lead) == 2:
        written = conv_weight.shape[1] - 2 + (slots >= 0).sum(1)
        columns = torch.arange(found.shape[2], device=x.device)
        shifted = torch.where(columns < written[:, None, None], shifted, found)
    owned.write(shifted)

    y = _silu(c).transpose(1, 2).flatten(0, 1)
    q, k, v = heads(y, num_k_heads, head_k_dim, heads_v, head_v_dim, l2norm_eps, torch.float32)
    q, k = (part.repeat_interleave(heads_v // num_k_heads, dim=1)[..., None] for part in (q, k))
    a, b = (part.reshape(batch * tokens, heads_v) for part in (a, b))
    decay, beta = gates(a, b, A_log, dt_bias, output_g_exp=True)
    parts = (q, k, v[:, :, None], decay[..., None, None], beta[..., None, None])
    by_token = zip(*(part.unflatten(0, (batch, tokens)).unbind(1) for part in parts), strict=True)

    first = slots[:, 0]
    if accepted is not None and state_indices is not None:
        first = torch.where(first < 0, first, state_indices.long().gather(1, accepted[:, None] - 1)[:, 0])
    S = recurrent_state.index_select(0, first.clamp(min=0)).float()
    S = torch.where(first[:, None, None, None] >= 0, S, 0.0)
    factor = head_k_dim**-0.5 if scale is None else scale
    results = []
    for token in by_token:
        o, S = _step(S, *token)
        results.append((o[:, :, 0] * factor, S))
    o, states = (torch.stack(part, dim=1) for part in zip(*results, strict=True))
    Slots(recurrent_state, slots.flatten(), batch * tokens).write(states.flatten(0, 1))
    out = _normalised(o, norm_eps) * norm_weight.float() * _silu(gate.float().reshape(o.shape))
    return torch.where(slots[..., None, None] >= 0, out, 0.0).to(x.dtype).reshape(*lead, heads_v * head_v_dim)


def _slots_of_tokens(batch: int, tokens: int, state_indices: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The slot of each token [B, T], negative for padding: from the first negative one of a sequence on."""
    if state_indices is None:
        return torch.arange(batch, device=device)[:, None]
    slots = state_indices.long().reshape(batch, tokens)
    return torch.where((slots < 0).long().cumsum(1) == 0, slots, -1)


def _parted(
    rows: torch.Tensor, z: torch.Tensor | None, num_k_heads: int, head_k_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[q | k | v] and z of rows of x, which has z if that is None."""
    if z is not None:
        return rows, z
    key_heads = rows.unflatten(1, (num_k_heads, rows.shape[1] // num_k_heads))
    values = key_heads.shape[2] // 2 - head_k_dim
    *parts, z = key_heads.split([head_k_dim, head_k_dim, values, values], dim=2)
    return torch.cat([part.flatten(1) for part in parts], dim=1), z


def _window(found: torch.Tensor, accepted: torch.Tensor | None, before: int) -> torch.Tensor:
    """The inputs before each sequence's first token [B, C, W - 1], of what the conv state holds [B, C, n]."""
    if accepted is None:
        return found[:, :, found.shape[2] - before :]
    places = accepted[:, None] - 1 + torch.arange(before, device=found.device)
    return found.gather(2, places[:, None].expand(-1, found.shape[1], -1))


def _conv(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """c [B, C, T] in fp32: the products of each window and the weights, added from the oldest on, and then the bias."""
    taps = weight.float()
    c = inputs[:, :, :tokens] * taps[:, :1]
    for tap in range(1, taps.shape[1]):
        c += inputs[:, :, tap : tap + tokens] * taps[:, tap : tap + 1]
    return c if bias is None else c + bias.float()[:, None]


def _step(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o without its scale [B, HV, 1, V] and the new S of one token; q and k are [B, HV, K, 1]."""
    S = decay * S
    d = beta * (v - fixed_sum(S * k, -2))
    S = S + k * d
    return fixed_sum(S * q, -2), S


def _normalised(o: torch.Tensor, eps: float) -> torch.Tensor:
    """o over its root mean square."""
    mean = fixed_sum(o.square(), -1) / o.shape[-1]
    return o * (mean + max(eps, FP32_TINY)).rsqrt()  # never of 0: a zero row must give zeros


def _silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) of a float32 x, which does not depend on the place of an element in the tensor."""
    return x * sigmoid(x)
