"""Where results and inputs lie: the strides of results, and that no input was written."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyfuse.conformance.checks.values import as_tuple
from polyfuse.dispatch import family_of, to_numpy
from polyfuse.spec import Call


def check_strides(result: Any, call: Call) -> str | None:
    """What is wrong with a torch result whose strides the spec gives, or None."""
    for want, got in zip(call.outputs, as_tuple(result), strict=False):
        if want.strides and family_of(got) == "torch" and got.stride() != want.strides:
            return f"{want.name}: expected strides {list(want.strides)}, got {list(got.stride())}"
    return None


def check_inputs(before: Mapping[str, Any], after: Mapping[str, Any], updated: Sequence[str]) -> str | None:
    """Which input a backend has written to that is none of the `updated`, or None."""
    for name, value in before.items():
        if isinstance(value, np.ndarray) and name not in updated:
            now = to_numpy(after[name]).astype(value.dtype, copy=False)
            if value.tobytes() != now.tobytes():
                return f"{name}: the backend wrote to its input"
    return None
