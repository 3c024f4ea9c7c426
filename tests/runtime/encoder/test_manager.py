"""`EncoderGraphManager` on a small encoder of known outputs, without graphs but with their buffers and padding."""

import json
import logging
import re
import threading
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from polyfuse import SpecError
from polyfuse.runtime.encoder.capture import EagerReplay
from polyfuse.runtime.encoder.forward import exact_forward
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, ItemSize, Rows
from polyfuse.runtime.packing.planner import Curve

WIDTH = 3
NAN = float("nan")


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
        assert (len(rows), len(size)) == (2 * capacity.tokens, capacity.items)
        assert size[:, 1].sum() <= capacity.frames
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

    def pretend() -> None:
        calibrate()
        made._budgets = [b._replace(cost=b.tokens + 10.0) for b in made._budgets]
        made._eager_seconds = Curve([(1, eager), (1001, 1001 * eager)])

    made._calibrate = pretend
    return made


def items(*tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-99, 99, (2 * n, WIDTH), generator=generator).float() for n in tokens]


def check(result: Mapping[str, torch.Tensor], given: list[torch.Tensor]) -> None:
    rows = torch.cat(given)
    assert torch.equal(result["rows"], 2 * rows)
    assert torch.equal(result["tokens"], rows.unflatten(0, (-1, 2)).sum(1).double())
    means = [x.unflatten(0, (-1, 2)).sum(1).double().mean(0).float() for x in given]
    torch.testing.assert_close(result["total"], torch.stack(means))
    assert all(x.isfinite().all() for x in result.values())


@pytest.mark.parametrize("policy", ["optimal", "greedy"])
@pytest.mark.parametrize("tokens", [(5,), (16,), (30, 30, 34, 34), (1, 63, 2, 8, 8, 8, 40), (7,) * 21])
def test_results_are_every_items_own_in_order(tokens: tuple[int, ...], policy: str) -> None:
    made, given = manager([16, 64], policy=policy), items(*tokens)
    check(made.execute(given), given)
    stats = made.stats
    assert (stats.requests, stats.items, stats.eager_batches, stats.tokens) == (1, len(tokens), 0, sum(tokens))
    assert stats.padding == sum(budget * n for budget, n in stats.replays.items()) - sum(tokens)


def test_packing_takes_fewer_replays_than_greedy() -> None:
    given = items(30, 30, 34, 34)
    counts = {}
    for policy in ("optimal", "greedy"):
        made = manager([64], policy=policy)
        made.execute(given)
        counts[policy] = made.stats.replays
    assert counts == {"optimal": Counter({64: 2}), "greedy": Counter({64: 3})}


def test_what_padding_holds_reaches_no_result() -> None:
    made, given = manager([64], max_items=4), items(30, 20)
    made.capture()
    made.fill_buffers(NAN)
    assert made.recompute(64)["rows"].isnan().all()
    check(made.execute(given), given)


def test_a_smaller_batch_after_a_larger_one() -> None:
    made = manager([64])
    for given in (items(10, 20, 30), items(4), items(9, 9, seed=1)):
        check(made.execute(given), given)


def test_results_are_the_callers_own() -> None:
    made, given = manager([16]), items(8, 3)
    first = made.execute(given)
    made.execute(items(8, 3, seed=1))
    check(first, given)
    first["rows"].fill_(NAN)
    check(made.execute(given), given)


@pytest.mark.parametrize("indices", [[2, 0], [1], [0, 1, 2, 3], [3, 1, 2]])
@pytest.mark.parametrize("eager", [100.0, 0.0], ids=["replayed", "eager"])
def test_some_of_the_items(indices: list[int], eager: float) -> None:
    made, given = manager([32], eager=eager), items(4, 6, 10, 3)
    check(made.run(made.encoder.request(given), indices), [given[i] for i in indices])
    assert made.stats.eager_batches == (eager == 0.0)


def test_what_fits_no_budget_runs_eagerly() -> None:
    made, given = manager([16]), items(3, 17, 4)
    check(made.execute(given), given)
    stats = made.stats
    assert (stats.eager_batches, stats.eager_items, stats.replays) == (1, 1, Counter({16: 1}))
    assert made.encoder.calls[-1] in (Capacity(17, 1, 1), Capacity(16, 16, 16))


def test_eager_wins_when_it_is_faster() -> None:
    made, given = manager([64], eager=0.0), items(3)
    check(made.execute(given), given)
    assert (made.stats.eager_items, made.stats.replays) == (1, Counter())


def test_more_items_than_a_budget_holds() -> None:
    made, given = manager([2, 16], max_items=4), items(*(1,) * 9)
    check(made.execute(given), given)
    assert sum(made.stats.replays.values()) >= 3


def test_budgets_need_not_divide_by_the_items() -> None:
    made, given = manager([7, 13], max_items=5), items(2, 2, 2, 7, 6, 6)
    check(made.execute(given), given)


