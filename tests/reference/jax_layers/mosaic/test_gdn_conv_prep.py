"""`gdn_conv_prep` as a Mosaic GPU kernel: right when interpreted, and lowered for CUDA."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from polyfuse.conformance import Case, Trial

OP = "gdn_conv_prep"
HEADS = {"num_k_heads": 4, "head_k_dim": 128, "head_v_dim": 128, "output_final_state": True}
PACKED = {"L": 23, "HV": 16, "W": 4, "N": 9, "S": 8}
CU_SEQLENS = {"cu_seqlens": "cu_seqlens"}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("width", "optional", "packed"),
    [
        (4, ("bias", "initial_state"), True),
        (2, (), False),
        slow(3, (), True),
        slow(3, ("initial_state",), False),
        slow(4, ("bias",), False),
        slow(2, ("initial_state",), True),
    ],
)
def test_widths(pallas_layer: Any, interpreted: list[int], width: int, optional: tuple[str, ...], packed: bool) -> None:
    case = Case(
        "width",
        PACKED | {"W": width} if packed else {"L": 19, "HV": 16, "W": width, "S": 1},
        HEADS,
        {"T": "bfloat16", "weight": "bfloat16"},
        present=(*optional, "cu_seqlens") if packed else optional,
        fill=CU_SEQLENS,
    )
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize(
    ("fill", "activation"),
    [
        ("nan_some", "silu"),
        slow("zeros", "silu"),
        slow("tiny_vectors", "silu"),
        slow("inf_some", "silu"),
        slow("large", "silu"),
        slow("nan_some", None),
        slow("inf_some", None),
    ],
)
def test_fills(pallas_layer: Any, interpreted: list[int], fill: str, activation: str | None) -> None:
    fills = CU_SEQLENS | {"x": fill, "initial_state": fill}
    present = ("initial_state", "cu_seqlens", "bias")
    case = Case("fill", PACKED, HEADS | {"activation": activation}, present=present, fill=fills)
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize(
    ("dtype", "attrs"), [slow("bfloat16", {}), slow("float16", {"l2norm": False, "output_g_exp": True})]
)
def test_dtypes(pallas_layer: Any, interpreted: list[int], dtype: str, attrs: dict[str, Any]) -> None:
    dtypes = {"T": dtype, "weight": "float32", "bias": "float16", "a": dtype, "b": dtype}
    case = Case("dtype", {"L": 8, "HV": 16, "W": 4}, HEADS | attrs, dtypes, present=("bias",))
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("length", [1, 7])
def test_fewer_rows_than_a_program_has_the_same_bits_alone(
    pallas_layer: Any, interpreted: list[int], length: int
) -> None:
    case = Case("few", {"L": 9, "HV": 16, "W": 4}, HEADS | {"output_final_state": False}, {"T": "bfloat16"})
    values, _ = Trial(OP, case, seed=0).inputs()
    rows = {name: values[name][:length] for name in ("x", "a", "b")}
    whole, few = pallas_layer.call(values), pallas_layer.call({**values, **rows})
    assert interpreted == [2 * 7, 7]  # a tile of q, one of k, four of v, and the gates, for each 8 rows
    for one, other in zip(whole[:5], few[:5], strict=True):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(one)[:length])


@pytest.mark.slow
def test_pool_of_states(pallas_layer: Any, interpreted: list[int]) -> None:
    case = Case(
        "pool",
        PACKED | {"slots": 11, "n": 4},
        HEADS | {"output_final_state": False},
        {"T": "bfloat16", "state_pool": "float32"},
        present=("state_pool", "state_indices", "has_initial_state", "cu_seqlens"),
        fill=CU_SEQLENS | {"state_indices": "slots", "has_initial_state": "two_of_three"},
    )
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def arrays(length: int, heads: int, heads_v: int, size: int, packed: bool, **columns: int) -> dict[str, Any]:
    """The shapes of a call with heads of one size."""
    channels = (2 * heads + heads_v) * size
    shapes: dict[str, tuple[int, ...]] = {"x": (length, channels + columns.get("z", 0)), "weight": (channels, 4)}
    shapes |= {"a": (length, heads_v), "b": (length, heads_v), "A_log": (heads_v,), "dt_bias": (heads_v,)}
    if packed:
        shapes |= {"bias": (channels,), "initial_state": (256, channels, 3)}
    found: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, "bfloat16") for name, shape in shapes.items()}
    return found | ({"cu_seqlens": jax.ShapeDtypeStruct((257,), "int32")} if packed else {})


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "heads_v", "size"),
    [(9, 4, 16, 256), (7, 16, 32, 128), (300_000, 16, 32, 128), slow(8192, 16, 32, 128), slow(64, 16, 64, 128)],
)
def test_lowers_to_one_kernel(
    pallas_layer: Any, mosaic_kernels: Any, length: int, heads: int, heads_v: int, size: int, packed: bool
) -> None:
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size, "output_final_state": packed}
    op = partial(pallas_layer.function, **attrs)
    assert mosaic_kernels(op, **arrays(length, heads, heads_v, size, packed)) == 1


@pytest.mark.parametrize(("length", "size", "interleaved"), [(64, 128, True), (0, 128, False), (64, 80, False)])
def test_keeps_the_other_kernel(
    pallas_layer: Any, traced: list[int], length: int, size: int, interleaved: bool
) -> None:
    attrs = {"num_k_heads": 16, "head_k_dim": size, "head_v_dim": size, "interleaved": interleaved}
    z = 32 * size if interleaved else 0
    jax.eval_shape(partial(pallas_layer.function, **attrs), **arrays(length, 16, 32, size, False, z=z))
    assert traced == []
