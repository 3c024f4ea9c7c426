"""`EncoderGraphManager`: any `GraphableEncoder` in graphs, one per token budget, all over the same static buffers.

A request is partitioned into replays by predicted time (`polyfuse.runtime.packing`); each replay's rows are copied into
the static inputs, its budget's graph is replayed, and the items' rows are copied out to their places in fresh results.
"""

import logging
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from polyfuse.configs import EncoderConfig, encoder_config
from polyfuse.runtime.encoder.buffers import Tensors, allocate, check_request, gather, load, scatter, views
from polyfuse.runtime.encoder.capture import GraphRuntime, Step, graph_runtime
from polyfuse.runtime.encoder.forward import exact_forward, forward
from polyfuse.runtime.encoder.padding import reads_padding
from polyfuse.runtime.encoder.protocol import Capacity, EncoderRequest, GraphableEncoder, ItemSize
from polyfuse.runtime.encoder.stats import EncoderStats
from polyfuse.runtime.encoder.watch import Watch
from polyfuse.runtime.packing.planner import Batch, Budget, Curve, plan_packing, predicted_time, suggest_budgets
from polyfuse.spec import SpecError, Unsupported, fail

EAGER_POINTS = 6  # sizes at which eager calls are measured
FRAMES = 64  # attention segments of a replay, if not configured

log = logging.getLogger("polyfuse")


