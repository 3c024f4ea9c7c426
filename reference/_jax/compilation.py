"""How both JAX layers compile an op."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from polyfuse.spec import OPS


def jit(op: str) -> Callable[[Callable[..., Any]], jax.stages.Wrapped]:
    """Return the decorator that compiles a function of the op's own parameters, whose attributes are static.

    The function has the attributes by their names in the spec, or takes them with `**`.
    """
    return partial(jax.jit, static_argnames=tuple(attr.name for attr in OPS[op].attrs))
