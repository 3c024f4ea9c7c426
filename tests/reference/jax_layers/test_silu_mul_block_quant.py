"""`silu_mul_block_quant` in both JAX layers: right on every case, under jit, vmap and sharding, and lowered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polyfuse.conformance import Case, Trial, cases
from polyfuse.spec.block_quant import QMAX, SCALE_LAYOUTS

OP = "silu_mul_block_quant"
CASES = {case.name: case for case in cases(OP) if case.repeat == 1}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def random_x(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.bfloat16)


def test_cases(layer: Any, part: Any, cpu_tiles: None) -> None:
    refusal = layer.module.CAPABILITY.refusal
    claimed = [case for case in CASES.values() if refusal(Trial(OP, case, 0).inputs()[1], "cpu") is None]
    assert len(claimed) > 200
    assert layer.problems(part(claimed), joined="x") == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_cases_with_all_optimisations(layer: Any, optimised: None, seed: int) -> None:
    """Nothing may be reordered, or kept in a wider dtype."""
    names = [name for name in CASES if "materialize_True-limit_None" in name]
    if layer.name == "jax":
        names = [name for name in CASES if "materialize_True" in name or name.startswith("experts-ue8m0_packed")]
        names += ["fill_nan_some-int8-ue8m0"]
    assert layer.problems([CASES[name] for name in names], seed, joined="x") == {}


def test_public_function(layer: Any) -> None:
    assert layer.public(CASES["experts-ue8m0_packed-col_major_tma"]) == ("passed", "")


def test_vmap(layer: Any, bits: Any) -> None:
    x = random_x(3, 3, 5, 256)
    num_rows = jnp.array([[2, 0, 5], [1, 1, 1], [9, -1, 3]], jnp.int32)
    op = jax.jit(lambda x, n: layer.function(x, num_rows=n, group_size=32, scale_format="ue8m0_packed"))
    each = [op(np.asarray(x)[i], np.asarray(num_rows)[i]) for i in range(3)]
    batched = jax.vmap(op)(x, num_rows)
    assert bits(batched) == bits(np.stack(results) for results in zip(*each, strict=True))


def test_rows_past_num_rows(layer: Any) -> None:
    x = random_x(3, 4, 64)
    q, scale = map(np.asarray, layer.function(x, num_rows=jnp.array([9, -1, 2], jnp.int32), group_size=32))
    all_q, all_scale = map(np.asarray, layer.function(x, group_size=32))
    for expert, count in enumerate((4, 0, 2)):
        assert q[expert, :count].tobytes() == all_q[expert, :count].tobytes()
        assert scale[expert, :count].tobytes() == all_scale[expert, :count].tobytes()
        assert not q[expert, count:].astype(np.float32).any()
        assert (scale[expert, count:] == np.float32(1 / (448 * 512))).all()


@pytest.mark.parametrize("options", [{}, {"materialize": True, "limit": 0.75, "scale_format": "ue8m0_packed"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gate_and_up_as_two_arrays(layer: Any, bits: Any, masked: bool, options: dict[str, Any]) -> None:
    x = random_x(3, 4, 2 * 96)
    options |= {"group_size": 48, "num_rows": jnp.array([9, -1, 2], jnp.int32) if masked else None}
    gate, up = jnp.split(x, 2, axis=-1)
    assert bits(layer.function(gate, up=up, **options)) == bits(layer.function(x, **options))
    assert bits(layer.function(up, up=gate, **options)) != bits(layer.function(x, **options))


def test_gate_and_up_as_two_arrays_under_vmap(layer: Any, bits: Any) -> None:
    gate, up = random_x(2, 3, 5, 64)
    op = partial(layer.function, group_size=32)
    each = [op(gate[i], up=up[i]) for i in range(3)]
    batched = jax.vmap(lambda gate, up: op(gate, up=up))(gate, up)
    assert bits(batched) == bits(np.stack(results) for results in zip(*each, strict=True))


def test_layouts_are_one_logical_array(layer: Any, bits: Any) -> None:
    results = [bits(layer.function(random_x(5, 256), scale_layout=layout)) for layout in SCALE_LAYOUTS[:3]]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_no_columns(layer: Any, scale_format: str) -> None:
    x = jnp.zeros((3, 0), jnp.bfloat16)
    for up in (None, x):
        q, scale = layer.function(x, up=up, scale_format=scale_format)
        assert (q.shape, q.dtype) == ((3, 0), jnp.float8_e4m3fn)
        assert (scale.shape, scale.dtype) == ((3, 0), "float32" if scale_format == "float32" else "int32")


def test_sharded_rows_stay_where_they_are(jax_layer: Any, mesh: Mesh, bits: Any) -> None:
    rows = NamedSharding(mesh, PartitionSpec("d"))
    x = jax.device_put(random_x(8, 256), jax.devices("cpu")[0])
    results = jax_layer.function(jax.device_put(x, rows), group_size=64)
    assert bits(results) == bits(jax_layer.function(x, group_size=64))
    assert all(result.sharding.is_equivalent_to(rows, result.ndim) for result in results)


def test_under_shard_map(pallas_layer: Any, mesh: Mesh, bits: Any) -> None:
    rows = PartitionSpec("d")
    x = np.asarray(random_x(8, 256))
    op = partial(pallas_layer.function, group_size=64)
    mapped = jax.shard_map(op, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    results = jax.jit(mapped)(jax.device_put(x, NamedSharding(mesh, rows)))
    assert all(result.sharding.is_equivalent_to(NamedSharding(mesh, rows), result.ndim) for result in results)
    assert bits(results) == bits(op(jax.device_put(x, jax.devices("cpu")[0])))


@pytest.mark.parametrize(
    ("shape", "group_size", "scale_format"),
    [((21,), 24, "ue8m0_packed"), ((3, 6), 128, "float32"), ((9,), 5, "float32"), ((2,), 1500, "ue8m0")],
)
def test_gpu_tiles(
    pallas_layer: Any, gpu_tiles: None, shape: tuple[int, ...], group_size: int, scale_format: str
) -> None:
    masked = len(shape) == 2
    case = Case(
        f"gpu_tiles_{group_size}",
        {"...": shape, "D": 5 * group_size} | ({"E": 3} if masked else {}),
        {"group_size": group_size, "scale_format": scale_format},
        {"T": "bfloat16"},
        present=("num_rows",) if masked else (),
        fill={"num_rows": "row_counts", "x": "nan_past_rows"} if masked else {"x": "nan_some"},
    )
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def test_parts_of_a_large_result(pallas_layer: Any, bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pallas_layer.module
    x, num_rows = random_x(2, 23, 2, 3, 32), jnp.array([20, 7], jnp.int32)
    attrs: dict[str, Any] = {"quant_dtype": "int8", "scale_format": "float32", "scale_ub": None, "scale_min": None}
    attrs |= {"limit": None, "limit_on": "input", "alpha": 1.0, "up_offset": 0.0, "materialize": False}
    attrs |= {"reciprocal": False, "masked": True, "width": 96}
    in_parts = partial(module._in_parts, tile=(4, 3, 32), interpret=True, **attrs)
    whole = jax.jit(in_parts)(x, x, num_rows)
    launched, launch = [], module._launch

    def recorded(*arrays: jax.Array, rows: slice, **attrs: Any) -> Any:
        launched.append((rows.start, rows.stop))
        return launch(*arrays, rows=rows, **attrs)

    monkeypatch.setattr(module, "_launch", recorded)
    monkeypatch.setattr(module, "_INT32_MAX", 2 * 96 * 9)  # both experts' next 9 rows, so 8
    parts = jax.jit(partial(in_parts))(x, x, num_rows)
    assert launched == [(0, 8), (8, 16), (16, 23)]
    assert bits(parts) == bits(whole)


def test_fnuz_bytes(pallas_layer: Any) -> None:
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fnuz)
    values = grid.astype(np.float32)
    values = np.concatenate([values, values * 1.03, np.array([-0.0, 300, -np.inf], np.float32)])
    want = np.clip(values, -224, 224).astype(ml_dtypes.float8_e4m3fnuz)
    np.testing.assert_array_equal(jax.jit(pallas_layer.module._fnuz_bytes)(values), want.view(np.uint8))


@pytest.mark.parametrize(
    ("quant_dtype", "scale_format"),
    [*((dtype, "float32") for dtype in list(QMAX)[:4]), ("float8_e4m3fn", "ue8m0"), ("float8_e4m3fn", "ue8m0_packed")],
)
def test_lowers_to_one_kernel(pallas_layer: Any, triton_kernels: Any, quant_dtype: str, scale_format: str) -> None:
    op = partial(pallas_layer.function, quant_dtype=quant_dtype, scale_format=scale_format)
    assert triton_kernels(op, jax.ShapeDtypeStruct((4096, 4096), "bfloat16")) == 1


@pytest.mark.parametrize(
    ("group_size", "dtype"), [(1, "bfloat16"), (7, "bfloat16"), (48, "float16"), (1500, "float32")]
)
def test_lowers_with_any_group(pallas_layer: Any, triton_kernels: Any, group_size: int, dtype: str) -> None:
    op = partial(pallas_layer.function, group_size=group_size, materialize=True, limit=7.0, scale_ub=2.0)
    assert triton_kernels(op, jax.ShapeDtypeStruct((5, 6 * group_size), dtype)) == 1


def test_lowers_with_gate_and_up_as_two_arrays(pallas_layer: Any, triton_kernels: Any) -> None:
    x = jax.ShapeDtypeStruct((4096, 2048), "bfloat16")
    assert triton_kernels(lambda gate, up: pallas_layer.function(gate, up=up), x, x) == 1


def test_lowers_with_experts_and_vmap(pallas_layer: Any, triton_kernels: Any) -> None:
    x, num_rows = jax.ShapeDtypeStruct((8, 64, 4096), "bfloat16"), jax.ShapeDtypeStruct((8,), "int32")
    assert triton_kernels(lambda x, n: pallas_layer.function(x, num_rows=n), x, num_rows) == 1
    assert triton_kernels(jax.vmap(pallas_layer.function), x) == 1


def test_more_than_2_31_elements_take_two_kernels(pallas_layer: Any, triton_kernels: Any) -> None:
    x = jax.ShapeDtypeStruct((211_200, 24_576), "bfloat16")
    q, scale = jax.eval_shape(pallas_layer.function, x)
    assert (q.shape, scale.shape) == ((211_200, 12_288), (211_200, 96))
    assert triton_kernels(pallas_layer.function, x) == 2
