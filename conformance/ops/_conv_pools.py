"""The states of `gdn_conv_prep` in conformance: pools, dtypes of their own, and mistakes with them."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, boundaries
from polyfuse.conformance.mutations import Mutant, changed, patched, right
from polyfuse.conformance.ops import _pools as pools
from polyfuse.reference import gdn_conv_prep as oracle
from polyfuse.reference._numerics import F64, Array
from polyfuse.spec.gdn_conv_prep import NAME

_HEADS = {"num_k_heads": 1, "head_k_dim": 8, "head_v_dim": 4}
_DTYPES = (  # of x, of a state
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float32"),
    ("float16", "float32"),
    ("bfloat16", "float16"),
)


def cases() -> Iterator[Case]:
    """Calls with 8 sequences have 3 rows for each, those with 4 sequences more, which kernels may compute otherwise."""
    for number, ((dtype, state), columns) in enumerate(product(_DTYPES, (3, 4, 7))):
        dtypes = {"T": dtype, "state_pool": state, "state_indices": ("int32", "int64")[number // 2 % 2]}
        yield _case(f"{dtype}-{state}-columns_{columns}", (8, 4)[number % 2], columns, dtypes=dtypes)
    for width, more in product((2, 3), (0, 4)):
        yield _case(f"width_{width}-columns_{width - 1 + more}", 4, width - 1 + more, width)
    for layout, sequences in product(("row_strided", "column_strided", "last_two_swapped"), (8, 4)):
        dtypes = {"T": "bfloat16", "weight": "bfloat16", "state_pool": "bfloat16"}
        yield _case(f"{layout}-{sequences}", sequences, 4, dtypes=dtypes, layout={"state_pool": layout})
    for present, sequences in product(((), pools.OPTIONS[:1], pools.OPTIONS[1:]), (8, 4)):
        yield _case(f"with_{'-'.join(present) or 'nothing'}-{sequences}", sequences, 5, present=present)
    for present in ((), pools.OPTIONS):
        yield _case(f"one_sequence-{'-'.join(present) or 'nothing'}", 1, 4, present=present, length=9)
    yield _case("no_slot_named", 4, 4, fill={"state_indices": "none"})
    yield _case("no_rows", 4, 4, length=0, fill={"cu_seqlens": "zeros"})
    yield _case("single_rows", 8, 4, length=8, fill={"cu_seqlens": "arange"})
    yield _case("long_sequences", 4, 4, length=61, fill={"cu_seqlens": "cu_seqlens_x6"})
    yield _case(
        "wide", 4, 5, attrs={"num_k_heads": 4, "head_k_dim": 128, "head_v_dim": 128}, layout={"x": "row_strided"}
    )
    for fill in ("nan_some", "inf_some", "subnormal"):
        yield _case(f"values_{fill}", 4, 4, fill={"x": fill, "state_pool": fill})
    for sequences, columns in ((8, 3), (4, 6)):
        attrs = {"num_k_heads": 2, "interleaved": True}
        yield _case(f"interleaved-{sequences}", sequences, columns, attrs=attrs, dtypes={"state_pool": "float32"})
    for norm, dtype in product((True, False), ("bfloat16", "float32")):
        attrs = {"activation": None, "l2norm": norm}
        yield _case(f"no_activation-l2norm_{norm}-{dtype}", 4, 4, attrs=attrs, dtypes={"T": dtype})
    for fill in ("nan_some", "inf_some", "subnormal", "large"):
        dims = {"L": 9, "HV": 2, "W": 4}
        yield Case(f"no_activation-{fill}", dims, _HEADS | {"activation": None}, fill={"x": fill}, present=("bias",))
    for dtype, state in _DTYPES:
        if dtype != state:
            yield Case(
                f"state_dtype-{dtype}-{state}",
                {"L": 25, "HV": 2, "W": 4, "N": 9, "S": 8},
                _HEADS | {"output_final_state": True},
                {"T": dtype, "initial_state": state},
                present=("initial_state", "cu_seqlens"),
                fill={"cu_seqlens": "cu_seqlens"},
            )


def _case(
    name: str,
    sequences: int,
    columns: int,
    width: int = 4,
    length: int | None = None,
    attrs: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
    present: tuple[str, ...] = pools.OPTIONS,
    fill: Mapping[str, str] | None = None,
    **options: Any,
) -> Case:
    """A call with a pool, whose other slots hold NaN unless another fill is given."""
    attrs = _HEADS | dict(attrs or {})
    heads_v = 2 * attrs["num_k_heads"]
    named = "state_indices" in present
    if length is None:
        length = 3 * sequences if sequences > 4 else 16
    return Case(
        f"pool-{name}",
        {"L": length, "HV": heads_v, "W": width, "N": sequences + 1, "S": sequences}
        | {"slots": pools.SLOTS, "n": columns},
        attrs,
        {"T": "bfloat16", "state_pool": "bfloat16"} | dict(dtypes or {}),
        present=("state_pool", *present, *(("cu_seqlens",) if sequences > 1 else ())),
        fill={
            "cu_seqlens": "cu_seqlens",
            "state_indices": "slots",
            "has_initial_state": "two_of_three",
            "state_pool": f"nan_but_{'named' if named else 'first'}_{sequences}",
        }
        | dict(fill or {}),
        **options,
    )


FILLS: dict[str, Fill] = pools.FILLS | {"cu_seqlens_x6": boundaries(6)}


def _only_the_window_written(before: F64, after: F64, slots: list[int | None]) -> F64:
    """Of W = 4: the columns before the last three stay as they are."""
    after[..., :-3] = before[..., :-3]
    return after


def _oldest_columns_read(windows: Any) -> Any:
    return lambda x, state, cu_seqlens, width: windows(
        x, None if state is None else state[..., : width - 1], cu_seqlens, width
    )


def _old_columns_lost(**values: Any) -> tuple[Array, ...]:
    """A sequence shorter than its slot leaves zeros where the old columns should have moved."""
    if values["state_pool"] is None:
        return right(NAME, values)

    def wrong(final_state: Any) -> Any:
        return lambda x, state, cu_seqlens, columns: final_state(x, None, cu_seqlens, columns)

    results: tuple[Array, ...] = patched(NAME, oracle, "final_state", wrong)(**values)
    return results


def _through_the_dtype_of_x(values: dict[str, Any]) -> dict[str, Any]:
    dtype = values["x"].dtype
    given = {name: values[name] for name in ("initial_state", "state_pool") if values[name] is not None}
    with np.errstate(over="ignore", invalid="ignore"):
        return {name: state.astype(dtype).astype(state.dtype) for name, state in given.items()}


def _written_through_the_dtype_of_x(**values: Any) -> tuple[Array, ...]:
    results = right(NAME, values)
    states = [state.astype(values["x"].dtype).astype(state.dtype) for state in results[5:]]
    return *results[:5], *states


MUTANTS: dict[str, Mutant] = pools.mistakes(NAME, oracle) | {
    "pool_oldest_columns_read": patched(NAME, oracle, "windows", _oldest_columns_read),
    "pool_old_columns_lost": _old_columns_lost,
    "pool_only_the_window_written": pools.pool_changed(NAME, oracle, _only_the_window_written),
    "state_through_the_dtype_of_x": changed(NAME, _through_the_dtype_of_x),
    "state_written_through_the_dtype_of_x": _written_through_the_dtype_of_x,
    "silu_where_none_is_asked_for": changed(NAME, lambda v: {"activation": "silu"}),
}
