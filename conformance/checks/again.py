"""More calls: nothing of one call stays for the next, and a result once given stays as it is."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import verdict
from polyfuse.conformance.inputs import make_inputs
from polyfuse.dispatch import to_numpy
from polyfuse.reference import oracle
from polyfuse.spec import SpecError, bind

PROVES = (
    "A call repeated many times is right each time; after its inputs have changed in place, a call gives what they are "
    "now; and no later call changes an earlier result."
)


def check(attempt: Attempt) -> Iterator[str]:
    """Which later call is wrong, or which earlier result it has changed."""
    arrays = attempt.place()
    outputs = attempt.run(arrays)
    before = [_bits(x) for x in outputs]
    yield from _changed_inputs(attempt, arrays)
    for name, bits, now in zip(_names(attempt), before, outputs, strict=False):
        if _bits(now) != bits:
            yield f"{name}: a later call has changed the result of an earlier one"
    yield from _repeated(attempt)


def _names(attempt: Attempt) -> list[str]:
    return [output.name for output in attempt.call.results]


def _bits(x: Any) -> bytes:
    return to_numpy(x).tobytes()


def _repeated(attempt: Attempt) -> Iterator[str]:
    """The same call over and over: what differs in bits from the first must still be right."""
    first: list[bytes] | None = None
    for number in range(attempt.repeats):
        arrays = attempt.place()
        results = attempt.results(arrays, attempt.run(arrays))
        bits = [_bits(x) for x in results]
        first = first or bits
        if bits != first:
            problem = verdict(results, attempt.call, attempt.exact)
            if problem:
                yield f"call {number + 1} of {attempt.repeats} with the same arguments: {problem}"
                return


def _changed_inputs(attempt: Attempt, arrays: dict[str, Any]) -> Iterator[str]:
    """Other values in the arrays of a call, all at once; where arrays cannot be written, in others of the same kind."""
    try:
        values = make_inputs(attempt.call.op, attempt.case, attempt.trial.seed + 1)
        call = bind(attempt.call.op, values)
        exact = oracle(attempt.op).intervals(**values)
    except SpecError:  # this case has no second set of values
        return
    fresh = attempt.place(values)
    if attempt.family != "jax":
        for name, value in fresh.items():
            old = arrays[name]
            if isinstance(values[name], np.ndarray) and _writable(old):
                old[...] = value
                fresh[name] = old
    problem = verdict(attempt.results(fresh, attempt.run(fresh)), call, exact)
    if problem:
        yield f"after the inputs have changed in place: {problem}"


def _writable(x: Any) -> bool:
    """Whether each element has memory of its own."""
    strides = x.stride() if hasattr(x, "data_ptr") else x.strides
    return all(step for step, size in zip(strides, x.shape, strict=True) if size > 1)
