"""Graph capture as a protocol, `GraphRuntime`: CUDA graphs, and an eager stand-in for every other device.

An accelerator with graphs of its own registers a `GraphRuntime` for its device type.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, Protocol

import torch

Step = Callable[[], None]


class GraphRuntime(Protocol):
    """Captures steps that work on static buffers of one device. All its graphs may share one memory pool."""

    captures: bool  # False where a replay is just another call

    def capture(self, step: Step) -> Step:
        """Run `step` to warm it up, record it, and return its replay, which is queued on the current stream.

        Keeps nothing if `step` raises.
        """
        ...

    def pool_bytes(self) -> int:
        """How many bytes of device memory the graphs' pool holds."""
        ...

    def reset(self) -> None:
        """Give the pool back; replays captured before must not be called any more."""
        ...

    def after_last(self) -> AbstractContextManager[None]:
        """A context in which work runs after what was queued in it the last time, on whichever stream that was."""
        ...

    def seconds(self, step: Step, rounds: int = 3) -> float:
        """The median wall time of a step over `rounds` calls, with the device idle before and after each."""
        ...


class EagerReplay:
    """Does without graphs: a replay is a call of the step, over the same static buffers and padding."""

    captures = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capture(self, step: Step) -> Step:
        step()
        return step

    def pool_bytes(self) -> int:
        return 0

    def reset(self) -> None:
        pass

    def after_last(self) -> AbstractContextManager[None]:
        return nullcontext()

    def seconds(self, step: Step, rounds: int = 3) -> float:
        return _median_seconds(step, lambda: None, rounds)


class CudaGraphs:
    """Captures CUDA graphs that share one memory pool."""

    captures = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._last = torch.cuda.Event()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def capture(self, step: Step) -> Step:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        # Warm up on the capturing stream: what libraries allocate for a stream must not land in the pool.
        with torch.cuda.stream(self._stream):
            step()
            step()
        torch.cuda.synchronize(self.device)
        try:
            graph = self._record(step, self._pool)
        except Exception:
            # CUDA may have broken the capture off, and then PyTorch's random generator believes that it goes on.
            self._record(torch.zeros(1, device=self.device).zero_, None)
            raise
        self._pool = graph.pool()
        self._graphs.append(graph)
        current.wait_stream(self._stream)
        return graph.replay

    def _record(self, step: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # it is when the step raises
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph

    def pool_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot() if self._pool else []
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def reset(self) -> None:
        torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def after_last(self) -> AbstractContextManager[None]:
        return _CudaOrder(self._last, self.device)

    def seconds(self, step: Step, rounds: int = 3) -> float:
        return _median_seconds(step, lambda: torch.cuda.synchronize(self.device), rounds)


class _CudaOrder(AbstractContextManager[None]):
    """Orders what is queued inside by an event: after its last record, which is then set anew."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def __enter__(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def __exit__(self, *error: object) -> None:
        self._event.record(torch.cuda.current_stream(self._device))


def _median_seconds(step: Step, wait: Step, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - started)
    return median(times)


_RUNTIMES: dict[str, Callable[[torch.device], GraphRuntime]] = {"cuda": CudaGraphs}


def register_graph_runtime(device_type: str, factory: Callable[[torch.device], GraphRuntime]) -> None:
    """Use `factory(device)` for devices of this type, such as "xpu", from now on."""
    _RUNTIMES[device_type] = factory


def graph_runtime(device: torch.device) -> GraphRuntime:
    """A new runtime for the device, with a pool of its own; `EagerReplay` where none is registered."""
    return _RUNTIMES.get(device.type, EagerReplay)(device)
