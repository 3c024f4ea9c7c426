"""Every loop that measures time is in this module.

Device time is that of CUDA-graph replays or between two CUDA events. All else is wall time, and the ways to take it
differ in what is waited for: `latencies` wait for the device before and after every call, `row_ms` after a row of
calls, `queue_us` never, so that it is the host's time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from statistics import median
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

SLOW_CALLS = 3  # of a whole model or layer, on a CPU
REPLAY_SECONDS = 0.004  # that one captured run of calls takes, about
ROUND_SECONDS = 0.01  # that a round of calls takes at least, if a measurement has a limit
FLUSHED = 2  # times the size of a GPU's L2 that is written between two uses of the same inputs
FLUSHED_ON_HOST = 2**27  # bytes, where the size of the last cache is not known
JAX_CALLS, JAX_ROUNDS = 20, 7


class Latencies(NamedTuple):
    """Seconds of each call: until the device had done it, and until it returned on the host."""

    done: list[float]
    returned: list[float]


class Clock:
    """Times of calls that work on one device, named as torch names it.

    `seconds` is how long a measurement of an op may take: of a slow one there are fewer calls, but one at least.
    """

    def __init__(self, device: str, seconds: float = inf) -> None:
        self.device, self.seconds = device, seconds

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)

    def repeats(self, calls: int) -> int:
        """How often to repeat a call of a whole model or layer: `calls` times, or fewer on a CPU, which takes long."""
        return min(calls, SLOW_CALLS) if self.device == "cpu" else calls

    def latencies(self, calls: Sequence[Call]) -> Latencies:
        """The times of each call, with the device idle before and after it."""
        found = Latencies([], [])
        for call in calls:
            self.wait()
            started = time.perf_counter()
            call()
            found.returned.append(time.perf_counter() - started)
            self.wait()
            found.done.append(time.perf_counter() - started)
        return found

    def latency_ms(self, function: Call, calls: int = 5, warm_up: int = 2) -> float:
        """Median milliseconds of a call of a model or layer, with the device idle before and after it."""
        _repeat(function, warm_up)
        return median(self.latencies([function] * self.repeats(calls)).done) * 1e3

    def row_ms(self, function: Call, calls: int) -> float:
        """Milliseconds per call of that many in a row, until the device has done the last."""
        self.wait()
        started = time.perf_counter()
        _repeat(function, calls)
        self.wait()
        return (time.perf_counter() - started) / calls * 1e3

    def queue_us(self, function: Call, calls: int = 50, rounds: int = 9, warm_up: int = 3) -> float:
        """Microseconds per call until the host has queued it, of calls in a row; the median of some rounds."""
        calls, rounds = self._fitting(function, calls, rounds, warm_up)
        times = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            _repeat(function, calls)
            times.append((time.perf_counter() - started) / calls)
        self.wait()
        return median(times) * 1e6

    def cold_us(self, functions: Sequence[Call], rounds: int = 15) -> float:
        """Microseconds per call whose inputs no cache holds; the functions are one call, each on inputs of its own.

        On a GPU it is device time: of a captured run of all of them behind a write of more bytes than the L2 has, less
        that of the write alone. Elsewhere it is the latency of the first one behind such a write.
        """
        if not self.device.startswith("cuda"):
            return self._cold_latency_us(functions[0], rounds)
        memory = FLUSHED * torch.cuda.get_device_properties(self.device).L2_cache_size
        flush = partial(torch.empty(memory, dtype=torch.uint8, device=self.device).fill_, 1)
        with _own_stream():
            for function in functions:
                function()
            both, rounds = self._all_us([flush, *functions], rounds)
            alone, _ = self._all_us([flush], rounds)
        return (both - alone) / len(functions)

    def _all_us(self, functions: Sequence[Call], rounds: int) -> tuple[float, int]:
        """Device microseconds of one captured run of calls, and how often it was run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for function in functions:
                function()
        rounds = self._rounds(self.row_ms(graph.replay, 1) / 1e3, rounds)
        return self.event_us(graph.replay, rounds), rounds

    def _cold_latency_us(self, function: Call, rounds: int) -> float:
        memory = torch.empty(FLUSHED_ON_HOST, dtype=torch.uint8)
        found: list[float] = []
        spent = 0.0
        while len(found) < rounds and (not found or spent + spent / len(found) <= self.seconds):
            started = time.perf_counter()
            memory.fill_(len(found))
            found += self.latencies([function]).done
            spent += time.perf_counter() - started
        return median(found) * 1e6

    def _fitting(self, function: Call, calls: int, rounds: int, warm_up: int) -> tuple[int, int]:
        """Warm up, and how many calls and rounds of them then fit into the limit: one call at least."""
        if self.seconds == inf:
            _repeat(function, warm_up)
            return calls, rounds
        first = self.row_ms(function, 1) / 1e3
        if first >= self.seconds:
            return 1, 1
        once = self.row_ms(function, 1) / 1e3
        calls = max(1, min(calls, int(ROUND_SECONDS / once)))
        return calls, self._rounds(calls * once, rounds, first + once)

    def _rounds(self, once: float, rounds: int, spent: float = 0.0) -> int:
        """How many rounds of so many seconds fit into what is left of the limit, one at least."""
        return max(1, min(rounds, int(min((self.seconds - spent) / once, rounds))))

    def device_us(self, function: Call) -> float:
        """Device microseconds of a call of a model or layer; its latency where there are no CUDA graphs."""
        if self.device.startswith("cuda"):
            return self.replay_us(function, rounds=7, warm_up=2)
        return 1e3 * self.latency_ms(function)

    def replay_us(self, function: Call, rounds: int = 15, warm_up: int = 3) -> float:
        """Device microseconds per call of a captured run of calls, whose results are dropped one by one. CUDA only."""
        _repeat(function, warm_up)
        with _own_stream():
            function()
            once = self.row_ms(function, 1) / 1e3
            calls = max(1 if 4 * once > self.seconds else 4, min(200, int(REPLAY_SECONDS / once)))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                _repeat(function, calls)
            return self.event_us(graph.replay, self._rounds(calls * once, rounds)) / calls

    def event_us(self, function: Call, rounds: int = 15) -> float:
        """Median device microseconds of a call, between two events. CUDA only."""
        times = []
        function()
        for _ in range(rounds):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return median(times)


