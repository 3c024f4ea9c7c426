"""Importing this module registers every op as `torch.ops.polyfuse.<op>`, for graphs built by hand.

`torch.compile` of the public functions needs no import: they register themselves when traced.
"""

from polyfuse.spec import not_installed

if missing := not_installed(__name__, "torch"):
    raise missing

from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS

__all__ = ["schemas"]


def schemas() -> dict[str, str]:
    """The schema of every registered op, by name, in torch's notation."""
    return {name: _torch_library.schema(op) for name, op in CALLS.items()}
