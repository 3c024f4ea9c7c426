"""A Polyfuse backend for NVIDIA GPUs: the kernels of flash-linear-attention."""

from importlib.util import find_spec

from polyfuse.dispatch import Backend

BACKEND = Backend(
    name="fla",
    family="torch",
    module="polyfuse_fla",
    requires=("torch",),
    implements={"gated_delta_rule": 1},
)


def unavailable() -> str | None:
    """Why the backend cannot run on this machine; None if it can."""
    if find_spec("fla") is None:
        return "fla is not installed: pip install flash-linear-attention"
    return None
