"""The call path: families, conversion, caching, and the registered torch op."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import polyfuse
from polyfuse import SpecError
from polyfuse.dispatch import _plan, check_device, from_numpy, to_numpy

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


def test_of_a_list_for_two_families_the_arrays_own_one_counts():
    for backend in (["torch", "jax"], ["jax", "torch"]):
        assert (
            polyfuse.explain("pos_embed_interpolate", torch.from_numpy(TABLE), GRID, backend=backend).winner == "torch"
        )
    with pytest.raises(SpecError, match="expected backends of one array family"):
        polyfuse.pos_embed_interpolate(torch.from_numpy(TABLE), GRID, backend=["numpy", "jax"])


def test_a_warm_cache_does_not_let_a_bad_argument_through():
    table = torch.from_numpy(TABLE)
    polyfuse.pos_embed_interpolate(table, GRID, merge_size=2, align_corners=True)
    with pytest.raises(SpecError, match=r"merge_size: expected an integer, got 2\.0"):
        polyfuse.pos_embed_interpolate(table, GRID, merge_size=2.0)
    with pytest.raises(SpecError, match="align_corners: expected True or False, got 1"):
        polyfuse.pos_embed_interpolate(table, GRID, align_corners=1)
    with pytest.raises(SpecError, match=r"grid_thw\[0\]: expected 3 integers, got \[True, 4, 6\]"):
        polyfuse.pos_embed_interpolate(table, ((True, 4, 6), (2, 2, 2)))


CALLS = {
    "first": {},
    "shape": {"table": torch.ones(16, 8)},
    "dtype": {"table": torch.ones(36, 8, dtype=torch.bfloat16)},
    "requires_grad": {"table": torch.ones(36, 8, requires_grad=True)},
    "family": {"table": TABLE},
    "optional array": {"base": torch.ones(32, 8)},
    "host values": {"grid_thw": ((2, 4, 6),)},
    "attribute": {"mode": "bicubic"},
    "backend": {"backend": "torch"},
    "list": {"backend": ["torch", "triton"]},
}


def test_everything_that_decides_is_in_the_key():
    polyfuse.refresh()
    op = _plan.CALLS["pos_embed_interpolate"]
    for _ in range(2):
        for number, (name, change) in enumerate(CALLS.items(), 1):
            for _ in range(2):
                polyfuse.pos_embed_interpolate(**{"table": torch.from_numpy(TABLE), "grid_thw": GRID} | change)
            assert len(op.plans) in (number, len(CALLS)), name
    with torch.no_grad():
        polyfuse.pos_embed_interpolate(torch.ones(36, 8, requires_grad=True), GRID)
    with polyfuse.use_backend("torch"):
        polyfuse.pos_embed_interpolate(torch.from_numpy(TABLE), GRID)
    assert len(op.plans) == len(CALLS) + 2
    polyfuse.refresh()
    assert not op.plans


def test_a_plan_belongs_to_its_device():
    table = torch.ones(4, 8)
    assert polyfuse.pos_embed_interpolate(table, [[1, 2, 2]]).shape == (4, 8)
    with pytest.raises(SpecError, match="base: expected a torch array on cpu as table, got torch on meta"):
        polyfuse.pos_embed_interpolate(table, [[1, 2, 2]], base=torch.ones(4, 8, device="meta"))


def test_a_grid_without_values_is_refused():
    grid = torch.ones((1, 3), dtype=torch.int64, device="meta")
    with pytest.raises(SpecError, match="grid_thw: expected a torch array on cpu as table, got torch on meta"):
        polyfuse.pos_embed_interpolate(torch.from_numpy(TABLE), grid)


def test_a_number_in_an_array_is_read_at_every_call():
    table, size = torch.from_numpy(TABLE), torch.tensor(1)
    for number in (1, 2):
        size.fill_(number)
        out = polyfuse.pos_embed_interpolate(table, GRID, merge_size=size)
        assert torch.equal(out, polyfuse.pos_embed_interpolate(table, GRID, merge_size=number))


def test_a_device_that_is_not_here_is_an_error():
    for families in ([], ["numpy"], ["torch"], ["jax"], ["torch", "jax"]):
        check_device("device", "cpu", families)
        with pytest.raises(SpecError, match=r"^device: expected a device of this machine, .*, got 'nonsense' \("):
            check_device("device", "nonsense", families)
    check_device("device", "cpu:0", ["torch"])
    with pytest.raises(SpecError, match=r"got 'cpu:0' \(jax: Unknown backend"):
        check_device("device", "cpu:0", ["jax"])
    with pytest.raises(SpecError, match=r"got 'meta' \(torch: Cannot copy out of meta tensor"):
        check_device("device", "meta", ["torch"])


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
    assert "table: [table_height*N if table_height else N*N, D] float32/bfloat16/float16. the learned table" in text
    assert "source = i * (s - 1) / (n - 1)" in text
    assert "backend: a backend name" in text


def test_an_array_without_data_cannot_go_to_another_framework():
    table = torch.empty(36, 24, device="meta")
    with pytest.raises(SpecError, match="cannot become a jax array: ") as error:
        polyfuse.pos_embed_interpolate(table, [[1, 2, 2]], backend="jax")
    assert "\n" not in str(error.value)


def test_autocast_changes_no_dtype_of_an_op():
    x, weight, small = torch.randn(5, 16), torch.randn(24, 16), torch.randn(4, 16)
    wanted = polyfuse.gdn_in_proj(x, weight, small, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = polyfuse.gdn_in_proj(x, weight, small, backend="torch")
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
