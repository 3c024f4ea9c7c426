"""`Subsets`: which sums of tokens the items of a request can have together, for filling a budget as far as possible."""

from collections.abc import Sequence

_MOST_BITS = 6000  # of the integers that hold subset sums


class Subsets:
    """Which sums of tokens, and of units where their limit can bind, items can have together, as bits of integers.

    Bit `grains * stride + units` stands for a sum; adding an item to all sums at once is a shift and an OR, so that n
    items take n operations on integers of at most about 6000 bits. A grain is one token, or more to keep the integers
    that short: then every item is rounded down, and a sum may be too low.
    """

    def __init__(
        self, tokens: Sequence[int], units: Sequence[int], items: Sequence[int], room: int, limit: int | None
    ) -> None:
        """Items by descending tokens; together at most `room` tokens and, unless None, `limit` units."""
        self.counts_units = limit is not None
        limit = limit or 0
        self._stride = stride = limit + 1
        self.grain = grain = 1 + room * stride // _MOST_BITS
        every_row = ((1 << (room // grain + 1) * stride) - 1) // ((1 << stride) - 1)  # bit 0 of each `stride` bits
        within_limit: dict[int, int] = {}  # by an item's units: the sums that it can join
        self._steps: list[tuple[int, int, int]] = []  # an item, its bit, the sums of the smaller ones
        sums = 1
        for i in reversed(items):
            unit = units[i] if self.counts_units else 0
            if tokens[i] > room or unit > limit:
                continue
            if unit not in within_limit:
                within_limit[unit] = every_row * ((1 << stride - unit) - 1)
            bit = tokens[i] // grain * stride + unit
            self._steps.append((i, bit, sums))
            sums |= (sums & within_limit[unit]) << bit
        self._sums = sums

    def largest(self, room: int, limit: int) -> tuple[int, int]:
        """The most grains within `room` tokens and `limit` units, and the most units with that many."""
        stride = self._stride
        view = self._sums & ((1 << (room // self.grain + 1) * stride) - 1)
        if not self.counts_units:
            return view.bit_length() - 1, 0
        allowed = (1 << limit + 1) - 1
        while True:
            grains = (view.bit_length() - 1) // stride
            row = view >> grains * stride
            if row & allowed:
                return grains, (row & allowed).bit_length() - 1
            view ^= row << grains * stride

    def items(self, grains: int, units: int) -> list[int]:
        """Items with these sums, large ones where there is a choice."""
        left = grains * self._stride + units
        chosen = []
        for i, bit, sums in reversed(self._steps):
            if left >= bit and sums >> left - bit & 1:
                chosen.append(i)
                left -= bit
        return chosen
