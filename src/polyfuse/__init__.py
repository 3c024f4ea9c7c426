"""Fused ops for vision-language and hybrid-attention models, each proven against one oracle on every backend."""

from typing import TYPE_CHECKING, Any

from polyfuse.spec import BackendError, SpecError, Unsupported

if TYPE_CHECKING:
    from polyfuse._ops import (
        gdn_conv_prep,
        gdn_in_proj,
        gdn_post_conv,
        pos_embed_interpolate,
        segment_attention,
        silu_mul_block_quant,
    )
    from polyfuse.dispatch import call_counts, explain, refresh, use_backend

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendError",
    "SpecError",
    "Unsupported",
    "call_counts",
    "explain",
    "gdn_conv_prep",
    "gdn_in_proj",
    "gdn_post_conv",
    "pos_embed_interpolate",
    "refresh",
    "segment_attention",
    "silu_mul_block_quant",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'polyfuse' has no attribute {name!r}")
    from polyfuse import _ops, dispatch

    value = getattr(_ops, name, None) or getattr(dispatch, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
