"""What a backend does not claim to run, it refuses."""

from polyfuse.conformance.attempt import Attempt
from polyfuse.spec import Unsupported


def check_refusal(attempt: Attempt, reason: str) -> str | None:
    """What is wrong if the backend runs a case that it does not claim, or None; `reason` says what it lacks."""
    try:
        attempt.run(attempt.arrays)
    except Unsupported:
        return None
    return f"ran, though it does not claim to: {reason}"
