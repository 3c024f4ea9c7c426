"""`gdn_post_conv` as a Mosaic GPU kernel: right when interpreted, and lowered for CUDA."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polyfuse.conformance import Case, Trial

OP = "gdn_post_conv"
HEADS = {"num_k_heads": 4, "head_k_dim": 128, "head_v_dim": 128}

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16"), slow("float32")])
@pytest.mark.parametrize("attrs", [{}, {"l2norm": False, "output_g_exp": True}], ids=str)
def test_dtypes(pallas_layer: Any, interpreted: list[int], dtype: str, attrs: dict[str, Any]) -> None:
    case = Case("dtype", {"L": 8, "HV": 16}, HEADS | attrs, {"T": dtype, "a": dtype, "b": dtype})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("fill", ["nan_some", *map(slow, ("zeros", "tiny_vectors", "inf_some", "large"))])
def test_fills_of_rows(pallas_layer: Any, interpreted: list[int], fill: str) -> None:
    case = Case("rows", {"L": 11, "HV": 16}, HEADS, {"T": "bfloat16"}, fill={"conv_out": fill})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize("exp", [False, slow(True)])
@pytest.mark.parametrize("fill", ["wide_line", slow("nan_some"), slow("inf_some")])
def test_fills_of_gates(pallas_layer: Any, interpreted: list[int], fill: str, exp: bool) -> None:
    gates = {"a": fill, "b": fill, "dt_bias": "zeros" if fill == "wide_line" else "normal"}
    case = Case("gates", {"L": 64, "HV": 16}, HEADS | {"output_g_exp": exp}, fill=gates)
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


@pytest.mark.parametrize(
    ("heads", "size", "size_v", "heads_v", "length", "programs"),
    [
        (16, 128, 128, 32, 19, 3 * 9),  # the last program takes rows 11 to 18
        slow(8, 64, 128, 64, 8, 1 + 1 + 16 + 1),
        slow(4, 256, 256, 16, 8, 1 + 1 + 4 + 1),
        slow(16, 32, 32, 128, 9, 2 * (1 + 1 + 8 + 1)),
    ],
)
def test_tiles(
    pallas_layer: Any,
    interpreted: list[int],
    heads: int,
    size: int,
    size_v: int,
    heads_v: int,
    length: int,
    programs: int,
) -> None:
    attrs = {"num_k_heads": heads, "head_k_dim": size, "head_v_dim": size_v}
    case = Case("tiles", {"L": length, "HV": heads_v}, attrs, {"T": "bfloat16"})
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None
    assert interpreted == [programs]


@pytest.mark.parametrize("length", [1, 7])
def test_fewer_rows_than_a_program_has_the_same_bits_alone(
    pallas_layer: Any, interpreted: list[int], length: int
) -> None:
    case = Case("few", {"L": 9, "HV": 16}, HEADS, {"T": "bfloat16"})
    values, _ = Trial(OP, case, seed=0).inputs()
    rows = {name: values[name][:length] for name in ("conv_out", "a", "b")}
    whole, few = pallas_layer.call(values), pallas_layer.call({**values, **rows})
    assert interpreted == [2 * 7, 7]  # a tile of q, one of k, four of v, and the gates, for each 8 rows
    for one, other in zip(whole, few, strict=True):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(one)[:length])


def test_gates_of_key_heads(pallas_layer: Any, interpreted: list[int]) -> None:
    case = Case("split", {"L": 9, "HV": 16}, HEADS, {"T": "bfloat16"}, split=("a", "b"))
    assert pallas_layer.problem(Trial(OP, case, seed=0)) is None


def test_log1p_is_accurate(interpreted: list[int]) -> None:
    from polyfuse.reference.pallas.mosaic import gdn_post_conv as kernel

    interpreted.append(0)  # no kernel of its own
    x = np.concatenate([[0.0, 1.0], np.logspace(-37, 0, 20_000)]).astype(np.float32)
    want = np.log1p(x.astype(np.float64))
    error = np.abs(np.asarray(kernel._log1p(jnp.asarray(x)), np.float64) - want)
    assert (error <= 2.0**-22 * want).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("length", "heads", "heads_v", "size"),
    [
        slow(8192, 16, 32, 128),
        slow(64, 16, 64, 128),
        (9, 4, 16, 256),
        slow(100, 8, 32, 64),
        (1, 16, 32, 128),  # fewer rows than a program has
        (300_000, 16, 32, 128),  # more than 2**31 elements
    ],
)
def test_lowers_to_one_kernel(
    pallas_layer: Any, mosaic_kernels: Any, length: int, heads: int, heads_v: int, size: int, dtype: str
) -> None:
    gates, per_head = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((length, heads_v), (heads_v,)))
    conv_out = jax.ShapeDtypeStruct((length, (2 * heads + heads_v) * size), dtype)
    op = partial(pallas_layer.function, num_k_heads=heads, head_k_dim=size, head_v_dim=size)
    assert mosaic_kernels(op, conv_out, gates, gates, per_head, per_head) == 1


@pytest.mark.parametrize(
    ("length", "heads", "heads_v", "size"),
    [
        (64, 3, 16, 128),
        (64, 16, 8, 128),
        (64, 16, 48, 128),
        (64, 16, 32, 80),
        (0, 16, 32, 128),
    ],
)
def test_keeps_the_other_kernel(
    pallas_layer: Any, traced: list[int], length: int, heads: int, heads_v: int, size: int
) -> None:
    gates, per_head = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((length, heads_v), (heads_v,)))
    conv_out = jax.ShapeDtypeStruct((length, (2 * heads + heads_v) * size), "bfloat16")
    op = partial(pallas_layer.function, num_k_heads=heads, head_k_dim=size, head_v_dim=size)
    jax.eval_shape(op, conv_out, gates, gates, per_head, per_head)
    assert traced == []
