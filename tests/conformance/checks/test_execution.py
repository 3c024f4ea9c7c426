"""The check of how a call runs on CUDA, on a stand-in for the device that knows waiting, capture and replay."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import polyfuse
from polyfuse.conformance import Trial, cases
from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks import execution
from polyfuse.conformance.defects._planted import by_name, planted
from polyfuse.conformance.inputs import place
from polyfuse.dispatch import Device, _arguments, _plan, registry

OP = "gated_delta_rule"
ENDS = "cu_seqlens"
PACKED, ALONE = "bfloat16-packed-int32-initial_state", "bfloat16-h2-hv4"
WAITS = "the backend waits for the device: called a synchronizing CUDA operation"


class Graph:
    """What a CUDA graph is to the check: launches, which `replay` makes again with what is in their arrays by then."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class Gpu:
    """The parts of `torch.cuda` that the check calls, on CPU tensors. `graphs` are those that were captured."""

    def __init__(self) -> None:
        self.sync_mode: Any = 0
        self.capturing: Graph | None = None
        self.graphs: list[Graph] = []

    @contextmanager
    def capture(self, graph: Graph) -> Any:
        self.graphs.append(graph)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def read(self, tensor: torch.Tensor) -> None:
        """Bring a tensor's values to the host."""
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.sync_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        tensor.tolist()

    def set_sync_debug_mode(self, mode: Any) -> None:
        self.sync_mode = mode


class OnGpu(Attempt):
    """An attempt whose device is the stand-in."""

    def place(self, values: Any = None) -> dict[str, Any]:
        return place(self.made if values is None else values, self.family, "cpu", self.case.stacked)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in in the place of `torch.cuda`, for the dispatcher too."""
    found = Gpu()
    stand_ins = {
        "synchronize": lambda: None,
        "get_sync_debug_mode": lambda: found.sync_mode,
        "set_sync_debug_mode": found.set_sync_debug_mode,
        "Stream": lambda: SimpleNamespace(synchronize=lambda: None),
        "stream": lambda stream: nothing(),
        "_sleep": lambda cycles: None,
        "CUDAGraph": Graph,
        "graph": found.capture,
        "is_current_stream_capturing": lambda: found.capturing is not None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(_arguments, "device_of", lambda value, family: Device("cuda", (9, 0)))
    polyfuse.refresh()
    yield found
    polyfuse.refresh()


@contextmanager
def nothing() -> Any:
    yield


def problems(
    gpu: Gpu, case: str, reads: tuple[str, ...] = (), claims: tuple[str, ...] = (), baked: bool = False
) -> Any:
    """What the check says of a right backend that reads arrays on the host, and claims to read some.

    A `baked` one keeps in a graph what its inputs were when it was captured.
    """

    def make(right: Any) -> Any:
        def function(*args: Any, **keywords: Any) -> Any:
            values = by_name(OP, args, keywords)
            for name in reads:
                if values[name] is not None:
                    gpu.read(values[name])
            results = right(*args, **keywords)
            if gpu.capturing is not None:
                kept = {name: x.clone() if torch.is_tensor(x) and baked else x for name, x in values.items()}

                def launch() -> None:
                    for result, new in zip(results, right(**kept), strict=True):
                        result.copy_(new)

                gpu.capturing.launches.append(launch)
            return results

        return function

    capability = replace(registry().get("torch").load(OP).capability, host_reads=claims)
    backend = planted("reader", OP, "torch", make, capability)
    trial = Trial(OP, next(each for each in cases(OP) if each.name == case), seed=0)
    return list(execution.check(OnGpu(trial, backend, "cuda", capability)))


@pytest.mark.parametrize("case", [PACKED, ALONE])
@pytest.mark.parametrize("claims", [(), (ENDS,)])
def test_a_backend_that_waits_for_nothing_is_right_whatever_it_claims(gpu: Gpu, case: str, claims: Any) -> None:
    assert problems(gpu, case, claims=claims) == []
    launches = [len(graph.launches) for graph in gpu.graphs]
    assert launches == [0 if claims and case == PACKED else 1]


@pytest.mark.parametrize("case", [PACKED, ALONE])
def test_a_captured_call_follows_its_inputs(gpu: Gpu, case: str) -> None:
    (problem,) = problems(gpu, case, baked=True)
    assert problem.startswith("replayed from a CUDA graph with other inputs: o: ")


def test_a_read_that_is_not_claimed_is_a_failure_and_nothing_is_captured_after_it(gpu: Gpu) -> None:
    assert problems(gpu, PACKED, reads=(ENDS,)) == [WAITS]
    assert gpu.graphs == []
    assert gpu.sync_mode == 0


def test_a_claimed_read_may_wait_and_is_declined_in_a_capture(gpu: Gpu) -> None:
    assert problems(gpu, PACKED, reads=(ENDS,), claims=(ENDS,)) == []
    assert [graph.launches for graph in gpu.graphs] == [[]]


def test_of_a_call_without_the_array_the_claim_allows_nothing(gpu: Gpu) -> None:
    assert problems(gpu, ALONE, reads=(ENDS,), claims=(ENDS,)) == []
    assert [len(graph.launches) for graph in gpu.graphs] == [1]
    assert problems(gpu, ALONE, reads=("g",), claims=(ENDS,)) == [WAITS]
    assert problems(gpu, ALONE, claims=(ENDS,), baked=True) != []


def test_a_claimed_read_that_runs_in_a_capture_is_a_failure(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "capture_refusal", lambda *args: None)
    (problem,) = problems(gpu, PACKED, claims=(ENDS,))
    assert problem == "ran in the capture of a CUDA graph, though the backend claims to read cu_seqlens on the host"