class EncoderGraphManager:
    """Runs an encoder in graphs; safe to call from several threads and streams.

    `settings` are `EncoderConfig`'s, by name; what is not given comes from environment variables and the config file
    (see `polyfuse.configs.encoder_config`). `runtime` defaults to the one registered for the encoder's device. Memory
    is taken at the first request, or by `capture()`. Raises `SpecError` for bad settings.

    With a `watch` of the encoder's model, every request finds out whether graphs still compute what the model would,
    while the device replays them. After a change of modules, hooks, weights or settings the graphs are dropped and the
    request is computed anew, uncaptured; the next one without a change captures again.
    Without it a graph reads the weights where they were when it was captured.
    """

    def __init__(
        self,
        encoder: GraphableEncoder,
        *,
        runtime: GraphRuntime | None = None,
        watch: Watch | None = None,
        **settings: Any,
    ) -> None:
        self.encoder = encoder
        self.config: EncoderConfig = encoder_config(**settings)
        self.runtime = runtime or graph_runtime(encoder.device)
        self.watch = watch
        self._lock = threading.RLock()
        self._stats = EncoderStats()
        self._start()

    def _start(self) -> None:
        self._in, self._out = self.encoder.inputs, self.encoder.outputs  # their specs
        self._capacities = self._plan_capacities()
        self._replays: dict[int, Step] = {}
        self._budgets: list[Budget] = []
        self._eager_seconds: Curve | None = None
        self._inputs: Tensors = {}
        self._outputs: Tensors = {}
        self._padding_reaches: str | None = None  # the output; not known yet
        self._logged = 0

    def _plan_capacities(self) -> dict[int, Capacity]:
        """Capacity of every budget, largest first."""
        config, step = self.config, self.encoder.token_multiple
        budgets = config.budgets or suggest_budgets(
            smallest=config.smallest, largest=config.largest, max_graphs=config.max_graphs, multiple_of=step
        )
        if wrong := [b for b in budgets if b % step]:
            fail(self.encoder.name, "budgets", f"multiples of {step}, its items' tokens", wrong)
        capacities = {}
        for tokens in sorted(set(budgets), reverse=True):
            items = min(config.max_items, tokens // step)
            frames = config.max_frames or max(FRAMES, items)
            capacities[tokens] = Capacity(tokens, items, min(tokens, frames))
        return capacities

    @property
    def stats(self) -> EncoderStats:
        """A copy of the counts so far, with present sizes."""
        with self._lock:
            buffers = (*self._inputs.values(), *self._outputs.values())
            return replace(
                self._stats,
                replays=Counter(self._stats.replays),
                pool_bytes=self.runtime.pool_bytes(),
                buffer_bytes=sum(buffer.nbytes for buffer in buffers),
                costs={b.tokens: b.cost for b in self._budgets if b.tokens in self._replays},
            )

    def clear(self) -> None:
        """Drop every graph, buffer and count; the next request captures again."""
        with self._lock:
            self._stats = EncoderStats()
            self._drop_graphs()

    def capture(self) -> None:
        """Allocate the buffers, capture the budgets (lazily: the largest) and measure. Does nothing the second time.

        A budget that cannot be captured, or with which the pool exceeds `memory_bytes`, is dropped with a warning; all
        are, if what the encoder gives for an item depends on the padding beside it.

        Raises `Unsupported` if the model has something that the encoder would pass over, such as hooks.
        """
        with self._lock:
            self._follow()
            self._eager_curve()

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these arguments, in tensors of the caller's own.

        Raises `SpecError` for bad input, before anything is copied or changed.
        """
        with self._lock:
            changed = self._follow_unless_captured()
            try:
                request = self.encoder.request(*args, **kwargs)
            except SpecError:
                self._follow()  # it may be right for the model as it is now
                raise
            return self.encoder.result(self._encode(request, None, changed), request)

    def run(self, request: EncoderRequest, indices: Sequence[int] | None = None) -> Tensors:
        """The outputs of the named items (default: all), packed in that order, in fresh tensors.

        Raises `Unsupported` if the model has something that the encoder would pass over, such as hooks.
        """
        with self._lock:
            return self._encode(request, indices, self._follow_unless_captured())

    def _encode(self, request: EncoderRequest, indices: Sequence[int] | None, changed: bool) -> Tensors:
        """Check and encode the named items: uncaptured if the model has `changed`, or turns out to have."""
        check_request(self.encoder.name, self._in, request)
        items = range(len(request.sizes)) if indices is None else indices
        sizes = [request.sizes[i] for i in items]
        limit = self.config.max_frames
        if limit is not None and (most := max((size.frames for size in sizes), default=0)) > limit:
            fail(self.encoder.name, "frames", f"at most max_frames={limit} in an item", most)
        self._stats.requests += 1
        self._stats.items += len(sizes)
        if changed:
            return self._eager(request, items)
        results = self._run(request, items, sizes)
        # The device is still at work, on weights that the watch keeps alive.
        return self._eager(request, items) if self._follow() else results

    def _run(self, request: EncoderRequest, items: Sequence[int], sizes: Sequence[ItemSize]) -> Tensors:
        """The items' outputs, in as many replays and eager calls as the plan has."""
        batches = self._plan(sizes)
        if len(batches) == 1 and batches[0].budget is None:
            return self._eager(request, items)
        results = allocate(self._out, sum(size.tokens for size in sizes), len(sizes), self.encoder.device)
        for batch in batches:
            members = [items[i] for i in batch.indices]
            if batch.budget is None:
                scatter(self._eager(request, members), results, self._out, sizes, batch.indices)
                continue
            with self.runtime.after_last():
                self._replay(request, members, batch.budget.tokens)
                scatter(self._outputs, results, self._out, sizes, batch.indices)
        self._log()
        return results

    def _follow(self) -> bool:
        """Whether the model has changed since the last look at it: then no graph is left, and its present state known.

        Raises `Unsupported` if the encoder does not compute what the model would as it is now.
        """
        if self.watch is None:
            return False
        if change := self.watch.change():
            self._stats.changes[change] += 1
            self._drop_graphs()
            self.watch.renew()
        if self.watch.oddity:
            raise Unsupported(f"{self.encoder.name}: {self.watch.oddity}")
        return bool(change)

    def _follow_unless_captured(self) -> bool:
        """`_follow`, but False where there are graphs: replaying them is safe, and what they give is checked then."""
        return self._eager_seconds is None and self._follow()

    def _drop_graphs(self) -> None:
        self._start()
        self.runtime.reset()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A block in which no other thread plans, captures or replays: they wait for its end.

        What the device was given before may still run in it.
        """
        with self._lock:
            yield

    def fill_buffers(self, value: float) -> None:
        """Fill the static buffers of floating-point numbers with a value, after the last replay and before the next.

        It serves checks that nothing left in a buffer reaches a result: NaN would be seen there. Before `capture()` or
        the first request there are no buffers.
        """
        with self._lock, self.runtime.after_last():
            for buffer in (*self._inputs.values(), *self._outputs.values()):
                if buffer.is_floating_point():
                    buffer.fill_(value)

    def recompute(self, tokens: int) -> Tensors:
        """The outputs of a budget of this many tokens, computed uncaptured from what its static inputs hold now.

        The budget's last replay, if no other came after it, gave the same bits. Raises `SpecError` if there is no such
        budget.
        """
        with self._lock:
            self.capture()
            capacity = self._capacities.get(tokens)
            if capacity is None:
                fail(self.encoder.name, "tokens", f"one of the budgets {sorted(self._capacities)}", tokens)
            with self.runtime.after_last():
                return forward(self.encoder, views(self._inputs, self._in, capacity), capacity)

    def predict(self, sizes: Sequence[ItemSize]) -> float:
        """Predicted seconds of a request of these items."""
        with self._lock:
            return predicted_time(self._plan(sizes), sizes, self._eager_curve())

    def _eager_curve(self) -> Curve:
        """The measured times of eager calls, after a capture if there was none."""
        if self._eager_seconds is None:
            started = time.perf_counter()
            largest = next(iter(self._capacities.values()))
            with torch.inference_mode(False):
                self._inputs = allocate(self._in, largest.tokens, largest.items, self.encoder.device)
                self._outputs = allocate(self._out, largest.tokens, largest.items, self.encoder.device)
            for tokens in list(self._capacities):
                if self._capture(tokens) and self.config.capture == "lazy":
                    break
            self._eager_seconds = self._calibrate()
            self._stats.capture_seconds += time.perf_counter() - started
        return self._eager_seconds

    def _plan(self, sizes: Sequence[ItemSize]) -> list[Batch]:
        """Batches of captured budgets only: a budget that is chosen for the first time is captured now."""
        eager = self._eager_curve()
        while True:
            batches = plan_packing(sizes, self._budgets, eager, policy=self.config.policy)
            missing = {batch.budget.tokens for batch in batches if batch.budget} - set(self._replays)
            if not missing:
                return batches
            started = time.perf_counter()
            for tokens in sorted(missing, reverse=True):
                if self._capture(tokens):
                    self._set_cost(tokens, self._measure(tokens))
            self._stats.capture_seconds += time.perf_counter() - started

    def _capture(self, tokens: int) -> bool:
        capacity = self._capacities[tokens]
        inputs = views(self._inputs, self._in, capacity)
        outputs = views(self._outputs, self._out, capacity)

        def step() -> None:
            computed = forward(self.encoder, inputs, capacity)
            for name, out in outputs.items():
                if computed[name].shape != out.shape:
                    fail(self.encoder.name, name, f"an output {list(out.shape)}", list(computed[name].shape))
                out.copy_(computed[name])

        try:
            with self.runtime.after_last():
                if self._padding_reaches is None:
                    self._padding_reaches = reads_padding(self.encoder, inputs, self._in, capacity)
                if self._padding_reaches:
                    return self._drop(tokens, f"{self._padding_reaches} of an item depends on the padding beside it")
                self._load_example(tokens)
                replay = self.runtime.capture(step)
        except Exception as error:  # whatever stops a capture, the encoder still runs
            return self._drop(tokens, f"{type(error).__name__}: {error}")
        size, limit = self.runtime.pool_bytes(), self.config.memory_bytes
        if limit is not None and size > limit:
            if not self._replays:
                self.runtime.reset()
            return self._drop(tokens, f"the pool takes {size} bytes with it, memory_bytes is {limit}")
        self._replays[tokens] = replay
        return True

    def _drop(self, tokens: int, reason: str) -> bool:
        del self._capacities[tokens]
        self._budgets = [b for b in self._budgets if b.tokens != tokens]
        self._stats.capture_failures += 1
        text = f"{self.encoder.name}: no graph for the budget of {tokens} tokens: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return False

    def _calibrate(self) -> Curve:
        """Time eager calls of a few sizes, and every captured budget; what is not captured yet is interpolated."""
        budgets = sorted(self._capacities) or [self.config.largest]
        points = dict.fromkeys([*budgets[:: max(1, len(budgets) // EAGER_POINTS)], budgets[-1]])
        eager = Curve([(tokens, self._seconds(self._example_call(tokens))) for tokens in points])
        measured = {tokens: self._measure(tokens) for tokens in sorted(self._replays)}
        curve = Curve(list(measured.items())) if measured else eager
        self._budgets = [Budget(*capacity, measured.get(t, curve(t))) for t, capacity in self._capacities.items()]
        return eager

    def _example_call(self, tokens: int) -> Step:
        example = self.encoder.example(tokens)
        sizes, items = example.sizes, range(len(example.sizes))
        total = Capacity(tokens, len(sizes), sum(size.frames for size in sizes))
        inputs = gather(self._in, example, items, self.encoder.device)

        def step() -> None:
            forward(self.encoder, inputs, total)

        return step

    def _measure(self, tokens: int) -> float:
        with self.runtime.after_last():
            self._load_example(tokens)
            return self._seconds(self._replays[tokens])

    def _set_cost(self, tokens: int, cost: float) -> None:
        self._budgets = [b._replace(cost=cost) if b.tokens == tokens else b for b in self._budgets]

    def _seconds(self, step: Step) -> float:
        step()
        return self.runtime.seconds(step)

    def _load_example(self, tokens: int) -> None:
        """Fill a budget's inputs with as much of a typical request as fits."""
        capacity, example = self._capacities[tokens], self.encoder.example(tokens)
        fitting = range(min(len(example.sizes), capacity.items, capacity.frames))
        load(views(self._inputs, self._in, capacity), self._in, example, fitting)

    def _eager(self, request: EncoderRequest, items: Sequence[int]) -> Tensors:
        self._stats.eager_batches += 1
        self._stats.eager_items += len(items)
        return exact_forward(self.encoder, request, items)

    def _replay(self, request: EncoderRequest, items: Sequence[int], tokens: int) -> None:
        capacity, used = self._capacities[tokens], sum(request.sizes[i].tokens for i in items)
        load(views(self._inputs, self._in, capacity), self._in, request, items)
        self._replays[tokens]()
        self._stats.replays[tokens] += 1
        self._stats.tokens += used
        self._stats.padding += tokens - used

    def _log(self) -> None:
        every, replays = self.config.log_every, self._stats.replays.total()
        if every and replays - self._logged >= every:
            self._logged = replays
            log.info("%s: %s", self.encoder.name, self.stats.as_dict())
