"""A worker process of a run: it performs tasks and tells the process that started it what becomes of them."""

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from polyfuse.conformance.report import Result
from polyfuse.conformance.tasks import answers, perform, register
from polyfuse.conformance.trial import LOADING
from polyfuse.dispatch import registry
from polyfuse.spec import BackendError

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know before its first task: `plugins` as the command line has them, and the backends."""

    plugins: Sequence[str]
    backends: Sequence[str]


@dataclass(frozen=True)
class Message:
    """What a worker says.

    `ready` comes once, or `broken` with the reason. Of each case on each backend come `begin` with the memory that is
    resident and the length of the output so far, `at` with what goes on, and `found` with a `Result`, or before with a
    `Support`. In the end comes `done`, or `lost` if the device answers no more: the rest of the task is for another
    worker.
    """

    kind: Literal["ready", "broken", "begin", "at", "found", "done", "lost"]
    content: Any = None


def serve(descriptor: int) -> None:
    """Perform the tasks that come in, until none can come any more."""
    if sys.platform == "linux":  # else a worker that hangs would outlive a parent that is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    connection: Connection[Message, Any] = Connection(descriptor)
    try:
        _prepare(connection.recv())
    except BackendError as error:
        connection.send(Message("broken", str(error)))
        return
    connection.send(Message("ready"))

    def note(stage: str) -> None:
        if stage == LOADING:
            connection.send(Message("begin", (resident(os.getpid()), os.fstat(1).st_size)))
        connection.send(Message("at", stage))

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        for found in perform(task, note):
            connection.send(Message("found", found))
            if isinstance(found, Result) and found.status in ("failed", "waived") and not answers(task.device):
                connection.send(Message("lost"))
                return
        connection.send(Message("done"))


def resident(process: int) -> int:
    """Bytes of memory that a process holds, where the system says so (Linux), else 0."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _prepare(setup: Setup) -> None:
    """Register the plugins. Raises `BackendError` if a backend of the run is not known here."""
    register(setup.plugins)
    for name in setup.backends:
        try:
            registry().get(name)
        except BackendError as error:
            how = "a worker process finds those of installed packages and of --plugin; try workers=0 (-j 0)"
            raise BackendError(f"{error}; {how}") from error
