"""Which thread and which process a call is made in."""

import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import problems

PROVES = (
    "A call is right in another thread than the one that called first (of an emulated backend on core cases) and, of a "
    "torch backend on a CPU, in a process that was forked after the first call (core cases)."
)

FORK_SECONDS = 20.0  # twice: a process that other threads were busy in may be forked while one of them holds a lock

NO_ANSWER = f"no result within {FORK_SECONDS:g} seconds"


def check(attempt: Attempt) -> Iterator[str]:
    """What is wrong with a call elsewhere."""
    if not attempt.single or not attempt.thorough:
        return
    _ = attempt.outputs
    yield from (f"in another thread: {problem}" for problem in _in_a_thread(attempt))
    if attempt.trial.core and attempt.family == "torch" and attempt.device == "cpu" and not attempt.interpreted:
        # Neither JAX nor a GPU's driver can be used in a forked process, and it makes no difference to an interpreter.
        found = _in_a_fork(attempt)
        if found == [NO_ANSWER]:
            found = _in_a_fork(attempt)
        yield from (f"in a forked process: {problem}" for problem in found)


def _call(attempt: Attempt) -> list[str]:
    arrays = attempt.place()
    try:
        return list(problems(attempt.results(arrays, attempt.run(arrays)), attempt.call, attempt.exact))
    except BaseException as error:
        return [f"{type(error).__name__}: {error}"]


def _in_a_thread(attempt: Attempt) -> list[str]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(_call(attempt)))
    thread.start()
    thread.join()
    return found


def _in_a_fork(attempt: Attempt) -> list[str]:
    """The problems that a forked process writes to a pipe before it ends without any clean-up of Python's."""
    _ = attempt.exact
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other threads are gone there: which is what is looked at
        child = os.fork()
    if child == 0:
        try:
            import torch

            torch.set_num_threads(1)  # OpenMP's threads do not live on in a forked process
            os.write(writing, b"\n".join(problem.encode()[:500] for problem in _call(attempt))[:4000] + b"\0")
        finally:
            os._exit(0)
    os.close(writing)
    try:
        return _answer(reading)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(reading: int) -> list[str]:
    text, until = b"", time.monotonic() + FORK_SECONDS
    while not text.endswith(b"\0"):
        left = until - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            return [NO_ANSWER]
        more = os.read(reading, 65536)
        if not more:
            return ["it ended without a result"]
        text += more
    return text[:-1].decode(errors="replace").splitlines()
