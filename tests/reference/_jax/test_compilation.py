"""How both JAX layers compile an op."""

from typing import Any

import jax.numpy as jnp

from polyfuse.reference._jax.compilation import jit


def test_the_attributes_of_the_spec_are_static() -> None:
    traced = []

    @jit("gdn_in_proj")
    def function(x: Any, *, strategy: str = "auto") -> Any:
        traced.append(strategy)
        return x + len(strategy)

    x = jnp.zeros(3)
    assert function(x, strategy="auto").tolist() == function(2 * x).tolist() == [4, 4, 4]
    assert function(x, strategy="sequential").tolist() == [10, 10, 10]
    assert traced.count("sequential") == 1


def test_attributes_that_a_function_collects_are_static_too() -> None:
    @jit("silu_mul_block_quant")
    def function(x: Any, **attrs: Any) -> Any:
        return x if attrs["limit"] is None else x[: attrs["group_size"]]

    assert function(jnp.arange(4), limit=1.5, group_size=2).tolist() == [0, 1]
    assert function(jnp.arange(4), limit=None, group_size=2).tolist() == [0, 1, 2, 3]