class Budget:
    """Seconds from now on, shared by a number of measurements."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.perf_counter() + seconds

    def left(self) -> float:
        """The seconds that are left, at least 0."""
        return max(0.0, self._end - time.perf_counter())


def host_ns(function: Call, calls: int = 100, rounds: int = 201, *, after: Call | None = None) -> float:
    """Median nanoseconds of host time per call; a round is short, so few are interrupted.

    `after` is called behind each round, as to wait for a device so that its queue is never full.
    """
    function()
    times = []
    for _ in range(rounds):
        started = time.perf_counter_ns()
        _repeat(function, calls)
        times.append((time.perf_counter_ns() - started) / calls)
        if after:
            after()
    return round(median(times), 1)


def jax_us(function: Call, limit: float = inf) -> tuple[float, float]:
    """Microseconds per call of a JAX function, of calls in a row: until all are done, and until all are queued.

    `limit` is how many seconds it may take: of a slow function there are fewer calls, but one at least.
    """
    import jax

    def run() -> None:
        jax.block_until_ready(function())

    run()
    calls, rounds = JAX_CALLS, JAX_ROUNDS
    if limit < inf:
        once = seconds(run)
        calls = max(1, min(calls, int(limit / once)))
        rounds = max(1, min(rounds, int(limit / (calls * once))))
    done, queued = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        results = [function() for _ in range(calls)]
        queued.append(time.perf_counter() - started)
        jax.block_until_ready(results)
        done.append(time.perf_counter() - started)
    return median(done) * 1e6 / calls, median(queued) * 1e6 / calls


def seconds(function: Call) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _repeat(function: Call, calls: int) -> None:
    for _ in range(calls):
        function()


@contextmanager
def _own_stream() -> Iterator[None]:
    """A CUDA stream of its own, as capture needs one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
