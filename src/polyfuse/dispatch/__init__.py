"""Backend registry, selection and the call path. Backends are named by string and imported lazily."""

from polyfuse.dispatch._arrays import (
    Device,
    check_device,
    convert,
    device_of,
    family_of,
    from_numpy,
    to_numpy,
    torch_device,
)
from polyfuse.dispatch._call import call_counts, explain, named, public, refresh, run
from polyfuse.dispatch._matrix import Support, support
from polyfuse.dispatch._registry import GROUP, Backend, Implementation, registry
from polyfuse.dispatch._select import Candidate, Explanation, Preference, examine, preference, use_backend

__all__ = [
    "GROUP",
    "Backend",
    "Candidate",
    "Device",
    "Explanation",
    "Implementation",
    "Preference",
    "Support",
    "call_counts",
    "check_device",
    "convert",
    "device_of",
    "examine",
    "explain",
    "family_of",
    "from_numpy",
    "named",
    "preference",
    "public",
    "refresh",
    "registry",
    "run",
    "support",
    "to_numpy",
    "torch_device",
    "use_backend",
]
