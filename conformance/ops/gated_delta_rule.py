"""Conformance of `gated_delta_rule`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, normal, one, one_hot
from polyfuse.conformance.mutations import Mutant
from polyfuse.conformance.ops import _gated_delta_rule_mutants as mutants
from polyfuse.conformance.ops import _gated_delta_rule_pools as pools
from polyfuse.reference._numerics import F64
from polyfuse.spec import FLOATS

_ENDS = (2, 2, 67, 131, 131, 132, 195)  # none, 65, 64, none, 1, 63 rows; 2 before the first, 5 past the last
_USUAL = {"q": "unit", "k": "unit", "g": "decay", "beta": "gate"}
_ALL = ("initial_state", "cu_seqlens")


def _case(name: str, ends: tuple[int, ...] = _ENDS, rows: int = 200, **changes: Any) -> Case:
    """A case of packed sequences with states and 2 value heads of 1 key head, on which `changes` are made."""
    sizes = {"L": rows, "H": 1, "HV": 2, "K": 16, "V": 8, "N": len(ends), "S": len(ends) - 1}
    return Case(
        name,
        sizes | changes.pop("dims", {}),
        {"output_final_state": True} | changes.pop("attrs", {}),
        {"T": changes.pop("dtype", "bfloat16"), "cu_seqlens": changes.pop("index", "int32")},
        {"cu_seqlens": ends},
        as_tensor=("cu_seqlens",),
        present=changes.pop("present", _ALL),
        fill=_USUAL | changes.pop("fill", {}),
        **changes,
    )


def _one(name: str, rows: int, present: tuple[str, ...] = ("initial_state",), **changes: Any) -> Case:
    """A case whose rows are one sequence, without boundaries."""
    return _case(name, (0, rows), rows, present=present, **changes)


def cases() -> Iterator[Case]:
    for dtype, (heads, heads_v) in product(FLOATS, ((2, 2), (2, 4), (1, 4))):
        yield _one(f"{dtype}-h{heads}-hv{heads_v}", 70, dtype=dtype, dims={"H": heads, "HV": heads_v})
    for dtype, index, present in product(FLOATS, ("int32", "int64"), (("cu_seqlens",), _ALL)):
        name = f"{dtype}-packed-{index}{'-initial_state' if len(present) == 2 else ''}"
        yield _case(name, dtype=dtype, index=index, present=present)
    yield from pools.cases()
    for rows, dtype in product((0, 1, 2, 63, 64, 65, 130), ("bfloat16", "float32")):
        yield _one(f"rows_{rows}-{dtype}", rows, dtype=dtype)
    yield _one("no_initial_state", 130, (), dtype="float32")
    yield _one("no_initial_state-bfloat16", 130, ())
    yield _case("final_state_off", attrs={"output_final_state": False})
    yield _case("all_empty", (0, 0, 0, 0), 3)
    yield _case("all_empty-no_rows", (0, 0, 0), 0)
    yield _case("decode", tuple(range(10)), 9)
    yield _one("rows_1030", 1030, dims={"HV": 1, "K": 4, "V": 4})
    yield _case("short_sequences", (0, 2, 2, 7, 10, 11, 17, 21, 23), 25, dtype="float32")
    yield _case("starts_far_behind", (130, 131, 199), 200, dims={"H": 1, "HV": 1})
    for key, value in ((1, 1), (8, 24), (24, 72), (72, 24), (64, 40), (128, 128), (256, 32)):
        yield _case(f"dims_k{key}-v{value}", (0, 5, 71), 71, dims={"K": key, "V": value})
    for key, value in ((5, 7), (72, 24), (128, 16)):
        dims = {"K": key, "V": value}
        yield _case(f"dims_k{key}-v{value}-float32", (0, 5, 71), 71, dtype="float32", dims=dims)
    yield _case("heads_3-of_9", (0, 40), 40, dims={"H": 3, "HV": 9})
    yield _one("no_key_columns", 3, dims={"K": 0})
    for scale, dtype in product((0.02, 2.0), ("bfloat16", "float32")):
        yield _one(f"scale_{scale}-{dtype}", 70, dtype=dtype, attrs={"scale": scale})
    dims = {"L": 3, "H": 1, "HV": 1, "K": 4, "V": 4, "S": 1}
    yield Case("normal_values", dims, {"output_final_state": True}, present=("initial_state",))
    yield from _gates()
    yield from _vectors()
    yield from _layouts()
    yield from _not_finite()


def _gates() -> Iterator[Case]:
    ends = (0, 130, 150)
    for dtype, g in product(FLOATS, ("zeros", "strong", "mixed", "resets", "very_negative")):
        yield _case(f"g_{g}-{dtype}", ends, 150, dtype=dtype, fill={"g": g})
    for dtype, beta in product(FLOATS, ("zeros", "ones", "small", "to_two")):
        yield _case(f"beta_{beta}-{dtype}", ends, 150, dtype=dtype, fill={"beta": beta, "g": "slow"})
    # Nothing but decays and the state: in fp32 to the end, whatever the dtype.
    for dtype in FLOATS:
        yield _case(f"state_alone-{dtype}", ends, 150, dtype=dtype, fill={"beta": "zeros", "g": "zeros"})


def _vectors() -> Iterator[Case]:
    for dtype, fill in product(FLOATS, ("parallel", "long")):
        for g in ("zeros", "decay"):
            yield _case(f"k_{fill}-g_{g}-{dtype}", (0, 70), 70, dtype=dtype, fill={"k": fill, "g": g})
    # Rows that all touch one another's answers, and integers: the inverse and all products are exact.
    whole = dict.fromkeys(("q", "k"), "basis") | {"v": "integers", "initial_state": "integers", "g": "zeros"}
    for dtype in FLOATS:
        yield _case(f"integers-{dtype}", dtype=dtype, fill=whole | {"beta": "ones"})
    for dtype in ("bfloat16", "float16"):
        yield _case(f"state_large-{dtype}", dtype=dtype, fill={"initial_state": "large"})
    yield _case("v_tiny-float32", dtype="float32", fill={"v": "subnormal", "initial_state": "subnormal"})
    yield _case("v_tiny-float16", dtype="float16", fill={"v": "subnormal", "initial_state": "tiny"})
    yield _case("v_huge-float16", (0, 70), 70, dtype="float16", fill={"v": "huge"})


def _layouts() -> Iterator[Case]:
    ends, dims = (0, 3, 70), {"H": 2, "HV": 2, "K": 24}
    for layout, dtype in product(("one_of_three", "row_strided", "column_strided"), ("bfloat16", "float32")):
        layouts = dict.fromkeys(("q", "k", "v"), layout)
        yield _case(f"{layout}-{dtype}", ends, 70, dtype=dtype, dims=dims, layout=layouts)
    for layout in ("row_strided", "column_strided"):
        yield _case(f"gates_{layout}", ends, 70, layout=dict.fromkeys(("g", "beta"), layout))
    for layout in ("last_two_swapped", "row_strided", "column_strided"):
        yield _case(f"state_{layout}", ends, 70, dims=dims, layout={"initial_state": layout})
    mixed = {"q": "one_of_three", "k": "row_strided", "v": "column_strided", "beta": "row_strided"}
    yield _case("mixed_layouts", ends, 70, layout=mixed)


def _not_finite() -> Iterator[Case]:
    """One row, one sequence, or the rows of no sequence hold what must not spread."""
    values = ("q", "k", "v", "g", "beta")
    for dtype in ("float32", "bfloat16"):
        for tensor in values:
            yield _case(f"{tensor}_nan-{dtype}", dtype=dtype, fill={tensor: f"{_USUAL.get(tensor, 'normal')}-nan"})
        for tensor in ("q", "k", "v"):
            yield _case(f"{tensor}_inf-{dtype}", dtype=dtype, fill={tensor: f"{_USUAL.get(tensor, 'normal')}-inf"})
        for tensor in ("v", "initial_state"):
            yield _case(f"{tensor}_inf_some-{dtype}", dtype=dtype, fill={tensor: "inf_some"})
        yield _case(f"outside_nan-{dtype}", dtype=dtype, fill=dict.fromkeys(values, "outside_nan"))
        yield _case(f"sequence_nan-{dtype}", dtype=dtype, fill=dict.fromkeys(values, "sequence_nan"))
        yield _case(f"state_nan-{dtype}", dtype=dtype, fill={"initial_state": "nan_some"})
        yield _case(f"resets_with_nan-{dtype}", dtype=dtype, fill={"g": "resets", "v": "normal-nan"})


def unit(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of length 1 in every direction."""
    return _normalised(rng.standard_normal(shape))


