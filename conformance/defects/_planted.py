"""A backend that is made of functions, and what defects are made with."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyfuse.dispatch import Backend, Implementation, registry
from polyfuse.spec import OPS, Capability

Function = Callable[..., Any]


@dataclass(frozen=True)
class Planted(Backend):
    """A backend of functions that are given, in place of modules that it is imported from."""

    functions: Mapping[str, Implementation] = field(default_factory=dict)

    def missing(self, op: str) -> tuple[str, str] | None:
        """Why the op is not there, or None."""
        return None if op in self.functions else ("not_implemented", f"does not implement {op}")

    def load(self, op: str) -> Implementation:
        """The function that was given for the op."""
        return self.functions[op]


def planted(
    name: str, op: str, like: str, make: Callable[[Function], Function], capability: Capability | None = None
) -> Backend:
    """Register a backend of this name with one op: what `make` makes of the function of the backend `like`.

    It claims what that one claims, unless a capability is given.
    """
    right = registry().get(like).load(op)
    mine = {op: Implementation(make(right.function), capability or right.capability)}
    family, version = registry().get(like).family, {op: OPS[op].version}
    backend = Planted(name, family, __name__, implements=version, override=True, functions=mine)
    registry().add(backend)
    return backend


def by_name(op: str, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a backend's function by name."""
    return {**dict(zip(OPS[op].positional, args, strict=True)), **keywords}


def results(returned: Any) -> list[Any]:
    """The results of a backend's function, also of one."""
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def as_returned(found: list[Any]) -> Any:
    """The same as a backend's function returns it."""
    return tuple(found) if len(found) > 1 else found[0]


def outputs_changed(change: Callable[[list[Any]], Any]) -> Callable[[Function], Function]:
    """A defect that changes the results: `change` writes to the list of them."""

    def make(right: Function) -> Function:
        def wrong(*args: Any, **keywords: Any) -> Any:
            found = results(right(*args, **keywords))
            change(found)
            return as_returned(found)

        return wrong

    return make


def arguments_changed(change: Callable[[Any], Any], *names: str) -> Callable[[Function], Function]:
    """A defect that reads some arguments otherwise; without names the first one."""

    def make(right: Function) -> Function:
        def wrong(*args: Any, **keywords: Any) -> Any:
            if not names:
                return right(change(args[0]), *args[1:], **keywords)
            return right(*args, **{**keywords, **{n: change(keywords[n]) for n in names if keywords[n] is not None}})

        return wrong

    return make


def nudged(x: Any) -> Any:
    """The same floating tensor with its first element one step further from zero: another rounding."""
    import torch

    if not x.numel() or not x.is_floating_point() or x.element_size() == 1:
        return x
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    changed = x.clone()
    changed.view(bits)[(0,) * x.dim()] += 1
    return changed


@contextmanager
def restored() -> Iterator[None]:
    """What a defect may leave changed in the process is put back."""
    import torch

    environment, errors = dict(os.environ), np.geterr()
    state = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_grad_enabled(state[0])
        torch.set_default_dtype(state[1])
        torch.set_num_threads(state[2])
        torch.set_rng_state(state[3])
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
        np.seterr(**errors)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
