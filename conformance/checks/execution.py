"""How a call runs on a CUDA device: on the current stream, without waiting for the device, and in a captured graph."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import verdict
from polyfuse.conformance.layouts import owned
from polyfuse.spec import Unsupported

PROVES = (
    "On CUDA a call works on the current stream, behind what was put there before it, without waiting for the device, "
    "and a captured call computes what its inputs are at each replay. A call with an array that the backend claims to "
    "read on the host may wait, and is declined while a graph is captured."
)


def check(attempt: Attempt) -> Iterator[str]:
    """What is wrong with a call on another stream, or with a captured one."""
    import sys

    torch = sys.modules.get("torch")
    if attempt.family != "torch" or torch is None or attempt.case.repeat > 1:
        return
    if torch.device(attempt.device).type != "cuda":
        return
    yield from _on_a_stream(torch, attempt)
    hosts = [t for t in attempt.call.op.tensors if t.host_unless and torch.is_tensor(attempt.arrays[t.name])]
    if any(attempt.made[t.host_unless] is None for t in hosts):
        return  # a grid in a tensor may be read by the host, unless an attribute says that it stays
    if attempt.read_on_host:
        yield from _declined(torch, attempt)
        return
    waits = list(_without_waiting(torch, attempt))
    yield from waits or _captured(torch, attempt)  # what waits would end the capture with an error that says less


def _without_waiting(torch: Any, attempt: Attempt) -> Iterator[str]:
    """A call of a kind that was made before, while what waits for the device is an error."""
    attempt.run(attempt.place())
    arrays = attempt.place()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attempt.run(arrays)
    except RuntimeError as error:
        yield f"the backend waits for the device: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _on_a_stream(torch: Any, attempt: Attempt) -> Iterator[str]:
    """A call behind a slow write of its inputs on a stream of its own."""
    arrays, late = attempt.place(), attempt.place()
    for x in late.values():
        if torch.is_tensor(x) and x.is_floating_point() and all(x.stride()):
            x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(3_000_000)  # about 2 ms
        for name, x in late.items():
            if torch.is_tensor(x) and x.is_floating_point() and all(x.stride()):
                x.copy_(arrays[name], non_blocking=True)
        results = [x.clone() for x in attempt.results(late, attempt.run(late))]
    stream.synchronize()
    problem = verdict(results, attempt.call, attempt.exact)
    if problem:
        yield f"on a stream of its own, behind the writes of its inputs: {problem}"


def _declined(torch: Any, attempt: Attempt) -> Iterator[str]:
    """A call that claims to read an array on the host, while a graph is captured: nothing can be read there."""
    arrays = attempt.place()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        arrays[attempt.read_on_host[0]].clone()  # PyTorch warns of a graph without a launch
        try:
            attempt.run(arrays)
        except Unsupported:
            return
    names = ", ".join(attempt.read_on_host)
    yield f"ran in the capture of a CUDA graph, though the backend claims to read {names} on the host"


def _captured(torch: Any, attempt: Attempt) -> Iterator[str]:
    """A captured call, replayed with the inputs of another seed in its arrays."""
    other = attempt.other
    if other is None:
        return
    arrays, others = attempt.place(), attempt.place(other.made)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attempt.run(attempt.place())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = attempt.run(arrays)
    except Unsupported:  # a backend may decline a call while a graph is captured
        return
    for name, x in others.items():
        if isinstance(other.made[name], np.ndarray):
            # Elements that share memory are alike in the new values too, which may each have memory of their own.
            own = owned(arrays[name])
            arrays[name][own].copy_(x[own])
    graph.replay()
    torch.cuda.synchronize()
    problem = verdict(attempt.results(arrays, outputs), other.call, other.exact)
    if problem:
        yield f"replayed from a CUDA graph with other inputs: {problem}"
