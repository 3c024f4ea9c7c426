"""One case on one backend: the arrays, the call and its results, which the checks look at."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

import polyfuse
from polyfuse.conformance.bits import anything, snapshot
from polyfuse.conformance.inputs import place
from polyfuse.dispatch import Backend, Candidate, device_of, examine, family_of
from polyfuse.spec import Capability

if TYPE_CHECKING:
    from polyfuse.conformance.other import Inputs
    from polyfuse.conformance.trial import Trial
    from polyfuse.reference import Exact


class Attempt:
    """A case that a backend claims to run on a device. `made` are its NumPy inputs, `call` the validated call.

    `repeats` is how often a check calls the backend that looks for what one call in many shows.
    The first call is made when something asks for its `outputs`; `arrays` are what it was given, which no check writes.
    """

    def __init__(self, trial: "Trial", backend: Backend, device: str, capability: Capability, repeats: int = 1) -> None:
        self.trial, self.backend, self.device, self.capability = trial, backend, device, capability
        self.op, self.case = trial.op, trial.case
        self.repeats = repeats
        self.made, self.call = trial.inputs()

    @property
    def family(self) -> str:
        """The kind of the backend's arrays."""
        return self.backend.family

    @property
    def exact(self) -> "dict[str, Exact]":
        """The oracle's interval of each result."""
        return self.trial.exact()

    @cached_property
    def support(self) -> Candidate:
        """Whether the backend claims the call, and if not why."""
        where = device_of(next(x for x in self.arrays.values() if family_of(x)), self.family)
        return examine(self.op, self.backend.name, self.call, self.family, where, False)[0]

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The arguments of the first call."""
        return self.place()

    @cached_property
    def outputs(self) -> tuple[Any, ...]:
        """What the first call returned."""
        return self.run(self.arrays)

    @cached_property
    def free(self) -> "list[Any]":
        """Of each result, which elements may hold anything."""
        return [anything(self.exact[output.name]) for output in self.call.results]

    @cached_property
    def first(self) -> list[Any]:
        """Copies of all results of the first call, which nothing changes."""
        return snapshot(self.results(self.arrays, self.outputs))

    @cached_property
    def other(self) -> "Inputs | None":
        """The case with other values in its arrays; None if it has none. They are made once for all backends."""
        return self.trial.other()

    @property
    def interpreted(self) -> bool:
        """Whether the backend is emulated here, and slow."""
        return self.device in self.capability.interpreted

    @property
    def slow(self) -> bool:
        """Whether calls take long here: all of an emulated backend, or each that a kernel is compiled for."""
        return self.interpreted or self.device in self.capability.compiled

    @property
    def read_on_host(self) -> tuple[str, ...]:
        """The arrays of the call whose values the backend claims to read on the host."""
        return self.capability.read_on_host(self.call)

    @property
    def single(self) -> bool:
        """Whether the case is one call: one that repeats its rows is large, and has a check of its own."""
        return self.case.repeat == 1

    @property
    def thorough(self) -> bool:
        """Whether checks may call the backend many times: on core cases, and on all where it is not emulated."""
        return self.trial.core or not self.interpreted

    @property
    def in_place(self) -> tuple[str, ...]:
        """The updated arguments that the backend writes in place; those of other kinds of arrays it returns."""
        return tuple(output.name for output in self.call.updated) if self.family == "torch" else ()

    def place(self, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fresh arguments for the backend of the case's values, or of others that are laid out alike."""
        return place(self.made if values is None else values, self.family, self.device, self.case.stacked)

    def run(self, arrays: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a call with these arguments returns, also of an op that has one result."""
        result = self.returned(arrays)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def returned(self, arrays: Mapping[str, Any]) -> Any:
        """What a call with these arguments returns, as the caller gets it."""
        with np.errstate(all="ignore"):  # Triton's interpreter computes with NumPy
            return getattr(polyfuse, self.op)(**arrays, backend=self.backend.name)

    def results(self, arrays: Mapping[str, Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """All results of a call: what it returned, and the arguments that it updated in place behind them."""
        return (*outputs, *(arrays[name] for name in self.in_place))
