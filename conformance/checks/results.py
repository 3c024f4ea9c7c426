"""What kind of arrays the results are, and how they lie in memory."""

from collections.abc import Iterator

from polyfuse.conformance.attempt import Attempt

PROVES = "Results have the strides that the spec gives."


def check(attempt: Attempt) -> Iterator[str]:
    """Which result is another array than the spec says."""
    for want, got in zip(attempt.call.outputs, attempt.outputs, strict=False):
        if want.strides and attempt.family == "torch" and got.stride() != want.strides:
            yield f"{want.name}: expected strides {list(want.strides)}, got {list(got.stride())}"