def test_frames_limit_a_replay() -> None:
    made, given = manager([64], max_frames=8), items(10, 10, 10)
    check(made.execute(given, [8, 4, 4]), given)
    assert made.stats.replays == Counter({64: 2})
    check(made.execute(given), given)  # images on a graph captured for videos
    with pytest.raises(SpecError, match=re.escape("Doubler: frames: expected at most max_frames=8 in an item, got 9")):
        made.execute(given, [1, 9, 1])
    assert made.stats.requests == 2


def test_none_of_the_items() -> None:
    for settings in ({}, {"max_frames": 8}):
        made = manager([64], **settings)
        with pytest.raises(SpecError, match="sizes: expected at least one item, got none"):
            made.run(made.encoder.request(items(4)), [])


def test_without_a_frame_limit_a_long_video_runs_eagerly() -> None:
    made, given = manager([80], max_items=4), items(80)
    check(made.execute(given, [65]), given)
    check(made.execute(given, [64]), given)
    assert (made.stats.eager_items, made.stats.replays) == (1, Counter({80: 1}))


def test_several_threads() -> None:
    made = manager([16, 64])
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(20):
                given = items(1 + n, 5, 30 - n, seed=seed * 100 + n)
                check(made.execute(given), given)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert made.stats.requests == 80


def broken_requests() -> dict[str, tuple[Any, str]]:
    good = Doubler().request(items(3, 4))
    rows, size = good.tensors["rows"], good.tensors["size"]
    return {
        "no items": (EncoderRequest((), good.tensors), "request: expected at least one item, got none"),
        "empty item": (
            good._replace(sizes=(ItemSize(0), ItemSize(7))),
            "request: expected items of at least one token and one frame, got (0, 1)",
        ),
        "rows": (
            good._replace(tensors={"rows": rows[1:], "size": size}),
            "rows: expected shape [14, 3] for these items, got [13, 3]",
        ),
        "missing": (good._replace(tensors={"rows": rows}), "request: expected tensors rows, size, got rows"),
    }


@pytest.mark.parametrize("kind", broken_requests())
def test_bad_requests_change_nothing(kind: str) -> None:
    request, message = broken_requests()[kind]
    made = manager([16])
    made.execute(items(5))
    before = {name: buffer.clone() for name, buffer in made._inputs.items()}
    with pytest.raises(SpecError, match=re.escape("Doubler: " + message)):
        made.run(request)
    assert made.stats.requests == 1
    assert all(torch.equal(before[name], buffer) for name, buffer in made._inputs.items())


def test_a_budget_that_cannot_be_captured_is_dropped_with_one_warning() -> None:
    made, given = manager([8, 16, 32], Doubler(fail_at=(16,))), items(12)
    with pytest.warns(RuntimeWarning, match="no graph for the budget of 16 tokens: OutOfMemoryError: no room") as seen:
        check(made.execute(given), given)
    assert len(seen) == 1
    check(made.execute(given), given)
    assert (made.stats.capture_failures, made.stats.replays, set(made.stats.costs)) == (1, Counter({32: 2}), {8, 32})


def test_nothing_can_be_captured() -> None:
    class Broken(EagerReplay):
        def capture(self, step: Any) -> Any:
            raise RuntimeError("not here")

    made, given = EncoderGraphManager(Doubler(), runtime=Broken(torch.device("cpu")), budgets=[8, 16]), items(5, 9)
    with pytest.warns(RuntimeWarning, match="RuntimeError: not here"):
        check(made.execute(given), given)
    assert (made.stats.capture_failures, made.stats.eager_items) == (2, 2)


class Pool(EagerReplay):
    """Pretends that a pool takes as many bytes as the largest captured step's call had tokens."""

    def __init__(self, encoder: Doubler) -> None:
        super().__init__(torch.device("cpu"))
        self.encoder, self.size = encoder, 0

    def capture(self, step: Any) -> Any:
        replay = super().capture(step)
        self.size = max(self.size, self.encoder.calls[-1].tokens)
        return replay

    def pool_bytes(self) -> int:
        return self.size

    def reset(self) -> None:
        self.size = 0


def test_memory_bound_drops_the_largest_budgets() -> None:
    encoder = Doubler()
    made = EncoderGraphManager(encoder, runtime=Pool(encoder), budgets=[8, 16, 32], memory_bytes=20)
    with pytest.warns(RuntimeWarning, match="budget of 32 tokens: the pool takes 32 bytes with it, memory_bytes is 20"):
        made.capture()
    assert (set(made.stats.costs), made.stats.pool_bytes) == ({8, 16}, 16)


def test_largest_budget_is_captured_first() -> None:
    encoder = Doubler()
    EncoderGraphManager(encoder, budgets=[8, 32, 16]).capture()
    captured = list(dict.fromkeys(c.tokens for c in encoder.calls))
    assert captured == [32, 16, 8]


