"""What a backend does not claim to run, it refuses."""

import polyfuse
from polyfuse.conformance.attempt import Attempt
from polyfuse.spec import Unsupported


def check_refusal(attempt: Attempt, reason: str) -> str | None:
    """What is wrong if the backend runs a case that it does not claim, or None; `reason` says what it lacks.

    It is refused where the backend is named, and where it is asked which backend would run the call.
    """
    name = attempt.backend.name
    explained = {c.name: c for c in polyfuse.explain(attempt.op, **attempt.arrays, backend=name).candidates}
    if explained[name].status != "unsupported":
        return f"explained as {explained[name].status}, though it does not claim to run: {reason}"
    try:
        attempt.run(attempt.arrays)
    except Unsupported:
        return None
    return f"ran, though it does not claim to: {reason}"
