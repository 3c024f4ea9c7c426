"""A small encoder of known outputs, and managers of it in which every time is known."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, ItemSize, Rows
from polyfuse.runtime.packing.planner import Curve

WIDTH = 3


class Doubler:
    """Two rows a token: `rows` is twice the input, `tokens` the sum of a token's rows, `total` an item's mean row."""

    name, token_multiple, device = "Doubler", 1, torch.device("cpu")
    inputs: ClassVar = {
        "rows": BufferSpec(Rows(per_token=2), (WIDTH,), torch.float32),
        "size": BufferSpec(Rows(per_item=1), (2,), torch.int64, zero=True),
    }
    outputs: ClassVar = {
        "rows": BufferSpec(Rows(per_token=2), (WIDTH,), torch.float32),
        "tokens": BufferSpec(Rows(per_token=1), (WIDTH,), torch.float64),
        "total": BufferSpec(Rows(per_item=1), (WIDTH,), torch.float32),
    }

    def __init__(self, fail_at: tuple[int, ...] = ()) -> None:
        self.fail_at = fail_at
        self.calls: list[Capacity] = []
        self.examples: list[int] = []

    def request(self, items: list[torch.Tensor], frames: list[int] | None = None) -> EncoderRequest:
        sizes = tuple(ItemSize(len(x) // 2, f) for x, f in zip(items, frames or [1] * len(items), strict=True))
        return EncoderRequest(sizes, {"rows": torch.cat(items or [torch.empty(0, WIDTH)]), "size": torch.tensor(sizes)})

    def example(self, tokens: int) -> EncoderRequest:
        self.examples.append(tokens)
        return self.request([torch.zeros(2 * tokens, WIDTH)])

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> dict[str, torch.Tensor]:
        if capacity.tokens in self.fail_at:
            raise torch.OutOfMemoryError("no room")
        self.calls.append(capacity)
        rows, size = inputs["rows"], inputs["size"]
        if (len(rows), len(size)) != (2 * capacity.tokens, capacity.items) or size[:, 1].sum() > capacity.frames:
            raise AssertionError(f"{len(rows)} rows and {size.tolist()} do not fit {capacity}")
        ends = size[:, 0].cumsum(0)
        member = torch.arange(capacity.tokens)[None] < ends[:, None]
        member &= torch.arange(capacity.tokens)[None] >= (ends - size[:, 0])[:, None]
        tokens = rows.unflatten(0, (-1, 2)).sum(1).double()
        total = torch.stack([tokens[own].mean(0).float() for own in member])
        return {"rows": 2 * rows, "tokens": tokens, "total": total}

    def result(self, outputs: Mapping[str, torch.Tensor], request: EncoderRequest) -> Mapping[str, torch.Tensor]:
        return outputs


def manager(budgets: list[int], encoder: Doubler | None = None, eager: float = 100.0, **settings: Any) -> Any:
    """A manager in which a replay costs its budget and ten, and an eager call `eager` a token."""
    made: Any = EncoderGraphManager(encoder or Doubler(), budgets=budgets, **settings)
    calibrate = made._calibrate

    def pretend() -> Curve:
        calibrate()
        made._budgets = [b._replace(cost=b.tokens + 10.0) for b in made._budgets]
        return Curve([(1, eager), (1001, 1001 * eager)])

    made._calibrate = pretend
    return made


def items(*tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """The rows of items of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-99, 99, (2 * n, WIDTH), generator=generator).float() for n in tokens]


def check(result: Mapping[str, torch.Tensor], given: list[torch.Tensor]) -> None:
    """The outputs of the given items, in order: equal but for the means, which are close, and all finite."""
    rows = torch.cat(given)
    torch.testing.assert_close(result["rows"], 2 * rows, rtol=0, atol=0)
    torch.testing.assert_close(result["tokens"], rows.unflatten(0, (-1, 2)).sum(1).double(), rtol=0, atol=0)
    means = [x.unflatten(0, (-1, 2)).sum(1).double().mean(0).float() for x in given]
    torch.testing.assert_close(result["total"], torch.stack(means))
    for name, values in result.items():
        if not values.isfinite().all():
            raise AssertionError(f"{name}: {values}")