def test_lazy_capture() -> None:
    made = manager([8, 16, 32], capture="lazy")
    made.capture()
    assert set(made.stats.costs) == {32}
    given = items(6)
    check(made.execute(given), given)
    assert set(made.stats.costs) == {8, 32}
    assert made.stats.replays == Counter({8: 1})


def test_clear() -> None:
    made, given = manager([16]), items(5)
    made.execute(given)
    made.clear()
    stats = made.stats
    assert (stats.requests, stats.buffer_bytes, stats.costs) == (0, 0, {})
    check(made.execute(given), given)
    assert made.stats.requests == 1


def test_stats_are_a_copy_and_serialise() -> None:
    made = manager([16])
    made.execute(items(12))
    stats = made.stats
    stats.replays[16] += 5
    assert made.stats.replays == Counter({16: 1})
    assert made.stats.waste == 4 / 16
    assert json.loads(json.dumps(made.stats.as_dict())) | {"waste": 0.25, "replays": {"16": 1}} == json.loads(
        json.dumps(made.stats.as_dict())
    )
    assert made.stats.buffer_bytes == 32 * 12 + 16 * 16 + 32 * 12 + 16 * 24 + 16 * 12
    assert made.stats.capture_seconds > 0


def test_stats_are_logged_though_the_count_jumps(caplog: pytest.LogCaptureFixture) -> None:
    made = manager([4], log_every=2)
    with caplog.at_level(logging.INFO, logger="polyfuse"):
        for _ in range(4):
            made.execute(items(4, 4, 4))
    assert len(caplog.records) == 4
    assert "'requests': 1" in caplog.records[0].getMessage()


def test_predict_is_the_planners_cost() -> None:
    made = manager([16, 64])
    assert made.predict([ItemSize(5)]) == 26.0
    assert made.predict([ItemSize(16), ItemSize(16)]) == 52.0


def test_budgets_are_multiples_of_an_items_tokens() -> None:
    encoder = Doubler()
    encoder.token_multiple = 6
    with pytest.raises(
        SpecError, match=re.escape("Doubler: budgets: expected multiples of 6, its items' tokens, got [8]")
    ):
        EncoderGraphManager(encoder, budgets=[6, 8])
    automatic = EncoderGraphManager(encoder, smallest=6, largest=60)._capacities
    assert max(automatic) == 60
    assert all(tokens % 6 == 0 for tokens in automatic)


def test_wrong_output_shape_is_not_broadcast() -> None:
    class Short(Doubler):
        def forward(self, inputs: Any, capacity: Capacity) -> dict[str, torch.Tensor]:
            outputs = super().forward(inputs, capacity)
            return outputs | {"rows": outputs["rows"][:1]}

    with pytest.warns(RuntimeWarning, match=re.escape("rows: expected an output [32, 3], got [1, 3]")):
        EncoderGraphManager(Short(), budgets=[16]).capture()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": [3]}, "encoder: budget: Extra inputs are not permitted, got [3]; known keys are budgets, smallest"),
        ({"budgets": [0]}, "encoder: budgets.0: Input should be greater than or equal to 1, got 0"),
        ({"policy": "best"}, "encoder: policy: Input should be 'optimal' or 'greedy', got 'best'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        EncoderGraphManager(Doubler(), **settings)


def test_inference_mode_at_first_use() -> None:
    made, given = manager([16]), items(5)
    with torch.inference_mode():
        check(made.execute(given), given)
    given = items(7)
    check(made.execute(given), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(made.execute(given), given)


def test_a_budget_is_recomputed_from_what_its_inputs_hold() -> None:
    made, given = manager([16, 64], policy="greedy"), items(30, 20)
    result = made.execute(given)
    computed = made.recompute(64)
    assert {name: len(rows) for name, rows in computed.items()} == {"rows": 128, "tokens": 64, "total": 16}
    for name, rows in result.items():
        assert torch.equal(rows, computed[name][: len(rows)])
    with pytest.raises(SpecError, match=re.escape("Doubler: tokens: expected one of the budgets [16, 64], got 50")):
        made.recompute(50)


def test_an_exact_forward_computes_the_named_items_without_padding() -> None:
    encoder, given = Doubler(), items(5, 3, 4)
    request = encoder.request(given)
    check(exact_forward(encoder, request), given)
    check(exact_forward(encoder, request, [2, 0]), [given[2], given[0]])
    assert encoder.calls == [Capacity(12, 3, 3), Capacity(9, 2, 2)]


def test_other_threads_wait_for_the_end_of_an_exclusive_block() -> None:
    made, given = manager([16]), items(8)
    made.execute(given)
    thread = threading.Thread(target=made.execute, args=(given,))
    with made.exclusive():
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert made.stats.requests == 1
    thread.join()
    assert made.stats.requests == 2
