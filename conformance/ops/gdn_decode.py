"""Conformance of `gdn_decode`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.ops._gdn_decode_mistakes import MUTANTS
from polyfuse.conformance.ops._pools import FILLS as POOL_FILLS
from polyfuse.conformance.ops.gdn_post_conv import SPLIT
from polyfuse.reference._numerics import F64
from polyfuse.spec import FLOATS, INTS

__all__ = ["FILLS", "MUTANTS", "cases"]

_SLOTS = (6, 2, -1, 4, 0)  # of the sequences, where each has one token; slots with odd numbers hold NaN
_POOL = 9
_TOKENS = (1, 2, 3, 4, 8)
_ALL_FLOATS = ("x", "z", "a", "b", "conv_weight", "conv_bias", "norm_weight")


def cases() -> Iterator[Case]:
    for dtype, state in product(FLOATS, FLOATS):
        dtypes = dict.fromkeys((*_ALL_FLOATS, "conv_state"), dtype) | {"recurrent_state": state}
        yield _case(f"{dtype}-{state}", dtypes=dtypes)
    for index, (heads, group) in product(INTS, ((2, 1), (2, 2), (1, 4))):
        yield _case(f"indices_{index}-h{heads}-hv{heads * group}", 5, heads, group, index=index)
    for key, value, heads in ((24, 40, 2), (32, 16, 1), (16, 32, 1), (5, 7, 3), (1, 1, 1)):
        yield _case(f"dims_k{key}-v{value}-h{heads}", 3, heads, key=key, value=value, index="int32")
    for width, more, index in product((2, 3, 4), (0, 1, 2), ("", "int32")):
        yield _case(
            f"width_{width}-n_{width - 1 + more}-{index or 'in_order'}", 4, 1, 2, width, width - 1 + more, index
        )
    for bias in ("bfloat16", "float32"):
        yield _case(f"bias-{bias}", dtypes={"x": "bfloat16", "conv_bias": bias}, present=("conv_bias",))
    mixed = {"x": "bfloat16", "z": "float16", "a": "float32", "b": "float16", "conv_weight": "float16"}
    mixed |= {"norm_weight": "bfloat16", "conv_state": "float16", "A_log": "float32", "dt_bias": "bfloat16"}
    yield _case("mixed_dtypes", dtypes=mixed, index="int64")
    yield from _interleaved_cases()
    yield from _layout_cases()
    yield from _value_cases()
    for batch in (0, 1):
        yield _case(f"batch_{batch}", batch)
    yield _case("batch_1030", 1030, 1, 1, 2, key=1, value=1, dtypes={"x": "bfloat16"})
    yield _case("batch_0-indices", 0, index="int64")
    yield _case("all_padding", 3, index="int32", fill={"state_indices": "no_slots"})
    yield _case("split_gates", index="int32", **SPLIT)
    yield _case("scale", attrs={"scale": 0.7, "norm_eps": 0.3})
    yield _case("norm_eps_large", attrs={"norm_eps": 0.5})
    yield _case("l2norm_eps_large", attrs={"l2norm_eps": 0.5})
    yield from _token_cases()


def _interleaved_cases() -> Iterator[Case]:
    for heads, group, key, value in ((2, 1, 16, 16), (2, 2, 16, 8), (1, 4, 16, 16), (3, 2, 5, 7)):
        name = f"interleaved-h{heads}-g{group}-k{key}-v{value}"
        yield _case(name, 3, heads, group, key=key, value=value, index="int32", interleaved=True, **SPLIT)
    dtypes = {"x": "bfloat16", "recurrent_state": "bfloat16"}
    yield _case("interleaved-bfloat16", dtypes=dtypes, present=("conv_bias",), interleaved=True)
    strided: dict[str, Any] = {"layout": dict.fromkeys("xab", "row_strided"), "split": ("a", "b")}
    yield _case("interleaved-row_strided", 3, interleaved=True, **strided)


def _layout_cases() -> Iterator[Case]:
    for layout, dtype in product(("row_strided", "column_strided"), ("bfloat16", "float32")):
        layouts = dict.fromkeys(("x", "z", "a", "b", "conv_weight", "conv_state", "recurrent_state"), layout)
        yield _case(f"{layout}-{dtype}", 3, 1, 2, index="int32", dtypes={"x": dtype, "z": dtype}, layout=layouts)
    for dtype in ("bfloat16", "float32"):
        dtypes = {"x": dtype, "conv_state": dtype, "recurrent_state": dtype}
        layouts = dict.fromkeys(("conv_state", "recurrent_state"), "last_two_swapped")
        yield _case(f"pools_swapped-{dtype}", 3, 2, 1, value=24, index="int32", dtypes=dtypes, layout=layouts)


def _value_cases() -> Iterator[Case]:
    every = ("x", "conv_state", "recurrent_state")
    yield _case("nan_in_one_sequence", index="int32", fill={"x": "nan_first_row"})
    yield _case("nan_in_one_state", fill={"conv_state": "nan_first_row", "recurrent_state": "nan_second_row"})
    yield _case("nan_in_z", fill={"z": "nan_some"})
    for fill in ("zeros", "tiny", "subnormal", "large"):
        yield _case(f"all_{fill}", fill=dict.fromkeys(every, fill))
    yield _case("x_zeros", fill=dict.fromkeys(every[:2], "zeros"))
    yield _case("state_zeros", fill={"recurrent_state": "zeros"})
    yield _case("state_tiny", fill={"recurrent_state": "tiny", "b": "far_below"})
    for fill in ("wide_line", "inf_some", "nan_some"):
        yield _case(f"gates_{fill}", 8, fill={"a": fill, "b": fill, "dt_bias": "zeros"})
    yield _case("decay_to_zero", fill={"a": "large", "A_log": "threes"})
    yield _case("z_wide_line", 8, fill={"z": "wide_line"})


def _token_cases() -> Iterator[Case]:
    for tokens, accepted, index in product((1, 2, 4, 8), (True, False), INTS):
        if index == "int32" or tokens == 4:
            name = f"tokens_{tokens}-{index}{'-accepted' if accepted else ''}"
            yield _case(name, 2 if tokens == 8 else 3, 1, 2, tokens=tokens, accepted=accepted, index=index)
    for width, accepted in product((2, 3), (True, False)):
        name = f"tokens_3-width_{width}{'-accepted' if accepted else ''}"
        yield _case(name, 3, 2, 1, width, tokens=3, accepted=accepted, index="int32", present=("conv_bias",))
    for tokens, accepted in product((2, 4), (True, False)):
        name = f"tokens_{tokens}-padded{'-accepted' if accepted else ''}"
        fill = {"state_indices": "slots_padded", "num_accepted": "ones"}
        yield _case(name, 4, 1, 2, tokens=tokens, accepted=accepted, index="int32", fill=fill)
    fill = {"state_indices": "slots_padded", "recurrent_state": "normal"}  # some select an index of -1
    yield _case("tokens_4-padded-accepted_before", 4, tokens=4, accepted=True, index="int32", fill=fill)
    dtypes: dict[str, str] = dict.fromkeys((*_ALL_FLOATS, "conv_state", "recurrent_state"), "bfloat16")
    yield _case("tokens_4-bfloat16", 3, 2, 2, tokens=4, accepted=True, index="int32", dtypes=dtypes)
    yield _case("tokens_4-interleaved", 3, tokens=4, accepted=True, index="int32", interleaved=True, **SPLIT)
    layouts = dict.fromkeys(("conv_state", "recurrent_state"), "last_two_swapped") | dict.fromkeys(
        "xzab", "row_strided"
    )
    yield _case("tokens_2-strided", 3, tokens=2, accepted=True, index="int64", layout=layouts)
    yield _case("tokens_2-nan", 3, tokens=2, accepted=True, index="int32", fill={"x": "nan_first_row"})
    yield _case("tokens_2-batch_0", 0, tokens=2, accepted=True, index="int32")


def _case(
    name: str,
    batch: int = 4,
    heads: int = 2,
    group: int = 2,
    width: int = 4,
    columns: int | None = None,
    index: str = "",
    *,
    key: int = 16,
    value: int = 16,
    tokens: int = 0,
    accepted: bool = False,
    interleaved: bool = False,
    attrs: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
    present: tuple[str, ...] = (),
    fill: Mapping[str, str] | None = None,
    **options: Any,
) -> Case:
    """A case of this many sequences, of one token each without `tokens`.

    Without an `index`, which is the dtype of state_indices, sequence b has slot b; with one, slots that are not read
    hold NaN. conv_state has W columns if that is not given, and what the spec says with tokens.
    """
    if tokens:
        columns = width - 1 + tokens - 1
    pool = 2 * batch * max(tokens, 1) + 1 if tokens or not index else _POOL
    present = (*present, *(() if interleaved else ("z",)), *(("state_indices",) if index else ()))
    of_slots = {}
    if index:
        of_slots = {"state_indices": "slots_accepted" if accepted else "slots", "recurrent_state": "odd_nan"}
        of_slots |= {"num_accepted": f"accepted_{tokens}"} if tokens else {"conv_state": "odd_nan"}
    return Case(
        name,
        {
            "...": (batch, tokens) if tokens else (batch,),
            "B": batch,
            "HV": heads * group,
            "W": width,
            "n": width if columns is None else columns,
            "conv_slots": pool + 1,
            "slots": pool,
        },
        {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value, "interleaved": interleaved} | dict(attrs or {}),
        {
            "T" if name == "x" else name: dtype
            for name, dtype in {"state_indices": index, **(dtypes or {})}.items()
            if dtype
        },
        present=(*present, "num_accepted") if accepted else present,
        fill=of_slots | dict(fill or {}),
        **options,
    )


def _slots(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """A slot for each sequence, of which one has none; or one for each token, even for the first ones alone."""
    if len(shape) == 1:
        return np.resize(np.array(_SLOTS, np.float64), shape)
    return _slots_of_tokens(np.zeros(shape[0], np.int64), shape)


def _slots_accepted(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """A slot for each token, even for those alone that `_accepted` selects."""
    return _slots_of_tokens(_accepted(*shape) - 1, shape)


def _slots_padded(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """As `_slots`, but the last sequence has none, and each second one has none for half of its tokens."""
    numbers = _slots(rng, shape, dtype)
    numbers[1::2, (shape[1] + 1) // 2 :] = -1
    numbers[-1:] = -1
    return numbers


def _slots_of_tokens(even: NDArray[np.int64], shape: tuple[int, ...]) -> F64:
    """Different numbers, in falling order, of which sequence b's at `even[b]` is even and the others are odd."""
    numbers = 2 * np.arange(shape[0] * shape[1], dtype=np.float64)[::-1].reshape(shape) + 1
    numbers[np.arange(shape[0]), even] -= 1
    return numbers