def _normalised(x: F64) -> F64:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _parallel(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of length 1 within some 20 degrees of one direction of their head."""
    return _normalised(rng.standard_normal((1, *shape[1:])) + 0.3 * rng.standard_normal(shape))


def _long(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors of a length up to 1.2."""
    return unit(rng, shape, dtype) * rng.uniform(0.5, 1.2, (*shape[:-1], 1))


def _basis(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Vectors with one 1."""
    return one_hot(rng, shape, dtype)


def _gate(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """The sigmoid of normal values."""
    return 1 / (1 + np.exp(-rng.standard_normal(shape)))


def _decay(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """-exp(A) * softplus(a + dt_bias) as trained layers have it: heads from a long memory to a short one."""
    rate = np.exp(np.linspace(-4, 2, shape[-1]))
    return -rate * np.log1p(np.exp(rng.standard_normal(shape) - 2))


def _slow(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Decays that keep most of the state over all rows."""
    return -0.01 * rng.random(shape)


def _sometimes(value: float, often: float = 0.05) -> Fill:
    """`_slow`, and in between a few of `value`."""
    return lambda rng, shape, dtype: np.where(rng.random(shape) < often, value, _slow(rng, shape, dtype))


def _uniform(low: float, high: float) -> Fill:
    return lambda rng, shape, dtype: rng.uniform(low, high, shape)


def _ones(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    return np.ones(shape)


def _with(usual: Fill, value: float, rows: Any, inside: bool = True) -> Fill:
    """Values of another fill, but `value` in some rows: in one element of each or, without `inside`, in all."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = usual(rng, shape, dtype)
        values[(rows, *(0 for _ in shape[1:])) if inside else rows] = value
        return values

    return fill


_OUTSIDE = np.r_[: _ENDS[0], _ENDS[-1] : 200]
_BAD_ROW = 40  # in the middle of a chunk of a sequence of 65 rows

FILLS: dict[str, Fill] = pools.FILLS | {
    "unit": unit,
    "parallel": _parallel,
    "long": _long,
    "basis": _basis,
    "gate": _gate,
    "decay": _decay,
    "slow": _slow,
    "strong": _uniform(-30, 0),
    "mixed": _sometimes(-60.0),
    "resets": _sometimes(-np.inf),
    "very_negative": _sometimes(-1e30),
    "ones": _ones,
    "small": _uniform(0, 0.02),
    "to_two": _uniform(0, 2),
    "outside_nan": _with(_slow, np.nan, _OUTSIDE, inside=False),
    "sequence_nan": _with(_slow, np.nan, slice(*_ENDS[2:4]), inside=False),
}
for _name, _usual in (("unit", unit), ("decay", _decay), ("gate", _gate), ("normal", normal)):
    FILLS |= {f"{_name}-one_nan": one(np.nan, _usual), f"{_name}-one_inf": one(np.inf, _usual)}
    FILLS |= {f"{_name}-nan": _with(_usual, np.nan, _BAD_ROW), f"{_name}-inf": _with(_usual, np.inf, _BAD_ROW)}

MUTANTS: dict[str, Mutant] = mutants.MUTANTS | pools.MUTANTS
