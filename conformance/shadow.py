"""Shadow mode: a sample of the calls of a running program, checked against the oracle on a thread of its own.

`POLYFUSE_SHADOW` is the share of calls, and `POLYFUSE_SHADOW_SEED` says which. Dispatch wraps a backend's function in a
`Watch` when it plans a call; without the variable nothing is wrapped. A sampled call pays for copies of its arrays. The
conversion to NumPy, the oracle and the comparison run elsewhere.
"""

import itertools
import json
import logging
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import polyfuse
from polyfuse.conformance.checks import values
from polyfuse.conformance.golden._files import stored_dtype
from polyfuse.conformance.inputs import place
from polyfuse.dispatch import family_of, registry, to_numpy
from polyfuse.dispatch._arrays import is_traced
from polyfuse.reference import oracle
from polyfuse.reference._numerics import Array, numpy_dtype
from polyfuse.spec import OPS, SpecError, bind

log = logging.getLogger("polyfuse")

WAITING = 16  # samples that may wait for the thread; each holds copies of a call's arrays
LARGEST = 500_000  # elements of a call's arrays together, so that the oracle takes seconds at most
COUNTED = ("calls", "sampled", "checked", "violations", "dropped", "too_large", "traced", "errors")

_samples: "queue.Queue[_Sample]" = queue.Queue(WAITING)
_counts: dict[tuple[str, str], Counter[str]] = {}
_numbers: dict[tuple[str, str], "itertools.count[int]"] = {}
_lock = threading.Lock()
_thread: threading.Thread | None = None


class _Sample:
    """A call with copies of its arguments from before it and of its results, in the order that the oracle returns."""

    def __init__(self, op: str, backend: str, number: int, given: dict[str, Any], results: tuple[Any, ...]) -> None:
        self.op, self.backend, self.number, self.given, self.results = op, backend, number, given, results
        self.ready = _marked(results)


def watched(op: str, backend: str, function: Callable[..., Any], share: float, seed: int) -> Callable[..., Any]:
    """The backend's function of an op, with a share of its calls sampled; the same calls for the same seed."""
    spec, key = OPS[op], (op, backend)
    names = tuple(spec.parameters)
    with _lock:
        counts = _counts.setdefault(key, Counter())
        numbers = _numbers.setdefault(key, itertools.count())

    def call(*positional: Any, **keywords: Any) -> Any:
        number = next(numbers)
        chosen = crc32(f"{seed} {op} {backend} {number}".encode()) < share * 2**32
        why_not = _why_not((*positional, *keywords.values())) if chosen else "not_chosen"
        if why_not:
            result = function(*positional, **keywords)
            _count(counts, "calls", *([why_not] if chosen else []))
            return result
        arguments = dict(zip(names, positional, strict=False)) | keywords
        given = {name: _copy(value) for name, value in arguments.items()}
        result = function(*positional, **keywords)
        written = [arguments[name] for name in spec.updated if family_of(arguments[name]) == "torch"]
        results = tuple(_copy(value) for value in (*values.as_tuple(result), *written))
        _count(counts, "calls", "sampled")
        _hand_over(_Sample(op, backend, number, given, results), counts)
        return result

    return call


def shadow_report(timeout: float = 60.0) -> dict[tuple[str, str], dict[str, int]]:
    """What shadow mode has counted in this process, by (op, backend), once the waiting samples are checked.

    `calls` that returned, of them `sampled`; of those `checked`, with `violations`, and `dropped` because too many were
    waiting. Chosen, but not sampled: `too_large`, and `traced` (by JAX, or captured in a CUDA graph). `errors` are
    checks that failed themselves. Waits for at most `timeout` seconds.
    """
    with _samples.all_tasks_done:
        _samples.all_tasks_done.wait_for(lambda: not _samples.unfinished_tasks, timeout)
    with _lock:
        return {key: {name: counts[name] for name in COUNTED} for key, counts in sorted(_counts.items()) if counts}


def _count(counts: Counter[str], *names: str) -> None:
    with _lock:
        counts.update(names)


def _why_not(arguments: tuple[Any, ...]) -> str:
    """Why a chosen call is not sampled, as it is counted, or an empty text."""
    torch = sys.modules.get("torch")
    arrays = [value for value in arguments if family_of(value)]
    if any(map(is_traced, arrays)):
        return "traced"
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "traced"
    return "too_large" if sum(int(np.prod(array.shape)) for array in arrays) > LARGEST else ""


def _copy(value: Any) -> Any:
    """An array that nobody else writes to, on its device; anything else as it is."""
    family = family_of(value)
    if family == "torch":
        return value.detach().clone()
    return value.copy() if family == "numpy" else value


