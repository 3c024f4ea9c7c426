"""`gdn_in_proj` by each of its strategies, and which of them it chooses by itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import polyfuse
from polyfuse.bench.subjects.text import TextModel
from polyfuse.dispatch import registry
from polyfuse.integrations.transformers import projection_weights
from polyfuse.runtime import choose_projection_strategy, stack_weights
from polyfuse.spec.gdn_in_proj import STRATEGIES

NAMED = STRATEGIES[1:]  # all but `auto`


@dataclass(frozen=True)
class StrategyRow:
    """`gdn_in_proj` on rows of the layer's sizes: what `auto` chose, and microseconds per call of every strategy.

    It is device time in a graph if `captured`, else wall time of calls in a row. The weights are the layer's own, and
    for `merged` a stacked copy of them.
    """

    rows: int
    captured: bool
    chosen: str
    us: Mapping[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{name} {us:.1f} us" for name, us in self.us.items())
        return f"gdn_in_proj, {self.rows} rows, {'captured' if self.captured else 'eager'}: {times}"


def measure_strategies(subject: TextModel, counts: Sequence[int]) -> Iterator[StrategyRow]:
    """Measure every strategy that the chosen backend has, for each number of rows."""
    clock = subject.clock
    weights = projection_weights(subject.layer)
    stacked = dict(zip(weights, stack_weights(*weights.values()), strict=True))
    for rows in counts:
        x = subject.hidden(1, rows)[0]
        backend = registry().get(str(polyfuse.explain("gdn_in_proj", x, **weights).winner))
        claimed = backend.load("gdn_in_proj").capability.attrs.get("strategy", STRATEGIES)
        names = tuple(name for name in NAMED if name in claimed)
        calls = {}
        for name in names:
            strategy: Any = name  # one of the literals that the function's type lists
            given = stacked if name == "merged" else weights
            calls[name] = partial(polyfuse.gdn_in_proj, x, **given, strategy=strategy)
        in_a_row = partial(clock.queue_us, calls=clock.repeats(20), rounds=5, warm_up=2)
        walls = {name: round(in_a_row(call), 3) for name, call in calls.items()}
        yield StrategyRow(rows, False, choose_projection_strategy(x, available=names, **weights), walls)
        if subject.captures:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                chosen = choose_projection_strategy(x, available=names, **weights)
                x.clone()  # an empty graph is warned of
            replays = {name: round(clock.device_us(call), 3) for name, call in calls.items()}
            yield StrategyRow(rows, True, chosen, replays)
