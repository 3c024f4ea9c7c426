"""Many calls: what one call in hundreds shows, alone and beside another thread's."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.bits import snapshot, unequal
from polyfuse.conformance.other import Inputs
from polyfuse.dispatch import to_numpy

PROVES = (
    "The same call gives the same bits each time: 600 to 1500 times on core cases, as many as 3 seconds allow (where a "
    "backend is emulated as many as 1 second allows), as often as the level says on others; no two of 64 results share "
    "memory; and two threads that call at once, with different values, each get their own results."
)

# Of 1500 calls a defect in one of 500 spoils one or more with a chance of 95 %, of 600 with one of 70 %.
TIMES, LEAST_TIMES = 1500, 600
SECONDS, SECONDS_INTERPRETED = 3.0, 1.0
KEPT = 64  # results that are held, to see whether their memory is given out again
THREAD_TIMES, THREAD_SECONDS = 40, 1.0
THREAD_WAIT = 120.0


def check(attempt: Attempt) -> Iterator[str]:
    """Which of many calls is another one than the first."""
    if not attempt.single:
        return
    core = attempt.trial.core
    yield from _repeated(attempt, TIMES if core else attempt.repeats)
    if core and attempt.family == "torch" and not attempt.interpreted and attempt.other is not None:
        yield from _threads(attempt, attempt.other)  # an interpreter is no part of a backend


def _repeated(attempt: Attempt, times: int) -> Iterator[str]:
    least = 0 if attempt.interpreted else min(times, LEAST_TIMES)
    until = time.perf_counter() + (SECONDS_INTERPRETED if attempt.interpreted else SECONDS)
    wanted = [x.tobytes() for x in attempt.first]
    arrays, fresh = attempt.place(), attempt.place()
    kept: list[Any] = []
    for number in range(times):
        for name in attempt.in_place:
            arrays[name].copy_(fresh[name])
        results = attempt.results(arrays, attempt.run(arrays))
        if [to_numpy(x).tobytes() for x in results] != wanted:
            found = list(unequal(attempt.call.results, attempt.first, results, attempt.free))
            yield from (f"call {number + 1} of {times} with the same arguments: {problem}" for problem in found)
            if found:
                return
        if number < KEPT:
            kept.append(results)
        if number >= least and time.perf_counter() > until:
            break
    yield from _reused(attempt, kept)


def _reused(attempt: Attempt, kept: list[Any]) -> Iterator[str]:
    """Whether two of the results that the caller still holds lie in one memory."""
    if attempt.family != "torch":
        return
    for i, want in enumerate(attempt.call.outputs):
        memory = [results[i].untyped_storage().data_ptr() for results in kept if results[i].numel()]
        if len(set(memory)) < len(memory):
            yield f"{want.name}: of {len(memory)} results that are all in use, two lie in the same memory"


def _threads(attempt: Attempt, other: Inputs) -> Iterator[str]:
    """Two threads call again and again, one with the case's values and one with others."""
    found: list[str] = []

    def calls(made: Any, wanted: list[Any], free: list[Any], name: str) -> None:
        until = time.perf_counter() + THREAD_SECONDS
        try:
            for _ in range(THREAD_TIMES):
                arrays = attempt.place(made)
                results = attempt.results(arrays, attempt.run(arrays))
                found.extend(f"{name}: {text}" for text in unequal(attempt.call.results, wanted, results, free))
                if found or time.perf_counter() > until:
                    return
        except BaseException as error:
            found.append(f"{name}: {type(error).__name__}: {error}")

    arrays = attempt.place(other.made)
    alone = attempt.results(arrays, attempt.run(arrays))
    threads = [
        threading.Thread(target=calls, args=arguments, daemon=True)
        for arguments in (
            (attempt.made, attempt.first, attempt.free, "beside a thread with other values"),
            (other.made, snapshot(alone), other.free, "with other values, beside a thread"),
        )
    ]
    with _switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(THREAD_WAIT)
    yield from found[:1]
    if any(thread.is_alive() for thread in threads):
        yield f"two threads that call at once did not come back within {THREAD_WAIT:g} seconds"


@contextmanager
def _switching_often() -> Iterator[None]:
    """Python's threads take turns often, and have no further threads of OpenMP's, which a fork would leave locked."""
    import torch

    interval, count = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        sys.setswitchinterval(interval)
