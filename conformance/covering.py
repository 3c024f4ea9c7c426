"""Rows in which every valid pair of values of two factors stands at least once.

A row gives each factor one of its values. `allpairspy` was tried in place of this: with constraints it leaves valid
pairs out (151 in a model of 24 factors with 7 constraints), and it cannot use the structure of a row again.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = tuple[int, ...]  # of each factor the number of its value
Item = tuple[int, int]  # the number of a factor, and of one of its values
Clause = frozenset[Item]  # items that no case has together
_Known = tuple[Clause, tuple[Item, ...]]
_MOST_STEPS = 3000  # of the search for one row, before its seed counts as impossible
_MOST_STRUCTURES = 4  # that are tried for a row, before a new one is made

ABSENT = "absent"  # of an optional array


@dataclass(frozen=True)
class Factor:
    """Something in which cases differ, and its values, of which the first is the usual one.

    Factors that are `structure` decide what a compiler sees: shapes, dtypes, attributes. The others, fills and layouts,
    give one structure several rows; those that are `content` say what arrays hold. `blank` are values with which there
    is nothing to see of the other factors, such as no rows at all. `under` names the factor of the optional array that
    this one is about: its value is None exactly where that is `ABSENT`. No row is refused for the value of a factor
    that is `free`.
    """

    name: str
    values: tuple[Any, ...]
    structure: bool = True
    under: str = ""
    content: bool = False
    free: bool = False
    blank: tuple[Any, ...] = ()

    @property
    def usual(self) -> tuple[int, ...]:
        """The numbers of None and of the usual value."""
        return (0, 1) if self.values[0] is None else (0,)


class Covering:
    """The rows over `factors`, of which those that are structure come first.

    `refusal(chosen)` says why the values of a row, by the names of the factors that are not free, make no case; else it
    gives an empty text. The first values of all factors make one. `needs` names factors that are absent or 0 where
    another is. What a refused row owes it to is found by changing one value at a time: `clauses` holds these sets of
    items with their reasons. `void` has the pairs that no case can have, each with its reasons; `rows` all rows, each
    under the pair that it was made for.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        refusal: Callable[[Mapping[str, Any]], str],
        needs: Mapping[str, str] | None = None,
    ) -> None:
        self.factors, self._refusal = factors, refusal
        self._starts = [int(n) for n in np.cumsum([0, *(len(f.values) for f in factors)])]
        self._ruled = [n for n, factor in enumerate(factors) if not factor.free]
        self._blank = {(n, v) for n, f in enumerate(factors) for v, value in enumerate(f.values) if value in f.blank}
        self._refusals: dict[Row, str] = {}
        # By an item, clauses and what else is in them; all that it is in, and those of which it is the last one.
        self._by_item: dict[Item, list[_Known]] = {}
        self._by_last: dict[Item, list[_Known]] = {}
        self._linked: dict[int, set[int]] = {}
        self.clauses: dict[Clause, str] = {}
        self._owners = {}
        for number, factor in enumerate(factors):
            if factor.under:
                self._owners[number] = next(n for n, f in enumerate(factors) if f.name == factor.under)
        for clause in self._without_owners():
            self._add(clause, "")
        for name, other in (needs or {}).items():
            for clause in self._without(name, other):
                self._add(clause, f"{name} without {other}")
        self._base = self._normal([0] * len(factors), ())
        reason = self.refused(self._base)
        if reason:
            raise ValueError(f"the first values of all factors make no case: {reason}")
        self.void: dict[tuple[Item, Item], tuple[str, ...]] = {}
        self.rows = dict(self._cover())

    def chosen(self, row: Row) -> dict[str, Any]:
        """The values of a row, by their factors' names."""
        return {factor.name: factor.values[n] for factor, n in zip(self.factors, row, strict=True)}

    def refused(self, row: Row) -> str:
        """Why the row is no case, or an empty text."""
        values = tuple(row[n] for n in self._ruled)
        if values not in self._refusals:
            factors = (self.factors[n] for n in self._ruled)
            self._refusals[values] = self._refusal({f.name: f.values[n] for f, n in zip(factors, values, strict=True)})
        return self._refusals[values]

    def value(self, item: Item) -> tuple[str, Any]:
        """The name of a factor, and a value of it."""
        factor = self.factors[item[0]]
        return factor.name, factor.values[item[1]]

    def _cover(self) -> Iterator[tuple[tuple[Item, Item], Row]]:
        counts = [len(f.values) for f in self.factors]
        owner = np.repeat(np.arange(len(counts)), counts)
        self._open: NDArray[np.bool_] = owner[:, None] != owner[None, :]
        self._used: Counter[Item] = Counter()
        structures = sum(f.structure for f in self.factors)
        kept: dict[Row, None] = {}
        for factors in (structures, len(self.factors)):
            while (seed := self._next(self._starts[factors])) is not None:
                reasons: set[str] = set()
                starts = self._fitting(seed, kept, structures) if factors > structures else []
                plain = factors == structures  # the pairs of structures are seen with the usual content
                found = (self._row(dict(seed) | start, reasons, plain) for start in [*starts, {}])
                row = next(filter(None, found), None)
                if row is None:
                    self.void[seed] = tuple(sorted(reasons - {""}))
                    self._close(seed)
                    continue
                kept[row[:structures]] = None
                self._close_shown(row)
                self._used.update(enumerate(row))
                yield seed, row

    def _next(self, end: int) -> tuple[Item, Item] | None:
        """The first pair of the first `end` items that no row has yet."""
        rows, columns = np.nonzero(self._open[:end, :end])
        return (self._item(int(rows[0])), self._item(int(columns[0]))) if len(rows) else None

    def _item(self, place: int) -> Item:
        factor = int(np.searchsorted(self._starts, place, side="right")) - 1
        return factor, place - self._starts[factor]

    def _close(self, items: Sequence[Item]) -> None:
        places = [self._starts[f] + v for f, v in items]
        self._open[np.ix_(places, places)] = False

    def _close_shown(self, row: Row) -> None:
        """Close the pairs that the row shows."""
        items = tuple(enumerate(row))
        blank = self._blank.intersection(items)
        for item in blank:
            for other in items:
                self._close((item, other))
        if not blank:
            self._close(items)

    def shown(self, row: Row) -> Iterator[tuple[Item, Item]]:
        """The pairs that a row shows: with a blank value those of that value alone."""
        items = tuple(enumerate(row))
        blank = self._blank.intersection(items)
        return ((a, b) for a, b in combinations(items, 2) if not blank or a in blank or b in blank)

    def _fitting(self, seed: tuple[Item, Item], kept: Mapping[Row, None], structures: int) -> list[dict[int, int]]:
        """Structures that go with the seed, of which those with the most open pairs come first."""
        wanted = [(f, v) for f, v in seed if f < structures]
        found = [row for row in kept if all(row[f] == v for f, v in wanted)]
        blank = self._blank.difference(seed)
        found = [row for row in found if blank.isdisjoint(enumerate(row))]
        found = [row for row in found if not self._broken_by(seed, dict(enumerate(row)) | dict(seed))]
        first = self._starts[structures]
        opened = self._open[:first, first:].sum(1)
        found.sort(key=lambda row: -int(sum(opened[self._starts[f] + v] for f, v in enumerate(row))))
        return [dict(enumerate(row)) for row in found[:_MOST_STRUCTURES]]

    def _row(self, start: Mapping[int, int], reasons: set[str], plain: bool) -> Row | None:
        """A case with these values; what stood in the way is added to the reasons."""
        while (row := self._completed(start, reasons, plain)) is not None:
            reason = self.refused(row)
            if not reason:
                return row
            self._learn(row)
        return None

    def _completed(self, start: Mapping[int, int], reasons: set[str], plain: bool) -> Row | None:
        """A row with these values and with many open pairs, that has no clause; with usual content if `plain`.

        It has no other blank values: they would hide these.
        """
        chosen = dict(start)
        broken = self._broken(chosen)
        if broken is not None:
            reasons.add(self.clauses[broken])
            return None
        order = self._nearest_first(chosen)
        places = [self._starts[f] + v for f, v in chosen.items()]
        gains = self._open[places].sum(0) if places else np.zeros(self._starts[-1], np.int64)
        steps = 0

        def descend(depth: int, gains: NDArray[np.int64]) -> bool:
            nonlocal steps
            if depth == len(order):
                return True
            number = order[depth]
            first, end = self._starts[number : number + 2]
            own = gains[first:end].tolist()
            factor = self.factors[number]
            values = factor.usual if plain and factor.content else range(len(factor.values))
            seen = [value for value in values if (number, value) not in self._blank]
            for value in sorted(seen, key=lambda v: (-own[v], self._used[number, v], v)):
                steps += 1
                if steps > _MOST_STEPS:
                    return False
                broken = self._broken_by([(number, value)], chosen)
                if broken is not None:
                    reasons.add(self.clauses[broken])
                    continue
                chosen[number] = value
                if descend(depth + 1, gains + self._open[first + value]):
                    return True
                del chosen[number]
            return False

        return tuple(chosen[n] for n in range(len(self.factors))) if descend(0, gains) else None

    def _nearest_first(self, chosen: Mapping[int, int]) -> list[int]:
        """The other factors, of which those that share clauses with the chosen ones come first: they may not go."""
        distance = dict.fromkeys(chosen, 0)
        reached = list(chosen)
        for number in reached:
            for other in sorted(self._linked.get(number, ())):
                if other not in distance:
                    distance[other] = distance[number] + 1
                    reached.append(other)
        others = (n for n in range(len(self.factors)) if n not in chosen)
        return sorted(others, key=lambda n: (distance.get(n, len(self.factors)), n))

    def _broken(self, chosen: Mapping[int, int]) -> Clause | None:
        for item in chosen.items():
            clauses = self._by_last.get(item)
            clause = _among(clauses, chosen) if clauses else None
            if clause:
                return clause
        return None

    def _broken_by(self, items: Iterable[Item], chosen: Mapping[int, int]) -> Clause | None:
        """A clause that one of the items completes beside the chosen ones."""
        for item in items:
            clauses = self._by_item.get(item)
            clause = _among(clauses, chosen) if clauses else None
            if clause:
                return clause
        return None

    def _add(self, clause: Clause, reason: str) -> None:
        self.clauses[clause] = reason
        for item in clause:
            known = clause, tuple(clause - {item})
            self._by_item.setdefault(item, []).append(known)
            if item == max(clause):
                self._by_last.setdefault(item, []).append(known)
            self._linked.setdefault(item[0], set()).update(number for number, _ in clause)

    def _without_owners(self) -> Iterator[Clause]:
        """None for what is about an array that is there, and anything else for one that is not."""
        for number, owner in self._owners.items():
            for value, meant in enumerate(self.factors[number].values):
                for other, given in enumerate(self.factors[owner].values):
                    if (meant is None) != (given == ABSENT):
                        yield frozenset(((number, value), (owner, other)))

    def _without(self, name: str, other: str) -> Iterator[Clause]:
        """The first factor there, and the second absent or 0."""
        numbers = {factor.name: n for n, factor in enumerate(self.factors)}
        first, second = numbers[name], numbers[other]
        for given in (n for n, v in enumerate(self.factors[first].values) if v not in (ABSENT, 0)):
            for missing in (n for n, v in enumerate(self.factors[second].values) if v in (ABSENT, 0)):
                yield frozenset(((first, given), (second, missing)))

    def _normal(self, row: list[int], fixed: Sequence[int]) -> Row:
        """The row with None for what is about an array that is not there, and a value where it is; `fixed` stay."""
        for number, owner in self._owners.items():
            absent = self.factors[owner].values[row[owner]] == ABSENT
            if (self.factors[number].values[row[number]] is None) != absent and number not in fixed:
                values = self.factors[number].values
                row[number] = next(n for n, value in enumerate(values) if (value is None) == absent)
        return tuple(row)

    def _learn(self, row: Row) -> None:
        """Add the clause that refuses a row: the values of which another one would make it a case.

        Several clauses may refuse it. Then more and more of the other values are the usual ones, until one is left. If
        that never is so, the row alone is ruled out.
        """
        now: Row | None = row
        while now is not None:
            items = self._mattering(now)
            clause = self._isolated(items)
            if clause:
                self._add(clause, self.refused(self._alone(clause)))
                if clause <= set(enumerate(row)):
                    return
            usual = (self._usual(now, n) for n, v in enumerate(now) if v != self._base[n] and n not in dict(items))
            fit = (trial for trial in usual if not self._broken(dict(enumerate(trial))))
            now = next((trial for trial in fit if self.refused(trial)), None)
        self._add(frozenset(enumerate(row)), f"no one of several reasons, such as {self.refused(row)}")

    def _isolated(self, items: Clause) -> Clause | None:
        """The clause that these items break beside usual values; None if they break none."""
        for _ in self.factors:
            alone = self._alone(items)
            if not items or not self.refused(alone):
                return None
            mattering = self._mattering(alone)
            if mattering == items:
                return items
            items = mattering  # of two clauses, what both have is left: that alone breaks one of them
        return None

    def _alone(self, items: Clause) -> Row:
        """The row with these items, whose other values are the usual ones."""
        return self._normal([dict(items).get(n, v) for n, v in enumerate(self._base)], [n for n, _ in items])

    def _mattering(self, row: Row) -> Clause:
        items = frozenset(enumerate(row))
        broken = [clause for clause in self.clauses if clause <= items]
        return frozenset((n, row[n]) for n in self._ruled if self._matters(row, n, broken))

    def _usual(self, row: Row, number: int) -> Row:
        """The row with the usual value of one factor."""
        return self._normal([*row[:number], self._base[number], *row[number + 1 :]], ())

    def _matters(self, row: Row, number: int, broken: Sequence[Clause]) -> bool:
        """Whether another value of that factor makes the row a case, which has the broken clauses."""
        for value in range(len(self.factors[number].values)):
            if value == row[number]:
                continue
            trial = self._normal([*row[:number], value, *row[number + 1 :]], (number,))
            items = dict(enumerate(trial))
            if any(clause <= items.items() for clause in broken):
                continue
            changed = (item for item, before in zip(items.items(), row, strict=True) if item[1] != before)
            if not self._broken_by(changed, items) and not self.refused(trial):
                return True
        return False


def _among(clauses: Sequence[_Known], chosen: Mapping[int, int]) -> Clause | None:
    """The first of these clauses that has no other items than the chosen ones."""
    for clause, others in clauses:
        for factor, value in others:
            if chosen.get(factor) != value:
                break
        else:
            return clause
    return None
