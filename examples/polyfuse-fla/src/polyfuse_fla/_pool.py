"""A pool of states, from whose slots FLA's initial states come and into which its final states go."""

import torch


class Slots:
    """The slots that the sequences of a call own. Nothing is read back to the host."""

    def __init__(self, pool: torch.Tensor, indices: torch.Tensor | None, sequences: int) -> None:
        self.pool, self.indices = pool, indices
        if indices is not None:
            self.owned = (indices >= 0) & (indices < len(pool))
            # A sequence without a slot repeats what one that has a slot does.
            leader = torch.where(self.owned, torch.arange(sequences, device=pool.device), self.owned.int().argmax())
            self.leader, self.slots = leader, indices.long().clamp(0, len(pool) - 1)[leader]
        self.held = pool[:sequences] if indices is None else pool[self.slots]

    def read(self, has_initial_state: torch.Tensor | None) -> torch.Tensor:
        """The states [S, HV, K, V] that the sequences begin with, in float32."""
        known = has_initial_state
        if self.indices is not None:
            known = self.owned if known is None else self.owned & known
        states = self.held.float()
        return states if known is None else states.masked_fill(~known[:, None, None, None], 0)

    def write(self, states: torch.Tensor) -> None:
        """Leave the sequences' last states in their slots."""
        if self.indices is None:
            self.held.copy_(states)
            return
        # Where nobody has a slot, all write back what one of them holds.
        any_owned = self.owned[self.leader][:, None, None, None]
        self.pool[self.slots] = torch.where(any_owned, states[self.leader].to(self.pool.dtype), self.held)
