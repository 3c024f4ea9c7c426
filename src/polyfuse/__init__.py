"""Fused ops for vision-language and hybrid-attention models, each held to one oracle on every backend."""

from typing import Any

from polyfuse.spec import FORMER_NAMES, OPS, BackendError, SpecError, Unsupported, canonical, result_names

__version__ = "0.1.0"

# What is imported when it is first asked for.
_PUBLIC_OPS = (*OPS, *result_names(OPS.values()))
_DISPATCH = ("call_counts", "explain", "refresh", "use_backend")

__all__ = ["BackendError", "SpecError", "Unsupported", "shadow_report", "warmup", *_DISPATCH, *_PUBLIC_OPS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in FORMER_NAMES:
        return __getattr__(canonical(name))
    if name in _PUBLIC_OPS:
        from polyfuse import _ops as source
    elif name in _DISPATCH:
        from polyfuse import dispatch as source
    elif name == "shadow_report":
        from polyfuse.conformance import shadow as source
    elif name == "warmup":
        from polyfuse.bench import warmup as source
    else:
        raise AttributeError(f"module 'polyfuse' has no attribute {name!r}")
    value = getattr(source, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
