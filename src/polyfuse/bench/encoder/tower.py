"""One request of each of four sizes: through the untouched model, uncaptured, and in graphs of exactly its size."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from polyfuse.bench.subjects.vision import Request, VisionModel, uncaptured
from polyfuse.bench.timing import Call
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.watch import Watch

# 256, 1024 and 4096 patches of one image, and 15,048 of eight.
TOWER: tuple[Request, ...] = (
    [[1, 16, 16]],
    [[1, 32, 32]],
    [[1, 64, 64]],
    [[1, h, w] for h, w in ((60, 80), (14, 20), (46, 68), (24, 38), (32, 32), (56, 60), (26, 40), (18, 28))],
)
CALLS, WARM_UP = 20, 5


@dataclass(frozen=True)
class TowerRow:
    """One way to run one request. `ms` is the median latency, `device_ms` the time per call of calls in a row.

    `equal` is whether a replay gives the bits of the uncaptured forward on the same buffers. `difference` is how far
    each output is from the untouched model's, in norm, as a share of that one's.
    """

    rows: int
    items: int
    variant: str
    ms: float
    device_ms: float
    equal: bool | None = None
    difference: Mapping[str, float] = field(default_factory=dict)


def measure_tower(subject: VisionModel) -> Iterator[TowerRow]:
    """Measure requests of four sizes: `TOWER`, or 1, 2, 4 and 8 images for a model of a fixed resolution.

    The sides of a tiny model's images are a quarter as long.
    """
    requests = _requests(subject)
    subject.reserve(max(map(subject.rows, requests)))
    adapter = subject.encoder(False)
    encoders = {"graph": adapter} | ({"graph, compiled blocks": subject.encoder(True)} if subject.captures else {})
    budgets = [subject.tokens(request) for request in requests]
    # Greedy takes the smallest budget that holds a request: its own, whatever was measured.
    managers = {name: EncoderGraphManager(e, budgets=budgets, policy="greedy") for name, e in encoders.items()}
    # As accelerate() runs it: what the comparison with the model adds to a request is the difference to the row before.
    name, encoder = list(encoders.items())[-1]
    watch = Watch(subject.model)
    managers[f"{name}, watched"] = EncoderGraphManager(encoder, watch=watch, budgets=budgets, policy="greedy")
    for request in requests:
        given = subject.arguments(request)
        untouched = partial(subject.untouched, *given)
        theirs = _tensors(untouched())
        yield _row(subject, request, "untouched", untouched)
        yield _row(subject, request, "adapter", partial(uncaptured, adapter, *given))
        for name, manager in managers.items():
            ours = _tensors(manager.execute(*given))
            equal = equals_uncaptured(manager, given, subject.tokens(request))
            difference = {key: _difference(theirs[key], ours[key]) for key in theirs}
            yield _row(subject, request, name, partial(manager.execute, *given), equal, difference)
    for manager in managers.values():
        manager.clear()


def equals_uncaptured(manager: EncoderGraphManager, given: Sequence[torch.Tensor], budget: int) -> bool:
    """Whether a request is replayed in the budget, and gives the bits that the forward gives on the buffers it read."""
    before = manager.stats.replays[budget]
    replayed = manager.run(manager.encoder.request(*given))
    if manager.stats.replays[budget] == before:
        return False
    computed = manager.recompute(budget)
    return all(torch.equal(rows, computed[name][: len(rows)]) for name, rows in replayed.items())


def _requests(subject: VisionModel) -> Sequence[Request]:
    if subject.fixed:
        return [[[1, 1, 1]] * images for images in (1, 2, 4, 8)]
    if subject.tiny:
        return [[[t, h // 8 * 2, w // 8 * 2] for t, h, w in request] for request in TOWER]
    return TOWER


def _row(
    subject: VisionModel,
    request: Request,
    variant: str,
    call: Call,
    equal: bool | None = None,
    difference: Mapping[str, float] | None = None,
) -> TowerRow:
    clock = subject.clock
    latency = clock.latency_ms(call, CALLS, clock.repeats(WARM_UP))
    in_a_row = clock.row_ms(call, clock.repeats(CALLS))
    rows = subject.rows(request)
    return TowerRow(rows, len(request), variant, round(latency, 4), round(in_a_row, 4), equal, difference or {})


def _tensors(result: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a model returned, with lists of tensors taken apart."""
    tensors = {}
    for name, value in result.items():
        for i, tensor in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            tensors[f"{name}_{i}" if i else name] = tensor
    return tensors


def _difference(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new.double() - old.double()).norm() / old.double().norm())
