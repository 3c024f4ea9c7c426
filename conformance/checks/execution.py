"""How a call runs on a CUDA device: on the current stream, and in a captured graph."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import verdict
from polyfuse.conformance.inputs import make_inputs
from polyfuse.reference import oracle
from polyfuse.spec import SpecError, Unsupported, bind

PROVES = (
    "On CUDA a call works on the current stream, behind what was put there before it, and a captured call computes "
    "what its inputs are at each replay."
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
    yield from _captured(torch, attempt)


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


def _captured(torch: Any, attempt: Attempt) -> Iterator[str]:
    """A captured call, replayed with the inputs of another seed in its arrays."""
    if any(t.host_unless and torch.is_tensor(attempt.arrays[t.name]) for t in attempt.call.op.tensors):
        return  # a grid in a tensor may be read by the host, unless an attribute says that it stays
    try:
        values = make_inputs(attempt.call.op, attempt.case, attempt.trial.seed + 1)
        call = bind(attempt.call.op, values)
        exact = oracle(attempt.op).intervals(**values)
    except SpecError:
        return
    arrays, others = attempt.place(), attempt.place(values)
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
        if isinstance(values[name], np.ndarray) and all(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
            arrays[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    problem = verdict(attempt.results(arrays, outputs), call, exact)
    if problem:
        yield f"replayed from a CUDA graph with other inputs: {problem}"
