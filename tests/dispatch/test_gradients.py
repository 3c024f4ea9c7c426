"""A gradient through a backend without a backward raises, in every family."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polyfuse
from polyfuse import Unsupported
from polyfuse.conformance import cases, make_inputs, place
from polyfuse.dispatch import registry
from polyfuse.spec import OPS

LACKING = [
    (op, name)
    for op in OPS
    for name in ("jax", "pallas", "torch", "triton")
    if op in registry().get(name).implements and not registry().get(name).load(op).capability.differentiable
]


def first_case(op: str, family: str) -> tuple[str, dict[str, Any]]:
    """The op's first differentiable array, and its arguments."""
    arguments = place(
        make_inputs(OPS[op], next(c for c in cases(op) if "float32" in c.name or not c.dtypes)), family, "cpu"
    )
    return OPS[op].tensors[0].name, arguments


@pytest.mark.parametrize(("op", "backend"), LACKING)
def test_a_gradient_raises(op: str, backend: str) -> None:
    family = registry().get(backend).family
    name, arguments = first_case(op, family)

    def loss(x: Any) -> Any:
        result = getattr(polyfuse, op)(**{**arguments, name: x}, backend=backend)
        first = result[-1] if isinstance(result, tuple) else result
        return first.astype(jnp.float32).sum() if family == "jax" else first.float().sum()

    if family == "torch":
        with pytest.raises(Unsupported, match="no backward"):
            loss(arguments[name].requires_grad_())
        return
    for differentiated in (jax.grad(loss), jax.grad(jax.jit(loss)), jax.jit(jax.grad(loss))):
        with pytest.raises(Unsupported, match=f"{op}: {backend}: a gradient is asked for: .*no backward"):
            differentiated(arguments[name])
    assert np.isfinite(loss(arguments[name]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_gradient_of_an_optional_array_raises_too(backend: str) -> None:
    gate, up = torch.ones(2, 128), torch.ones(2, 128, requires_grad=True)
    with pytest.raises(Unsupported, match=f"{backend}: an input requires grad: no backward"):
        polyfuse.silu_mul_block_quant(gate, up=up, backend=backend)
    with torch.no_grad():
        assert polyfuse.silu_mul_block_quant(gate, up=up, backend=backend)[0].shape == (2, 128)


@pytest.mark.parametrize("backend", ["jax", "pallas"])
def test_a_gradient_of_an_optional_jax_array_raises_too(backend: str) -> None:
    def loss(up: jax.Array) -> jax.Array:
        return polyfuse.silu_mul_block_quant(jnp.ones((2, 128)), up=up, backend=backend).scale.sum()

    with pytest.raises(Unsupported, match=f"silu_mul_block_quant: {backend}: a gradient is asked for: no backward"):
        jax.grad(loss)(jnp.ones((2, 128)))


def test_a_backend_with_a_backward_is_differentiated() -> None:
    name, arguments = first_case("gdn_post_conv", "jax")

    def loss(x: jax.Array) -> jax.Array:
        return polyfuse.gdn_post_conv(**{**arguments, name: x}, backend="jax").v.astype(jnp.float32).sum()

    gradient = jax.grad(loss)(arguments[name])
    assert float(jnp.abs(gradient.astype(jnp.float32)).sum()) > 0


def test_under_no_grad_there_is_none_to_refuse() -> None:
    with torch.no_grad():
        q, _ = polyfuse.silu_mul_block_quant(torch.ones(2, 256, requires_grad=True))
    assert q.shape == (2, 128)
