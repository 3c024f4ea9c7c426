"""A call that updates an argument: eager, converted, in a compiled graph; and where a gradient is asked for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse.dispatch import _torch_library, from_numpy, to_numpy
from polyfuse.dispatch._plan import CALLS
from tests.conv_pools import arguments, bits

OP = "gdn_conv_prep"
FLOATS = ("x", "weight", "a", "b", "A_log", "dt_bias", "bias", "state_pool")


def as_numpy(args: dict[str, Any]) -> dict[str, Any]:
    return {k: to_numpy(v).copy() if isinstance(v, torch.Tensor) else v for k, v in args.items()}


def updated() -> np.ndarray:
    """The pool after the call, from the oracle."""
    results: Any = polyfuse.gdn_conv_prep(**as_numpy(arguments()), backend="numpy")
    return np.asarray(results[-1])


@pytest.mark.parametrize("backend", ["torch", "jax", "pallas", "numpy", "triton"])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_tensor_is_written_in_place_whatever_the_backend_takes(backend: str) -> None:
    args = arguments()
    version = args["state_pool"]._version
    results = polyfuse.gdn_conv_prep(**args, backend=backend)
    assert type(results).__name__ == "GdnConvPrepResult"
    np.testing.assert_array_equal(args["state_pool"].numpy(), updated())
    assert args["state_pool"]._version > version


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy"])
@pytest.mark.parametrize("family", ["numpy", "jax"])
def test_what_cannot_be_written_comes_back(family: str, backend: str) -> None:
    given = as_numpy(arguments())
    args = {k: from_numpy(v, family) if isinstance(v, np.ndarray) else v for k, v in given.items()}
    *_, final_state, pool = polyfuse.gdn_conv_prep(**args, backend=backend)
    assert final_state.shape == (0, 96, 3)
    assert type(pool) is type(args["state_pool"])
    np.testing.assert_array_equal(pool, updated())
    np.testing.assert_array_equal(args["state_pool"], arguments()["state_pool"].numpy())


def test_elements_that_share_memory_are_refused() -> None:
    pool = torch.zeros(1, 96, 5).expand(7, 96, 5)
    with pytest.raises(SpecError, match="state_pool: expected a tensor whose elements have memory of their own"):
        polyfuse.gdn_conv_prep(**arguments(state_pool=pool))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_gradient_is_refused(name: str, backend: str) -> None:
    args = arguments()
    before = args["state_pool"].clone()
    args[name].requires_grad_()
    message = f"{backend}: an input requires grad: state_pool is updated in place: no backward; call under"
    with pytest.raises(Unsupported, match=message):
        polyfuse.gdn_conv_prep(**args, backend=backend)
    assert bits(args["state_pool"].detach()) == bits(before)
    with torch.no_grad():
        polyfuse.gdn_conv_prep(**args, backend=backend)
    assert bits(args["state_pool"].detach()) != bits(before)


def test_a_gradient_without_a_pool_is_not() -> None:
    args = arguments(state_pool=None, state_indices=None, has_initial_state=None)
    args["x"].requires_grad_()
    polyfuse.gdn_conv_prep(**args, backend="torch").v.sum().backward()
    assert args["x"].grad.any()


def test_a_gradient_of_jax_arrays_is_refused() -> None:
    args = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in as_numpy(arguments()).items()}

    def loss(weight: jax.Array) -> jax.Array:
        return polyfuse.gdn_conv_prep(**args | {"weight": weight}, backend="jax")[2].astype(jnp.float32).sum()

    weight = args["weight"]
    assert jnp.isfinite(loss(weight))
    message = f"{OP}: jax: a gradient is asked for: state_pool is updated in place: no backward; try"
    for differentiated in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(Unsupported, match=message):
            differentiated(weight)
    del args["state_pool"], args["state_indices"], args["has_initial_state"]
    assert jnp.isfinite(jax.grad(loss)(weight)).all()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own
def test_a_compiled_graph_writes_the_pool(backend: str) -> None:
    """A graph of one node, which runs again for another pool; what the graph writes to it before the call counts."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def step(args: dict[str, Any], pool: torch.Tensor) -> Any:
        pool.mul_(2)
        q, k, v, *rest = polyfuse.gdn_conv_prep(**args | {"state_pool": pool})
        return (q, k, v * 2, *rest), pool + 1

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in (0, 1):
        args = arguments()
        pool = torch.randn(7, 96, 5, generator=torch.Generator().manual_seed(seed))
        mine, wanted = pool.clone(), pool.clone()
        with torch.no_grad():
            results, more = compiled(args, mine)
            want, want_more = step(args, wanted)
        assert bits(mine) == bits(wanted) != bits(pool)
        assert bits(more) == bits(want_more)
        assert [bits(result) for result in results] == [bits(part) for part in want]
    assert counter.frame_count == 1
    nodes = [node.target for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert nodes.count(torch.ops.polyfuse.gdn_conv_prep) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("pool", [True, False])
def test_a_gradient_in_a_compiled_graph_is_refused(pool: bool, backend: str) -> None:
    torch._dynamo.reset()
    args = arguments() if pool else arguments(state_pool=None, state_indices=None, has_initial_state=None)
    args["weight"].requires_grad_()
    compiled = torch.compile(lambda args: polyfuse.gdn_conv_prep(**args), fullgraph=True, backend=backend)
    message = "state_pool is updated in place: no backward" if pool else r"it has no backward; try torch\.no_grad\(\)"
    with pytest.raises(Exception, match=f"gdn_conv_prep: .*{message}"):
        compiled(args)
    with torch.no_grad():
        assert compiled(args)[5].shape == (0, 96, 3)


def test_opcheck() -> None:
    args = arguments()
    flat = _torch_library.flatten(CALLS[OP], tuple(args.get(name) for name in CALLS[OP].names))
    torch.library.opcheck(torch.ops.polyfuse.gdn_conv_prep.default, flat)
