"""A row by itself: what lies beside it in a call changes nothing."""

from collections.abc import Iterator

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.batches import Batch, Places, batches
from polyfuse.conformance.bits import differences
from polyfuse.conformance.checks.values import compare
from polyfuse.dispatch import to_numpy
from polyfuse.reference import Exact
from polyfuse.reference._numerics import Array
from polyfuse.spec import Output

PROVES = (
    "A row's results (of packed ones a sequence's, of several images an image's) are right alone, in another order and "
    "among many others; where the spec promises it, bit for bit (not on JAX, which compiles each size by itself)."
)

# Rows: past blocks of 1024 on core cases, of 128 on others, of 32 where a backend is emulated or compiled for a size.
MANY, MANY_OTHERS, MANY_SLOW = 1030, 130, 40


def check(attempt: Attempt) -> Iterator[str]:
    """Which results depend on what lies beside them."""
    if not attempt.single or not attempt.thorough or (attempt.family == "jax" and not attempt.trial.core):
        return
    slow = attempt.interpreted or attempt.family == "jax"
    many = MANY_SLOW if slow else MANY if attempt.trial.core else MANY_OTHERS
    if sum(int(np.prod(output.shape)) for output in attempt.call.outputs) > 2**21:
        many = 0  # a large case has many rows itself
    for batch in batches(attempt.case, attempt.made, attempt.call, many):
        if attempt.family == "jax" and "reverse" not in batch.name:
            continue  # another size is compiled anew
        yield from _compared(attempt, batch)


def _compared(attempt: Attempt, batch: Batch) -> Iterator[str]:
    arrays = attempt.place(batch.values)
    results = attempt.results(arrays, attempt.run(arrays))
    bitwise = attempt.call.op.independent and attempt.family != "jax"
    for i, want in enumerate(attempt.call.results):
        if want.name not in batch.same:
            continue
        here, there = batch.same[want.name]
        one, two = attempt.first[i], to_numpy(results[i])
        if not len(here):
            continue
        if len(two) <= here.max():
            yield f"{want.name}: {batch.name}: expected more than {here.max()} rows, got {len(two)}"
        elif bitwise:
            different = differences(one[there], two[here], attempt.free[i][there]).reshape(len(here), -1).any(1)
            if different.any():
                at = int(np.flatnonzero(different)[0])
                yield f"{want.name}: {batch.name}: row {there[at]} has other bits than in the whole call"
        else:
            problem = _right(want, two, attempt.exact[want.name], here, there)
            if problem:
                yield f"{batch.name}: {problem}"


def _right(want: Output, got: Array, exact: Exact, here: Places, there: Places) -> str | None:
    kept = None if exact.kept is None else exact.kept[there]
    part = Exact(exact.value[there], exact.low[there], exact.high[there], exact.bits, exact.parts, kept)
    return compare(want.name, got[here], part, want.dtype)
