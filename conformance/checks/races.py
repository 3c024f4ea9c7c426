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
    "The same call gives the same bits each time: on an op's core cases 3000 times in all, or as often as some seconds "
    "allow; on others, of a backend that is not emulated, as often as the level says, or 64 times if that takes longer "
    "than some hundredths of a second; no two of 64 results share memory; and of two threads that call at once, with "
    "different values, each gets its own results."
)

TIMES = 3000  # in all: a defect of one call in 500 spoils one or more of them with a chance of 99.7 %
SECONDS, SECONDS_OTHERS = 2.0, 0.02  # of one case: a core case, and another one
SECONDS_EMULATED = 0.2  # a race is between threads of a device, or calls; an interpreter has the former one by one
KEPT = 64  # results that are held, to see whether their memory is given out again; as many calls there are at least
THREAD_TIMES, THREAD_SECONDS = 40, 1.0
THREAD_WAIT = 120.0


def check(attempt: Attempt) -> Iterator[str]:
    """Which of many calls is another one than the first."""
    if not attempt.single or not attempt.thorough:
        return
    core = attempt.trial.core
    times = max(TIMES // len(attempt.call.op.core), KEPT) if core else attempt.repeats
    seconds = SECONDS_EMULATED if attempt.interpreted else SECONDS if core else SECONDS_OTHERS
    yield from _repeated(attempt, times, seconds)
    if core and attempt.family == "torch" and not attempt.interpreted and attempt.other is not None:
        yield from _threads(attempt, attempt.other)  # an interpreter is no part of a backend


def _repeated(attempt: Attempt, times: int, seconds: float) -> Iterator[str]:
    least = 0 if attempt.interpreted else KEPT
    until = time.perf_counter() + seconds
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