def _marked(arrays: tuple[Any, ...]) -> Any:
    """What the thread waits for, so that the copies are made when it reads them; None off CUDA."""
    if not any(family_of(array) == "torch" and array.is_cuda for array in arrays):
        return None
    event = sys.modules["torch"].cuda.Event()
    event.record()
    return event


def _hand_over(sample: _Sample, counts: Counter[str]) -> None:
    global _thread
    try:
        _samples.put_nowait(sample)
    except queue.Full:
        _count(counts, "dropped")
        return
    with _lock:
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_work, name="polyfuse-shadow", daemon=True)
            _thread.start()


def _after_fork() -> None:
    """A child process has neither the thread nor its samples, and perhaps a lock that nobody holds."""
    global _samples, _thread, _lock
    _samples, _thread, _lock = queue.Queue(WAITING), None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _work() -> None:
    waiting = _samples
    while True:
        sample = waiting.get()
        counts = _counts[sample.op, sample.backend]
        try:
            if sample.ready is not None:
                sample.ready.synchronize()
            given = {name: to_numpy(value) if family_of(value) else value for name, value in sample.given.items()}
            results = tuple(to_numpy(value) for value in sample.results)
            problem = problem_of(sample.op, given, results)
            _count(counts, "checked", *(["violations"] if problem else []))
            if problem:
                _say(sample, problem, given, results)
        except Exception as error:  # the program that is watched goes on
            _count(counts, "errors")
            log.warning(
                "shadow: %s: %s: the check failed: %s: %s", sample.op, sample.backend, type(error).__name__, error
            )
        finally:
            waiting.task_done()


def problem_of(op: str, given: Mapping[str, Any], results: tuple[Array, ...]) -> str | None:
    """What is wrong with the results of a call, updated arguments last, or None."""
    with np.errstate(all="ignore"):
        return values.verdict(results, bind(OPS[op], given), oracle(op).intervals(**given))


def _say(sample: _Sample, problem: str, given: Mapping[str, Any], results: tuple[Array, ...]) -> None:
    folder, where = os.environ.get("POLYFUSE_SHADOW_DUMP"), ""
    if folder:
        path = Path(folder) / f"{sample.op}-{sample.backend}-{os.getpid()}-{sample.number}.npz"
        save(path, sample.op, sample.backend, given, results)
        where = f"; {path}"
    log.warning("shadow: %s: %s: call %d: %s%s", sample.op, sample.backend, sample.number, problem, where)


def save(path: Path, op: str, backend: str, given: Mapping[str, Any], results: tuple[Array, ...]) -> None:
    """Write a call and its results as a .npz file: the bits of its arrays, and as JSON what else it was given."""
    arrays = {f"given.{name}": value for name, value in given.items() if isinstance(value, np.ndarray)}
    arrays |= {f"result.{number}": value for number, value in enumerate(results)}
    call = {
        "op": op,
        "backend": backend,
        "spec_version": OPS[op].version,
        "others": {name: value for name, value in given.items() if not isinstance(value, np.ndarray)},
        "dtypes": {name: array.dtype.name for name, array in arrays.items()},
    }
    text = np.frombuffer(json.dumps(call).encode(), np.uint8)
    stored: dict[str, Any] = {
        name: np.ascontiguousarray(a).view(stored_dtype(a.dtype.name)).reshape(a.shape) for name, a in arrays.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, call=text, **stored)


def load(path: Path) -> tuple[str, str, dict[str, Any], tuple[Array, ...]]:
    """(op, backend, what the call was given, its results) of a file that `save` wrote. Raises `SpecError`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            call = json.loads(file["call"].tobytes())
            arrays = {name: file[name].view(numpy_dtype(dtype)) for name, dtype in call["dtypes"].items()}
            spec, version = OPS[call["op"]], call["spec_version"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise SpecError(f"{path}: not a call that shadow mode has written: {error}") from error
    if version != spec.version:
        raise SpecError(f"{path}: expected version {spec.version} of {spec.name}, got {version}")
    given = {name: arrays.get(f"given.{name}", call["others"].get(name)) for name in spec.parameters}
    results = [arrays[name] for name in sorted(arrays, key=lambda n: int(n.split(".")[1]) if n[0] == "r" else -1)]
    return spec.name, call["backend"], given, tuple(results[len(arrays) - sum(n[0] == "r" for n in arrays) :])


def again(op: str, backend: str, given: Mapping[str, Any], device: str) -> str | None:
    """What is wrong with the results of a backend on a recorded call, run now, or None."""
    family = registry().get(backend).family
    arrays = place(given, family, "cpu" if family == "numpy" else device)
    result = getattr(polyfuse, op)(**arrays, backend=backend)
    written = [arrays[name] for name in OPS[op].updated if family == "torch" and arrays[name] is not None]
    return problem_of(op, given, tuple(map(to_numpy, (*values.as_tuple(result), *written))))
