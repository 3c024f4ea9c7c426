"""Fork and join of device streams, safe for tensor lifetimes, exceptions, nesting and graph capture."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from polyfuse.configs import flag


class StreamModule(Protocol):
    """Streams of one kind of device, as `torch.cuda` has them.

    A stream has `device`, `record_event()` and `wait_event(event)`, and `Tensor.record_stream` takes it.
    """

    def current_stream(self, device: torch.device, /) -> Any:
        """The stream on which work for the device is queued now."""
        ...

    def Stream(self, device: torch.device, /) -> Any:  # noqa: N802
        """A new stream."""
        ...

    def stream(self, stream: Any, /) -> AbstractContextManager[Any]:
        """A context in which the stream is the current one."""
        ...


_MODULES: dict[str, StreamModule] = {}


def register_stream_module(device_type: str, module: StreamModule) -> None:
    """Use these streams for devices of this type from now on, in place of `torch.get_device_module`'s."""
    _MODULES[device_type] = module


_depth: ContextVar[int] = ContextVar("polyfuse_stream_depth", default=0)


class _Pool(threading.local):
    """Each thread's auxiliary streams: what one thread queues must not end up in another's graph capture."""

    def __init__(self) -> None:
        self.streams: dict[tuple[torch.device, int, int], Any] = {}


_pool = _Pool()


@lru_cache(maxsize=1)
def streams_enabled() -> bool:
    """False if the environment variable POLYFUSE_STREAMS is 0; read once per process.

    Raises `SpecError` for a value that is neither 0 nor 1.
    """
    return flag("POLYFUSE_STREAMS") is not False


def execute_in_parallel(
    *branches: Callable[[], Any], device: torch.device | None = None, inputs: Sequence[torch.Tensor] = ()
) -> tuple[Any, ...]:
    """Call every branch, each on a stream of its own, and return their results in order.

    The first branch runs on the current stream, the others on auxiliary streams of `device` (default: the
    current accelerator). An auxiliary stream starts after all work already queued on the current stream, and the
    current stream goes on after all auxiliary ones: for the caller the call is one step of the current stream.

    Every tensor in a branch's result is kept from reuse until the current stream is past its use, and every one
    of `inputs` until the auxiliary streams are; name there the tensors whose last reference a branch may drop.
    Inside CUDA graph capture the fork and the join are captured. Nested calls use further streams.

    Without streams (a CPU device, or POLYFUSE_STREAMS=0) the branches run in order, with the same results. So they do
    in what `torch.compile` or `torch.export` traces: a graph has one stream, and streams are only an optimisation.

    Raises the exception of the first branch that raised, after every branch was called and all streams have
    joined; those of other branches are added to it as notes.
    """
    place = None if torch.compiler.is_compiling() else device or _current_device()
    own = _MODULES.get(place.type) if place is not None else None
    if place is None or not (own or place.type != "cpu") or not streams_enabled() or len(branches) < 2:
        return _gather([_attempt(branch) for branch in branches])
    module = own or torch.get_device_module(place)
    main = module.current_stream(place)
    depth = _depth.get()
    token = _depth.set(depth + 1)
    fork = main.record_event()
    side = [_stream(module, main.device, depth, i) for i in range(len(branches) - 1)]
    outcomes: list[tuple[Any, BaseException | None]] = []
    try:
        for branch, stream in zip(branches[1:], side, strict=True):
            stream.wait_event(fork)
            for tensor in inputs:
                tensor.record_stream(stream)
            with module.stream(stream):
                outcomes.append(_attempt(branch))
        outcomes.insert(0, _attempt(branches[0]))
    finally:
        _depth.reset(token)
        for stream in side:
            main.wait_event(stream.record_event())
    for result, _ in outcomes[1:]:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == place.type:
                leaf.record_stream(main)
    return _gather(outcomes)


def _attempt(branch: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return branch(), None
    except Exception as error:
        return None, error


def _gather(outcomes: list[tuple[Any, BaseException | None]]) -> tuple[Any, ...]:
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"another branch raised {type(other).__name__}: {other}")
        raise errors[0]
    return tuple(result for result, _ in outcomes)


def _current_device() -> torch.device | None:
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    return None if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def _stream(module: Any, device: torch.device, depth: int, index: int) -> Any:
    key = (device, depth, index)
    if key not in _pool.streams:
        _pool.streams[key] = module.Stream(device)
    return _pool.streams[key]
