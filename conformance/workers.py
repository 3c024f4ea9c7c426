"""Worker processes: a case that crashes, hangs, leaks or exits costs its own result and no other."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from polyfuse.conformance.report import Ending, Result
from polyfuse.conformance.tasks import Task
from polyfuse.conformance.trial import EXACT, LOADING, waived
from polyfuse.conformance.worker import Message, Setup, resident
from polyfuse.dispatch import Support, registry
from polyfuse.spec import OPS, BackendError

_REUSED = str(2**30)  # bytes up to which glibc keeps freed arrays: to map and clear them anew is a third of a long run
_POLL = 0.05  # seconds between two looks at the time and the memory of the workers
_START = 120.0  # seconds until a worker is ready, and for loading a backend, which imports whole frameworks
_GRACE = 2.0  # seconds until a process that has hung up has ended
_GIB = 2**30
_LINES = 8  # of what a process said last, in a detail


@dataclass(frozen=True)
class Limits:
    """What a case may take on one backend: seconds, and GiB that its process holds more than when it began."""

    time: float
    memory: float


class Workers:
    """Some worker processes, each started when there is a task for it, and replaced when it has ended or grown.

    They are started anew, not forked: JAX and CUDA do not survive that.
    """

    def __init__(self, setup: Setup, count: int, limits: Limits, device: str) -> None:
        self._setup, self._count, self._limits, self._device = setup, count, limits, device
        self._workers: dict[int, _Worker] = {}

    def perform(self, tasks: Sequence[Task]) -> Generator[tuple[int, Support | Result]]:
        """What becomes of the tasks as it comes, each result with its number in the run.

        Large ones come first, and have a device to themselves: of what the others allocate much is kept until they end.
        Raises `BackendError` if a worker cannot start.
        """
        waiting = deque(sorted(tasks, key=lambda task: not task.is_large))
        programs = tempfile.TemporaryDirectory(prefix="polyfuse-")  # what one worker has compiled, for all
        try:
            while waiting or any(worker.task for worker in self._workers.values()):
                self._employ(waiting, programs.name)
                wait([worker.connection for worker in self._workers.values()], _POLL)
                for slot, worker in list(self._workers.items()):
                    yield from worker.heard()
                    yield from self._stopped(worker)
                    if worker.task and worker.gone:
                        waiting.appendleft(worker.task)
                    if worker.gone or (worker.idle and self._holds_much(worker, waiting)):
                        worker.close()
                        del self._workers[slot]
        finally:
            for worker in self._workers.values():
                worker.close()
            programs.cleanup()

    def _holds_much(self, worker: "_Worker", waiting: deque[Task]) -> bool:
        """Whether an idle worker is to end, as what it holds of the memory is needed by others."""
        return worker.grown > self._limits.memory / 2 or (worker.filled and not (waiting and waiting[0].is_large))

    def _employ(self, waiting: deque[Task], programs: str) -> None:
        """Give every idle worker a task, and start missing ones; while a task is large, one for each device."""
        large = (waiting and waiting[0].is_large) or any(w.task and w.task.is_large for w in self._workers.values())
        for slot in range(min(self._count, accelerators(self._device)) if large else self._count):
            if waiting and slot not in self._workers:
                environment = _environment(self._device, slot, self._count)
                self._workers[slot] = _Worker(self._setup, {**_compiled_once(programs), **environment})
            if waiting and self._workers[slot].idle:
                task = self._next(self._workers[slot], waiting)
                waiting.remove(task)
                self._workers[slot].give(task)

    def _next(self, worker: "_Worker", waiting: deque[Task]) -> Task:
        """The first task if it is large, or that is of a kind that the worker has compiled, or no other worker has."""
        if waiting[0].is_large:
            return waiting[0]
        others = {kind for other in self._workers.values() if other is not worker for kind in other.kinds}
        known = (task for task in waiting if task.kind in worker.kinds)
        return next(known, None) or next((task for task in waiting if task.kind not in others), waiting[0])

    def _stopped(self, worker: "_Worker") -> Iterator[tuple[int, Result]]:
        """The result of a case that has ended its process, or that is at a limit."""
        stop, task = worker.stopped(self._limits), worker.task
        if not stop or not task:
            return
        # Without exact results none of the backends can be judged.
        names = task.backends if worker.stage == EXACT else task.backends[:1]
        for number, name in enumerate(names, task.first):
            core = task.case.name in OPS[task.op].core
            found = Result(task.op, name, task.case.name, "failed", round(worker.used, 5), stop.text, core=core)
            checks = () if worker.stage in (LOADING, EXACT) else (worker.stage,)
            yield number, waived(replace(found, ending=stop.ending, checks=checks), registry().get(name))
        worker.finish(len(names))


@dataclass(frozen=True)
class _Stop:
    """How a process ended without a result, and what there is to say of it."""

    ending: Ending
    text: str


class _Worker:
    """One process, and how far it is. `task` is what it has to do yet: the backends that have no result.

    `idle` is True if it waits for a task, `gone` if it takes no more, and `filled` if it had a large one. `kinds` are
    those of its tasks so far.
    """

    def __init__(self, setup: Setup, environment: dict[str, str]) -> None:
        self.task: Task | None = None
        self.idle, self.gone, self.filled, self.stage = False, False, False, ""
        self.kinds: set[str] = set()
        self._ready = self._dead = False
        self._since, self._counted = time.monotonic(), 0.0
        self._base: int | None = None  # resident when the first task was done
        self._before = 0  # resident when the case that runs began
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, it is closed in `close`
        self._mark = 0  # where the output of the case that runs begins
        self.connection: Connection[Any, Message]
        self.connection, theirs = Pipe()
        serve = f"from polyfuse.conformance.worker import serve; serve({theirs.fileno()})"
        # In a session of its own Ctrl-C does not reach it, and what it has started ends with it.
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-X", "faulthandler", "-c", f"import sys; sys.path[:] = {sys.path!r}; {serve}"],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, env=environment,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()
        self._send(setup)

    def give(self, task: Task) -> None:
        """Send a task."""
        self.task, self.idle = task, False
        self.filled = self.filled or task.is_large
        self.kinds.add(task.kind)
        self._begin()
        self._send(task)

    def finish(self, count: int) -> None:
        """Take note that so many of the task's backends have a result."""
        if self.task:
            left = self.task.backends[count:]
            self.task = replace(self.task, backends=left, first=self.task.first + count) if left else None
        self._begin()

    def heard(self) -> Iterator[tuple[int, Support | Result]]:
        """What the process has said since. Raises `BackendError` if it says that it cannot start."""
        dead = self._process.poll() is not None
        try:
            while self.connection.poll():
                yield from self._hear(self.connection.recv())
        except (EOFError, OSError):
            dead = True
        if dead and not self.gone:
            self.gone = self._dead = True
            try:
                self._process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                self._kill()

    @property
    def used(self) -> float:
        """Seconds that the case has taken on the backend, without those for loading it and for the exact results."""
        return self._counted + (0.0 if self.stage in (LOADING, EXACT) else time.monotonic() - self._since)

    @property
    def grown(self) -> float:
        """GiB that the process holds more than after its first task."""
        return 0.0 if self._base is None else (resident(self._process.pid) - self._base) / _GIB

    def stopped(self, limits: Limits) -> _Stop | None:
        """How the case has ended the process, or is ended here as it is at a limit.

        Raises `BackendError` if the process has ended before it was ready, or takes too long for that.
        """
        if self._dead:
            if not self._ready:
                raise BackendError(f"a worker process could not start: {self._death().text}")
            return self._death() if self.task else None
        if self.gone or self.idle:
            return None
        loading = not self._ready or self.stage == LOADING
        limit = _START if loading else limits.time
        taken = time.monotonic() - self._since if loading or self.stage == EXACT else self.used
        more = (resident(self._process.pid) - self._before) / _GIB
        if taken <= limit and (more <= limits.memory or not self.task):
            return None
        if taken > limit:
            self._process.send_signal(signal.SIGUSR1)  # which makes it write where it is
            time.sleep(_GRACE / 10)
            stop = _Stop("timed_out", f"took longer than {limit:g} s{self._where()}")
        else:
            stop = _Stop("out_of_memory", f"took {more:.1f} GiB of memory, of {limits.memory:g} allowed{self._where()}")
        self._kill()
        self.gone = True
        if not self._ready:
            raise BackendError(f"a worker process could not start: {stop.text}")
        return stop

    def close(self) -> None:
        """End the process, and all that it has started, at once."""
        self._kill()
        self.connection.close()
        self._output.close()

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # all have ended, or it has not begun its session yet
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # what waits for a device that hangs cannot be ended
            self._process.wait(_GRACE)

    def _send(self, content: Setup | Task) -> None:
        with suppress(OSError):  # it has ended, which `heard` finds out
            self.connection.send(content)

    def _hear(self, message: Message) -> Iterator[tuple[int, Support | Result]]:
        match message.kind:
            case "broken":
                raise BackendError(f"a worker process could not start: {message.content}")
            case "ready":
                self._ready = self.idle = True
            case "begin":
                self._before, self._mark = message.content
            case "at":
                self._counted, self._since, self.stage = self.used, time.monotonic(), message.content
            case "found":
                yield self.task.first if self.task else 0, message.content
                if isinstance(message.content, Result):
                    self.finish(1)
            case "done":
                self._base = self._base or resident(self._process.pid)
                self.idle = True
            case "lost":
                self.gone = True

    def _begin(self) -> None:
        """Begin to count for the next case."""
        self._since, self._counted, self.stage = time.monotonic(), 0.0, LOADING

    def _death(self) -> _Stop:
        code = self._process.returncode
        if code is None:
            return _Stop("crashed", f"did not end when it was killed{self._where()}")
        if code >= 0:
            return _Stop("exited", f"ended the process with exit status {code}{self._where()}")
        name, meaning = signal.Signals(-code).name, signal.strsignal(-code)
        killed = ", as the system does if memory runs out" if name == "SIGKILL" else ""
        return _Stop("crashed", f"ended the process by {name} ({meaning}{killed}){self._where()}")

    def _where(self) -> str:
        """What went on, and on further lines what the process said last."""
        stage = self.stage if self.stage in (LOADING, EXACT) else f"the check {self.stage}"
        lines = self._said()
        return (f" during {stage}" if self._ready and self.stage else "") + "".join(f"\n  {line}" for line in lines)

    def _said(self) -> list[str]:
        """The last lines of the case's output; of a dump of all threads, those of the one that ended the process."""
        self._output.seek(self._mark)
        text = self._output.read().decode(errors="replace")
        lines = text.strip().splitlines()
        dumps = [n for n, line in enumerate(lines) if line.startswith(("Current thread", "Stack (most recent"))]
        return lines[dumps[-1] : dumps[-1] + _LINES] if dumps else lines[-_LINES:]


def _environment(device: str, slot: int, count: int) -> dict[str, str]:
    """The environment of one of `count` workers, which share the cores.

    Of several GPUs each sees one, the first of all as `device`, and none reserves the memory that others need.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        environment.setdefault(name, _REUSED)
    if device == "cuda":
        given = environment.get("CUDA_VISIBLE_DEVICES")
        visible = given.split(",") if given else [str(number) for number in range(accelerators(device))]
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    return environment


def _compiled_once(folder: str) -> dict[str, str]:
    """The variables that let JAX compile each program once for all cases and workers that keep theirs in a folder.

    Programs are told apart by all that XLA sees of them: cases of several kinds, such as layouts that are alike on JAX,
    have one. Whoever has set the folder, to keep it for another run, has it.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def accelerators(device: str) -> int:
    """How many accelerators there are that a run on `device` may use: one where torch is not there to count them."""
    if find_spec("torch") is None:
        return 1
    import torch

    return max(1, torch.get_device_module(device.partition(":")[0]).device_count()) if ":" not in device else 1


def default_count(device: str) -> int:
    """How many workers a run has unless told: one for each accelerator, or for each core up to four."""
    if device != "cpu":
        return accelerators(device)
    return min(4, _cores())


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
