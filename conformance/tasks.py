"""A unit of a run: one case on all backends. It gives the same results in this process and in a worker."""

import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from polyfuse.configs import level as load_level
from polyfuse.conformance.case import Case
from polyfuse.conformance.report import Result
from polyfuse.conformance.trial import Note, Trial
from polyfuse.dispatch import Backend, Support, registry, support
from polyfuse.spec import BackendError

_KEPT = 2**30  # bytes


@dataclass(frozen=True)
class Task:
    """One case on some backends, by their names.

    `first` is the number of its first result in the run. With `claims` it also gives what each backend claims of the
    op.
    """

    first: int
    op: str
    case: Case
    backends: tuple[str, ...]
    device: str
    level: str
    claims: bool = False

    @cached_property
    def kind(self) -> str:
        """What a compiler sees of the case: a process that ran one case of a kind need not compile for the next."""
        return f"{self.op} {replace(self.case, name='', fill={}, layout={}, stacked=())}"

    @property
    def is_large(self) -> bool:
        """Whether the case takes tens of GiB of an accelerator's memory, as one does that repeats its rows."""
        return self.device != "cpu" and self.case.repeat > 1


def perform(task: Task, note: Note = lambda stage: None) -> Iterator[Support | Result]:
    """What each backend claims of the op, if that is asked for, and a result; the exact results are made once."""
    level = load_level(task.level)
    trial = Trial(task.op, task.case, level.seed)
    for name in task.backends:
        backend = registry().get(name)
        if task.claims:
            yield from _claim(task.op, name)
        yield trial.result(backend, "cpu" if backend.family == "numpy" else task.device, level, note)
        _release()


def _release() -> None:
    """Give back what PyTorch keeps of a GPU's memory for later, where it is much: other processes share the device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > _KEPT:
        torch.cuda.empty_cache()


def _claim(op: str, backend: str) -> Iterator[Support]:
    """What the backend claims, unless its module cannot be imported: that is for the results to say."""
    try:
        yield support(op, backend)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return


def register(plugins: Sequence[str]) -> None:
    """Add the backends that MODULE:OBJECTs name to the registry, unless they are there.

    Raises `BackendError` for one that names no backend.
    """
    for plugin in plugins:
        module, _, name = plugin.partition(":")
        try:
            backend = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise BackendError(f"--plugin: expected an importable MODULE:OBJECT, got {plugin!r} ({error})") from error
        if not isinstance(backend, Backend):
            raise BackendError(f"--plugin: {plugin} is not a polyfuse.dispatch.Backend but {type(backend).__name__}")
        if backend.name not in registry().names() or registry().get(backend.name) != backend:
            registry().add(backend)


def answers(device: str) -> bool:
    """Whether an accelerator still computes: after some errors a process can use it no more.

    JAX that could not begin to use a GPU, for instance as its memory was full, does not try it again.
    """
    if device == "cpu":
        return True
    import torch

    try:
        if "jax" in sys.modules and device.partition(":")[0] == "cuda":
            sys.modules["jax"].devices("cuda")
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except Exception:
        return False
