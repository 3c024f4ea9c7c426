"""The call path: families, conversion, caching, and the registered torch op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polyfuse
from polyfuse import SpecError
from polyfuse.dispatch import from_numpy, to_numpy

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((36, 8), dtype=np.float32)
GRID = ((1, 4, 6), (2, 2, 2))
WANT = polyfuse.pos_embed_interpolate(TABLE, GRID)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_arrays_survive_the_round_trip(family, dtype):
    import ml_dtypes

    values = TABLE.astype(getattr(ml_dtypes, dtype, dtype))
    back = to_numpy(from_numpy(values, family))
    assert back.dtype == values.dtype
    assert back.tobytes() == values.tobytes()


def test_strides_reach_torch():
    assert from_numpy(np.ascontiguousarray(TABLE.T).T, "torch").stride() == (1, 36)


@pytest.mark.parametrize("grid", [GRID, [list(g) for g in GRID], np.array(GRID), "own", "own32"])
@pytest.mark.parametrize("family", ["numpy", "torch", "jax"])
def test_every_family_takes_every_form_of_grid(family, grid):
    if isinstance(grid, str):
        grid = from_numpy(np.array(GRID, np.int32 if grid == "own32" else np.int64), family)
    out = polyfuse.pos_embed_interpolate(from_numpy(TABLE, family), grid)
    np.testing.assert_allclose(to_numpy(out), WANT, atol=2e-6)
    assert type(out).__module__.startswith({"jax": "jaxlib"}.get(family, family))


@pytest.mark.parametrize(
    ("family", "backend"),
    [("torch", "pallas"), ("torch", "jax"), ("torch", "numpy"), ("jax", "torch"), ("numpy", "triton")],
)
def test_a_backend_of_another_family_is_reached_by_conversion(family, backend):
    table = from_numpy(TABLE, family)
    out = polyfuse.pos_embed_interpolate(table, GRID, backend=backend)
    assert isinstance(out, type(table)) or family == "jax"
    np.testing.assert_allclose(to_numpy(out), WANT, atol=2e-6)


def test_backends_of_two_families_in_one_list_are_refused():
    with pytest.raises(SpecError, match="expected backends of one array family"):
        polyfuse.pos_embed_interpolate(torch.from_numpy(TABLE), GRID, backend=["torch", "jax"])


def test_a_warm_cache_does_not_let_a_bad_argument_through():
    table = torch.from_numpy(TABLE)
    polyfuse.pos_embed_interpolate(table, GRID, merge_size=2, align_corners=True)
    with pytest.raises(SpecError, match=r"merge_size: expected an integer, got 2\.0"):
        polyfuse.pos_embed_interpolate(table, GRID, merge_size=2.0)
    with pytest.raises(SpecError, match="align_corners: expected True or False, got 1"):
        polyfuse.pos_embed_interpolate(table, GRID, align_corners=1)
    with pytest.raises(SpecError, match=r"grid_thw\[0\]: expected 3 integers, got \[True, 4, 6\]"):
        polyfuse.pos_embed_interpolate(table, ((True, 4, 6), (2, 2, 2)))


def test_unhashable_nonsense_is_a_spec_error():
    with pytest.raises(SpecError, match=r"mode: expected one of bilinear, bicubic, got \{\}"):
        polyfuse.pos_embed_interpolate(torch.from_numpy(TABLE), GRID, mode={})
    with pytest.raises(SpecError, match="table: expected an array of torch, jax, numpy, got list"):
        polyfuse.pos_embed_interpolate(TABLE.tolist(), GRID)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "bool"])
def test_a_grid_tensor_of_another_dtype_is_refused(dtype):
    with pytest.raises(SpecError, match=f"grid_thw: expected dtype int32 or int64, got {dtype}"):
        polyfuse.pos_embed_interpolate(TABLE, np.array(GRID).astype(dtype))


def test_a_grid_tensor_is_read_at_every_call():
    table, grid = torch.from_numpy(TABLE), torch.tensor([[1, 2, 2]])
    assert polyfuse.pos_embed_interpolate(table, grid).shape == (4, 8)
    grid[0, 1] = 4
    assert polyfuse.pos_embed_interpolate(table, grid).shape == (8, 8)


def test_jit_traces_through_the_public_function():
    jitted = jax.jit(lambda t, g: polyfuse.pos_embed_interpolate(t, g, out_rows=40))
    out = jitted(jnp.asarray(TABLE), jnp.asarray(GRID))
    np.testing.assert_allclose(out[:32], WANT, atol=2e-6)
    assert not np.asarray(out[32:]).any()
    with pytest.raises(SpecError, match="grid_thw: a traced array needs out_rows=, got None"):
        jax.jit(polyfuse.pos_embed_interpolate)(jnp.asarray(TABLE), jnp.asarray(GRID))
    with pytest.raises(SpecError, match="a traced JAX array cannot become a torch array"):
        jax.jit(lambda t: polyfuse.pos_embed_interpolate(t, GRID, backend="torch"))(jnp.asarray(TABLE))


def test_the_documentation_is_the_spec():
    text = polyfuse.pos_embed_interpolate.__doc__
    assert "table: [N*N, D] float32/bfloat16/float16. the learned table" in text
    assert "source = i * (N - 1) / (n - 1)" in text
    assert "backend: a backend name" in text
