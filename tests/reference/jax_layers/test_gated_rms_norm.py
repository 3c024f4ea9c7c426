"""`gated_rms_norm` in both JAX layers: right on every case, under jit, vmap, grad and sharding, and lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from polyfuse.conformance import Case, Trial, cases
from polyfuse.conformance.cases import model_cases
from polyfuse.spec.gated_rms_norm import ACTIVATIONS

OP = "gated_rms_norm"
CASES = {case.name: case for case in cases(OP) if case.repeat == 1}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def random_arguments(*lead: int, width: int = 24) -> tuple[jax.Array, ...]:
    """x, gate and weight."""
    rng = np.random.default_rng(5)
    shapes = [(*lead, width), (*lead, width), (width,)]
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    assert layer.problems(part(list(CASES.values()))) == {}


@pytest.mark.parametrize("name", ["bfloat16-silu-offset_1.0", "gate_sliced-bfloat16"])
def test_public_function(layer: Any, name: str) -> None:
    assert layer.public(CASES[name]) == ("passed", "")


def test_real_shapes(jax_layer: Any) -> None:
    real = [case for case in model_cases(OP) if case.name not in CASES and case.repeat == 1]
    assert real
    assert jax_layer.problems(real) == {}


def test_a_row_computed_by_hand(layer: Any) -> None:
    # A mean square of 6 and eps 3: the root is 3. sigmoid(0) = 1/2.
    x, weight = jnp.array([[2.0, 2.0, 4.0, 0.0]]), jnp.array([0.5, 2.0, -0.25, 9.0])
    y = layer.function(x, jnp.zeros_like(x), weight, eps=3.0, activation="sigmoid", weight_offset=1.0)
    np.testing.assert_allclose(y, [[0.5, 1.0, 0.5, 0.0]], rtol=1e-6)


def test_vmap(layer: Any) -> None:
    x, gate, weight = random_arguments(3, 5)
    batched = jax.vmap(layer.function, in_axes=(0, 0, None))(x, gate, weight)
    for i in range(3):
        np.testing.assert_allclose(batched[i], layer.function(x[i], gate[i], weight), rtol=1e-6)


def test_sharded_rows_stay_where_they_are(jax_layer: Any, mesh: Mesh) -> None:
    rows, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    arguments = [np.asarray(x) for x in random_arguments(8)]
    placed = [jax.device_put(x, rows if x.ndim == 2 else whole) for x in arguments]
    compiled = jax.jit(jax_layer.function).lower(*placed).compile()
    program = compiled.as_text() or ""
    assert "ENTRY" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all"))
    y = compiled(*placed)
    assert y.sharding.is_equivalent_to(rows, y.ndim)
    np.testing.assert_allclose(y, jax_layer.function(*arguments), rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(jax_layer: Any, activation: str) -> None:
    op = jax.jit(partial(jax_layer.function, eps=1e-1, activation=activation, weight_offset=1.0))
    check_grads(op, random_arguments(2), order=1, modes=("rev",), rtol=2e-2, atol=2e-2, eps=1e-2)


@pytest.mark.parametrize(("activation", "slopes"), [("silu", [0, 0.5, 1]), ("sigmoid", [0, 0.25, 0])])
def test_the_gradient_of_a_gate_far_from_zero_is_a_number(jax_layer: Any, activation: str, slopes: list[float]) -> None:
    def total(gate: jax.Array) -> jax.Array:
        return jax_layer.function(jnp.ones(3), gate, jnp.ones(3), activation=activation).sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.array([-200.0, 0.0, 200.0])), slopes, atol=1e-6)


@pytest.mark.parametrize("width", [72, 128, 3000])
def test_gpu_tiles(pallas_layer: Any, gpu_tiles: None, width: int) -> None:
    case = Case("gpu_tiles", {"...": (7, 3), "V": width}, {}, {"T": "bfloat16"})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def test_many_interpreted_programs(pallas_layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_layer.module, "_CPU_TILE_ROWS", 8)
    case = Case("many_programs", {"...": (29,), "V": 48}, {}, {"T": "bfloat16"})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(600_000, 32, 128), (9, 3, 72)])
def test_lowers_to_one_kernel(pallas_layer: Any, triton_kernels: Any, shape: tuple[int, ...], dtype: str) -> None:
    rows, weight = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[-1:], "float32")
    assert triton_kernels(pallas_layer.function, rows, rows, weight) == 1
