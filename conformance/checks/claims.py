"""What a backend does not claim to run, it refuses."""

from collections.abc import Callable
from typing import Any

from polyfuse.spec import Unsupported


def check_refusal(run: Callable[[dict[str, Any]], Any], arrays: dict[str, Any], reason: str) -> str | None:
    """What is wrong if the backend runs a call that it does not claim, or None; `reason` says what it lacks."""
    try:
        run(arrays)
    except Unsupported:
        return None
    return f"ran, though it does not claim to: {reason}"
