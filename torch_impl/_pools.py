"""The slots of a pool of states, from which sequences begin and into which they leave their states."""

import torch


class Slots:
    """The slots [S] of a pool that the sequences own. Nothing is read back to the host."""

    def __init__(self, pool: torch.Tensor, indices: torch.Tensor | None, sequences: int) -> None:
        self.indices = indices
        if indices is None:
            self.states = pool[:sequences]
            return
        self.pool, self.owns = pool, (indices >= 0) & (indices < len(pool))  # [S]
        # A sequence without a slot does what one does that has a slot: both write the same there.
        self.same_as = torch.where(self.owns, torch.arange(sequences, device=pool.device), self.owns.int().argmax())
        self.slots = indices.long().clamp(0, len(pool) - 1)[self.same_as]
        self.states = pool.index_select(0, self.slots)

    def read(self, has_initial_state: torch.Tensor | None) -> torch.Tensor:
        """What the sequences find in their slots [S, ...]: zeros without one, or without an initial state."""
        valid = has_initial_state
        if self.indices is not None:
            valid = self.owns if valid is None else self.owns & valid
        return self.states if valid is None else self.states.masked_fill(~_along(valid, self.states), 0)

    def write(self, new: torch.Tensor) -> None:
        """Put the sequences' new states [S, ...] into their slots."""
        if self.indices is None:
            self.states.copy_(new)
            return
        # Where no sequence has a slot, all of them write what they found in one.
        new = torch.where(_along(self.owns[self.same_as], new), new.to(self.pool.dtype)[self.same_as], self.states)
        self.pool.index_copy_(0, self.slots, new)


def _along(flags: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Flags [S] in as many dimensions as states [S, ...] have."""
    return flags.view(-1, *[1] * (states.dim() - 1))
