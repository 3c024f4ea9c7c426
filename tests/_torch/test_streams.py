"""`execute_in_parallel`: its guarantees without streams here, with streams where there is a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from polyfuse import SpecError
from polyfuse._torch.streams import _Pool, streams_enabled
from polyfuse.runtime import execute_in_parallel, register_stream_module, stack_weights

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


def test_results_come_in_the_order_of_the_branches():
    ran: list[int] = []

    def branch(i: int) -> int:
        ran.append(i)
        return i * i

    results = execute_in_parallel(*(lambda i=i: branch(i) for i in range(5)), device=CPU)
    assert results == (0, 1, 4, 9, 16)
    assert ran == [0, 1, 2, 3, 4]
    assert execute_in_parallel(device=CPU) == ()


def test_every_branch_runs_and_the_first_error_is_raised():
    ran = []

    def fails(text: str) -> None:
        ran.append(text)
        raise ValueError(text)

    with pytest.raises(ValueError, match="first") as caught:
        execute_in_parallel(lambda: fails("first"), lambda: fails("second"), lambda: ran.append("third"), device=CPU)
    assert ran == ["first", "second", "third"]
    assert caught.value.__notes__ == ["another branch raised ValueError: second"]


def test_nested_calls():
    inner = lambda: execute_in_parallel(lambda: 1, lambda: 2, device=CPU)  # noqa: E731
    assert execute_in_parallel(inner, inner, lambda: 3, device=CPU) == ((1, 2), (1, 2), 3)


def test_a_switch_that_is_neither_on_nor_off_is_an_error(monkeypatch):
    monkeypatch.setenv("POLYFUSE_STREAMS", "false")
    streams_enabled.cache_clear()
    try:
        with pytest.raises(SpecError, match="environment variable POLYFUSE_STREAMS: expected 0 or 1, got 'false'"):
            streams_enabled()
    finally:
        streams_enabled.cache_clear()


def test_a_device_brings_its_own_streams(monkeypatch):
    """Fork and join are asked of the registered module, in this order."""
    log: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.device = name, CPU

        def record_event(self) -> str:
            log.append(f"record {self.name}")
            return self.name

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    class Streams:
        current = Recorder("main")

        def current_stream(self, device: torch.device) -> Recorder:
            return self.current

        def Stream(self, device: torch.device) -> Recorder:  # noqa: N802
            return Recorder("side")

        @contextmanager
        def stream(self, stream: Recorder) -> Iterator[None]:
            before, self.current = self.current, stream
            yield
            self.current = before

    module = Streams()
    monkeypatch.setattr("polyfuse._torch.streams._MODULES", {})
    monkeypatch.setattr("polyfuse._torch.streams._pool", _Pool())
    register_stream_module("cpu", module)
    ran = execute_in_parallel(lambda: module.current.name, lambda: module.current.name, device=CPU)
    assert ran == ("main", "side")
    assert log == ["record main", "side waits for main", "record side", "main waits for side"]


@pytest.mark.parametrize("device", [CPU, None], ids=["cpu", "current"])
def test_inside_a_full_graph_the_branches_run_in_order(device):
    x, ran = torch.arange(12.0).reshape(3, 4), []

    def branch(name, value):
        ran.append(name)
        return value

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        inner = lambda: execute_in_parallel(lambda: branch("b", x.sin()), lambda: branch("c", x @ x.T), device=device)  # noqa: E731
        first, (second, third) = execute_in_parallel(lambda: branch("a", x + 1), inner, device=device, inputs=(x,))
        return first, second - third.sum()

    first, rest = compiled(x)
    assert torch.equal(first, x + 1)
    torch.testing.assert_close(rest, x.sin() - (x @ x.T).sum())
    assert ran == ["a", "b", "c"]


def test_inside_a_full_graph_no_stream_is_asked_for(monkeypatch):
    """A registered module of streams stands for those of an accelerator; any use of it raises."""
    monkeypatch.setattr("polyfuse._torch.streams._MODULES", {"cpu": object()})
    call = lambda x: execute_in_parallel(lambda: x + 1, lambda: x * 2, device=CPU)  # noqa: E731
    x = torch.ones(2)
    assert [y.tolist() for y in torch.compile(call, fullgraph=True, backend="eager")(x)] == [[2, 2], [2, 2]]
    with pytest.raises(AttributeError, match="current_stream"):
        call(x)


def test_an_error_inside_a_full_graph_is_told():
    def fails():
        raise ValueError("deliberate")

    compiled = torch.compile(lambda: execute_in_parallel(fails, lambda: 1), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="deliberate"):
        compiled()


def test_stacked_weights_are_views_of_one_buffer():
    first, second = torch.randn(6, 4), torch.randn(2, 4)
    views = stack_weights(first, second)
    assert torch.equal(views[0], first)
    assert torch.equal(views[1], second)
    assert views[1].data_ptr() == views[0].data_ptr() + 6 * 4 * 4
    with pytest.raises(ValueError, match="one width, dtype and device"):
        stack_weights(first, torch.randn(2, 5))


@gpu
def test_branches_overlap_and_join():
    x = torch.randn(4096, 4096, device="cuda")
    streams = []

    def branch(i: int) -> torch.Tensor:
        streams.append(torch.cuda.current_stream())
        torch.cuda._sleep(2_000_000)
        return x * i

    results = execute_in_parallel(*(lambda i=i: branch(i) for i in range(3)))
    total = sum(results)  # on the current stream: right only if it waits for all branches
    assert torch.equal(total, x * 0 + x * 1 + x * 2)
    assert len({s.cuda_stream for s in streams}) == 3


@gpu
def test_a_branch_sees_the_work_queued_before():
    x = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(5_000_000)
    x.fill_(3.0)
    _, seen = execute_in_parallel(lambda: None, lambda: x.clone())
    assert bool((seen == 3.0).all())


@gpu
def test_memory_of_results_is_not_reused_while_the_current_stream_reads_it():
    """The result is dropped while a slow reader on the current stream still has to run."""
    for _ in range(20):
        _, result = execute_in_parallel(lambda: None, lambda: torch.full((1 << 20,), 1.0, device="cuda"))
        torch.cuda._sleep(3_000_000)
        copy = result.clone()
        del result
        execute_in_parallel(lambda: None, lambda: torch.full((1 << 20,), 2.0, device="cuda"))
        assert bool((copy == 1.0).all())


@gpu
def test_memory_of_inputs_is_not_reused_while_a_branch_reads_it():
    for _ in range(20):
        holder = [torch.full((1 << 20,), 1.0, device="cuda")]

        def slow(holder: list[torch.Tensor] = holder) -> torch.Tensor:
            torch.cuda._sleep(3_000_000)
            return holder.pop() * 1

        def overwrite() -> torch.Tensor:
            return torch.full((1 << 20,), 2.0, device="cuda")

        _, read = execute_in_parallel(overwrite, slow, inputs=tuple(holder))
        assert bool((read == 1.0).all())


@gpu
def test_an_error_leaves_the_streams_joined():
    x = torch.zeros(1 << 20, device="cuda")

    def slow() -> None:
        torch.cuda._sleep(5_000_000)
        x.fill_(1.0)

    def fails() -> None:
        raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        execute_in_parallel(fails, slow)
    assert bool((x.clone() == 1.0).all())


@gpu
def test_capture_and_replay_with_other_inputs():
    x, w1, w2 = (torch.randn(64, 64, device="cuda") for _ in range(3))
    execute_in_parallel(lambda: x @ w1, lambda: x @ w2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one, two = execute_in_parallel(lambda: x @ w1, lambda: x @ w2)
        total = one + two
    for seed in range(3):
        x.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(total, x @ w1 + x @ w2)


@gpu
def test_nested_branches_do_not_deadlock_and_are_right():
    x = torch.randn(512, 512, device="cuda")

    def inner(i: int) -> torch.Tensor:
        return sum(execute_in_parallel(lambda: x * i, lambda: x * (i + 1), lambda: x * (i + 2)))

    outer = execute_in_parallel(*(lambda i=i: inner(i) for i in range(4)))
    for i, result in enumerate(outer):
        assert torch.equal(result, x * i + x * (i + 1) + x * (i + 2))


@gpu
def test_switched_off_it_runs_on_the_current_stream():
    code = """
import torch
from polyfuse.runtime import execute_in_parallel
seen = execute_in_parallel(*[lambda: torch.cuda.current_stream().cuda_stream] * 3)
assert len(set(seen)) == 1, seen
"""
    import os

    env = {**os.environ, "POLYFUSE_STREAMS": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