def _accepted(batch: int, tokens: int) -> NDArray[np.int64]:
    """How many tokens of each sequence were accepted: all, all but one, ..., one, all, ..."""
    return tokens - np.arange(batch) % tokens


def _accepted_of(tokens: int) -> Fill:
    return lambda rng, shape, dtype: _accepted(shape[0], tokens).astype(np.float64)


def _odd_nan(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Normal values, and NaN in the slots with odd numbers."""
    values = rng.standard_normal(shape)
    values[1::2] = np.nan
    return values


def _nan_row(number: int) -> Fill:
    """Normal values, and one row of NaN."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal(shape)
        values[number] = np.nan
        return values

    return fill


FILLS: dict[str, Fill] = {
    "shuffled": POOL_FILLS["shuffled"],
    "slots": _slots,
    "slots_accepted": _slots_accepted,
    "slots_padded": _slots_padded,
    "no_slots": lambda rng, shape, dtype: np.full(shape, -1.0),
    "odd_nan": _odd_nan,
    "nan_first_row": _nan_row(0),
    "nan_second_row": _nan_row(1),
    "far_below": lambda rng, shape, dtype: np.full(shape, -20.0),
    "threes": lambda rng, shape, dtype: np.full(shape, 3.0),
    "ones": lambda rng, shape, dtype: np.ones(shape),
}
FILLS |= {f"accepted_{tokens}": _accepted_of(tokens) for tokens in _TOKENS}
