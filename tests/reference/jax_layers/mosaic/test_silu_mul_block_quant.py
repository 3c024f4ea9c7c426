"""`silu_mul_block_quant` as a Mosaic GPU kernel: right when interpreted, and lowered for CUDA."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polyfuse.conformance import Case, Trial

OP = "silu_mul_block_quant"
GPT_OSS = {"alpha": 1.702, "up_offset": 1.0, "limit": 7.0}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("fill", ["", "zeros", "nan_some", "inf_some", "large", "tiny", "decades", "outliers"])
@pytest.mark.parametrize(
    "attrs", [{}, *map(slow, ({"scale_format": "ue8m0_packed", "group_size": 32}, {"quant_dtype": "int8"}))]
)
def test_fills(pallas_layer: Any, interpreted: list[int], fill: str, attrs: dict[str, Any]) -> None:
    case = Case("fill", {"...": (3,), "D": 1024}, attrs, {"T": "bfloat16"}, fill={"x": fill} if fill else {})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16"), slow("float32")])
@pytest.mark.parametrize(
    "attrs",
    [
        {"group_size": 64, "scale_format": "ue8m0", "quant_dtype": "float8_e5m2"},
        {"group_size": 256, "scale_min": 0.0},
        {"reciprocal": True, "scale_ub": 0.01, **GPT_OSS},
        {"limit": 0.75, "limit_on": "silu", "scale_layout": "col_major_tma", "scale_format": "ue8m0_packed"},
    ],
    ids=str,
)
def test_attributes(pallas_layer: Any, interpreted: list[int], dtype: str, attrs: dict[str, Any]) -> None:
    fill = {"x": "around_limits" if "limit" in attrs else "decades"}
    case = Case("attributes", {"...": (2,), "D": 2048}, attrs, {"T": dtype}, fill=fill)
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize(
    ("rows", "width", "programs"),
    [
        (5, 2048, 5),
        (3, 4096, 6),  # two tiles a row
        (5, 512, 2),  # the second program takes row 1 to 4, the first row 0 to 3
        (1, 1536, 3),
        (7, 1024, 4),
    ],
)
def test_rows_of_programs(pallas_layer: Any, interpreted: list[int], rows: int, width: int, programs: int) -> None:
    case = Case("rows", {"...": (rows,), "D": width}, {}, {"T": "bfloat16"})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None
    assert interpreted == [programs]


def test_gate_and_up_as_two_arrays(pallas_layer: Any, interpreted: list[int]) -> None:
    case = Case("up", {"...": (3,), "D": 1024}, {}, {"T": "bfloat16"}, present=("up",))
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def test_rows_of_experts(pallas_layer: Any, interpreted: list[int]) -> None:
    fill = {"expert_ends": "expert_ends_4", "x": "nan_between_4"}
    case = Case(
        "ends",
        {"...": (21,), "D": 512, "E": 4},
        {"expert_alignment": 4, "fill": 1.0},
        {"T": "bfloat16"},
        present=("expert_ends",),
        fill=fill,
    )
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def test_signs_of_zeros(pallas_layer: Any, interpreted: list[int]) -> None:
    x = np.concatenate([np.repeat([0.0, -0.0], 256)] * 2)[None]
    q, _ = pallas_layer.function(jnp.asarray(x, jnp.bfloat16))
    want = np.signbit(x[0, :512]) ^ np.signbit(x[0, 512:])
    np.testing.assert_array_equal(np.signbit(np.asarray(q).astype(np.float32))[0], want)


@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"quant_dtype": "int8"},
        {"quant_dtype": "float8_e5m2", "group_size": 64, **GPT_OSS},
        {"scale_format": "ue8m0_packed", "group_size": 32},
        {"scale_format": "ue8m0", "group_size": 256},
        {"scale_min": 0.0, "scale_ub": 2.0, "limit": 7.0, "limit_on": "silu"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(16384, "bfloat16"), (1, "float16"), (300, "float32"), (1_200_000, "bfloat16")]
)
def test_lowers_to_one_kernel(
    pallas_layer: Any, mosaic_kernels: Any, rows: int, dtype: str, attrs: dict[str, Any]
) -> None:
    op = partial(pallas_layer.function, **attrs)
    assert mosaic_kernels(op, jax.ShapeDtypeStruct((rows, 4096), dtype)) == 1


def test_lowers_under_vmap(pallas_layer: Any, mosaic_kernels: Any) -> None:
    assert mosaic_kernels(jax.vmap(pallas_layer.function), jax.ShapeDtypeStruct((8, 64, 4096), "bfloat16")) == 1


@pytest.mark.parametrize(
    ("shape", "attrs"),
    [
        ((5, 2 * 640), {}),  # 5 groups
        ((5, 2 * 1024), {"group_size": 48}),
        ((5, 2 * 1024), {"group_size": 512}),
        ((5, 2 * 1000), {}),
        ((5, 2 * 1024), {"materialize": True}),
        ((5, 2 * 1024), {"quant_dtype": "float8_e4m3fnuz"}),
    ],
)
def test_keeps_the_other_kernel(
    pallas_layer: Any, traced: list[int], shape: tuple[int, int], attrs: dict[str, Any]
) -> None:
    jax.eval_shape(partial(pallas_layer.function, **attrs), jax.ShapeDtypeStruct(shape, "bfloat16"))
    assert traced == []


def test_keeps_the_other_kernel_for_masked_and_weighted_rows(pallas_layer: Any, traced: list[int]) -> None:
    x = jax.ShapeDtypeStruct((8, 64, 4096), "bfloat16")
    num_rows, weight = jax.ShapeDtypeStruct((8,), "int32"), jax.ShapeDtypeStruct((8, 64), "float32")
    jax.eval_shape(lambda x, n: pallas_layer.function(x, num_rows=n), x, num_rows)
    jax.eval_shape(lambda x, w: pallas_layer.function(x, row_weight=w), x, weight)
    assert traced == []
