"""`gated_delta_rule` in PyTorch, in the chunked form that the docstring of `polyfuse.spec.gated_delta_rule` gives.

Each sequence's rows lie in slots of 64 of their own, zeros behind them: within slots all is computed at once, and
then the state goes from slot to slot. Nothing is read back to the host: sequence s begins at slot
cu_seqlens[s] // 64 + s, so that no two share one, and rows // 64 + sequences slots are enough.

Off a CPU a call computes as many slots at a time as any other, some of which may be empty: libraries pick their kernels
for products and triangular systems by how many there are, and a sequence has the same bits in every batch.
"""

import torch

from polyfuse.spec import Capability
from polyfuse.spec.gated_delta_rule import CHUNK, LEAST_G
from polyfuse.torch_impl._pools import Slots

CAPABILITY = Capability()

BLOCK = 16  # slots that are computed at a time off a CPU


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    state_pool: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [L, HV, V], rounded once, and final_state [F, HV, K, V]. A pool is updated."""
    rows, heads_v, width_v = v.shape
    width = q.shape[2]
    # Made on the device: a tensor of host values would be copied there, which a graph cannot hold.
    ends = torch.arange(2, device=v.device) * rows if cu_seqlens is None else cu_seqlens.contiguous()
    count = len(ends) - 1
    slots = rows // CHUNK + count
    block = block_of(slots, v.device)
    allocated = -(-slots // block) * block
    places = _places(ends, rows, slots)
    numbers = _sequence_of_slot(ends, slots)
    # A slot without rows would take a NaN of the state through its whole column.
    used = torch.zeros(slots + 1, dtype=torch.bool, device=v.device).index_fill_(0, places // CHUNK, True)
    begins = numbers != torch.cat([numbers.new_full((1,), -1), numbers[:-1]])

    def in_slots(x: torch.Tensor) -> torch.Tensor:
        """[L, heads, ...] as fp32 [allocated slots, heads, 64, ...]; rows of no sequence are left out."""
        wide = x.new_zeros((allocated * CHUNK + 1, *x.shape[1:]), dtype=torch.float32)
        wide.index_copy_(0, places, x.float())
        return wide[:-1].unflatten(0, (allocated, CHUNK)).transpose(1, 2)

    factor = max(width, 1) ** -0.5 if scale is None else scale
    group = heads_v // max(q.shape[1], 1)
    queries, keys = (in_slots(x).repeat_interleave(group, 1) for x in (q, k))
    whole = queries, keys, in_slots(v), in_slots(g), in_slots(beta)

    shape = (count, heads_v, width, width_v)
    first = torch.zeros(shape, dtype=torch.float32, device=v.device) if initial_state is None else initial_state
    owned = None
    if state_pool is not None:
        owned = Slots(state_pool, state_indices, count)
        first = owned.read(has_initial_state).float()
    last = torch.zeros(shape, dtype=torch.float32, device=v.device)
    o = torch.zeros(slots * CHUNK + 1, heads_v, width_v, dtype=torch.float32, device=v.device)
    state = torch.zeros(shape[1:], dtype=torch.float32, device=v.device)
    for begin in range(0, slots, block):
        parts = _within_slots(*(x[begin : begin + block] for x in whole))
        for slot, u, w, mix, seen, kept, decay in zip(range(begin, slots), *parts, strict=False):
            number = numbers[slot : slot + 1]
            state = torch.where(begins[slot], first.index_select(0, number)[0], state)
            d = u - w @ state
            own = seen @ state + mix @ d  # [HV, 64, V]
            o[slot * CHUNK : (slot + 1) * CHUNK] = factor * own.transpose(0, 1)
            state = torch.where(used[slot], decay * state + kept.mT @ d, state)
            # What follows in the same sequence writes over it.
            last.index_copy_(0, number, state[None])
    if owned is not None:
        owned.write(last)
    return o.index_select(0, places).to(v.dtype), last if output_final_state else last[:0]


def block_of(slots: int, device: torch.device) -> int:
    """How many slots are computed at a time."""
    return max(slots, 1) if device.type == "cpu" else BLOCK


def _places(ends: torch.Tensor, rows: int, slots: int) -> torch.Tensor:
    """Where each row [L] lies in all slots' rows; behind them if it is of no sequence."""
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    number = torch.searchsorted(ends, row, right=True) - 1
    start = ends[number.clamp(min=0)]
    place = (start // CHUNK + number) * CHUNK + row - start
    return torch.where((number >= 0) & (number < len(ends) - 1), place, slots * CHUNK)


def _sequence_of_slot(ends: torch.Tensor, slots: int) -> torch.Tensor:
    """The sequence [slots] of each slot; slots before the first one and behind the last one count to those."""
    starts = ends[:-1] // CHUNK + torch.arange(len(ends) - 1, device=ends.device)
    number = torch.searchsorted(starts, torch.arange(slots, device=ends.device), right=True) - 1
    return number.clamp(min=0)


def _within_slots(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """u, w, P, exp(G) q and decay[last] k of all slots [slots, HV, 64, ...], and the decay of the state over each."""
    total = g.clamp(min=LEAST_G).cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).exp().tril()
    before, after = total.exp()[..., None], decay[..., -1, :, None]
    matrix = beta[..., None] * decay * (k @ k.mT)
    right = beta[..., None] * torch.cat([v, before * k], dim=-1)
    solved = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return u, w, decay * (q @ k.mT), before * q, after * k, before[..., -1:, :]
