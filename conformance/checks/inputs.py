"""What a call does to its inputs: only the updated ones are written."""

from collections.abc import Iterator

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import to_numpy

PROVES = "No input is written but the arguments that the op updates."


def check(attempt: Attempt) -> Iterator[str]:
    """Which input has been written."""
    _ = attempt.outputs
    for name, value in attempt.made.items():
        if isinstance(value, np.ndarray) and name not in attempt.in_place:
            now = to_numpy(attempt.arrays[name]).astype(value.dtype, copy=False)
            if value.tobytes() != now.tobytes():
                yield f"{name}: the backend wrote to its input"
