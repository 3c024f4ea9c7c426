"""Conformance of `gdn_conv_prep`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill
from polyfuse.conformance.mutations import Mutant, changed, common, patched, right
from polyfuse.conformance.ops import _conv_pools as pools
from polyfuse.conformance.ops.gdn_post_conv import FILLS as GATE_FILLS
from polyfuse.conformance.ops.gdn_post_conv import SPLIT, early_threshold, heads_exchanged, truncated_sum
from polyfuse.reference import gdn_conv_prep as oracle
from polyfuse.reference._numerics import F64, Array
from polyfuse.spec import FLOATS
from polyfuse.spec.gdn_conv_prep import NAME

_HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
_SMALL = {"L": 5, "HV": 4, "W": 4}
_PACKED = {"L": 23, "HV": 4, "W": 4, "N": 9, "S": 8}  # lengths 2, 0, 5, 3, 1, 6, 4, 2
_FINAL = {"output_final_state": True}
_BF16 = {"T": "bfloat16", "initial_state": "bfloat16"}
# Key heads, K, value heads of a key head, V.
_KEY_HEADS = ((2, 16, 2, 8), (1, 8, 1, 8), (3, 24, 1, 40), (2, 5, 3, 7), (2, 16, 4, 4), (1, 1, 3, 1), (16, 128, 2, 128))


def cases() -> Iterator[Case]:
    for norm, exp, dtype in product((True, False), (True, False), FLOATS):
        dtypes = {"T": dtype, "weight": dtype, "a": dtype, "b": dtype}
        yield Case(f"{dtype}-l2norm_{norm}-g_exp_{exp}", _SMALL, _HEADS | {"l2norm": norm, "output_g_exp": exp}, dtypes)
    for width, optional, index in product(
        (2, 3, 4), ((), ("bias",), ("initial_state",), ("bias", "initial_state")), ("", "int32", "int64")
    ):
        dims = _PACKED | {"W": width} if index else {"L": 23, "HV": 4, "W": width, "S": 1}
        yield Case(
            f"width_{width}-{'-'.join(optional) or 'plain'}-{index or 'one_sequence'}",
            dims,
            _HEADS | _FINAL,
            _BF16 | {"weight": "bfloat16", "cu_seqlens": index},
            present=(*optional, "cu_seqlens") if index else optional,
            fill={"cu_seqlens": "cu_seqlens"},
        )
    for length, state in product((0, 1, 2, 3, 67), ((), ("initial_state",))):
        dims = {"L": length, "HV": 4, "W": 4, "S": 1}
        name = f"rows_{length}{'-initial_state' if state else ''}"
        yield Case(name, dims, _HEADS | _FINAL, _BF16, present=state)
    yield Case(
        "long_sequences",
        {"L": 23 * 40, "HV": 4, "W": 4, "N": 9, "S": 8},
        _HEADS | _FINAL,
        _BF16,
        present=("bias", "initial_state", "cu_seqlens"),
        fill={"cu_seqlens": "cu_seqlens_x40"},
    )
    yield Case(
        "many_sequences",
        {"L": 902, "HV": 2, "W": 4, "N": 301, "S": 300},  # 2, 0, 5, 3, 1, 6, 4, ...: 899 rows, and 3 past the last
        {"num_k_heads": 1, "head_k_dim": 8, "head_v_dim": 8} | _FINAL,
        _BF16,
        present=("initial_state", "cu_seqlens"),
        fill={"cu_seqlens": "cu_seqlens"},
    )
    attrs = {"num_k_heads": 1, "head_k_dim": 4, "head_v_dim": 4}
    yield Case("rows_1030", {"L": 1030, "HV": 1, "W": 4, "S": 1}, attrs | _FINAL, _BF16, present=("initial_state",))
    yield Case("final_state_off", _PACKED, _HEADS, present=("cu_seqlens",), fill={"cu_seqlens": "cu_seqlens"})
    for key, value, heads in ((24, 40, 3), (1, 1, 1), (80, 96, 4), (128, 64, 2), (256, 256, 1)):
        attrs = {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value}
        yield Case(f"dims_k{key}-v{value}-heads{heads}", {"L": 9, "HV": 2 * heads, "W": 4}, attrs, {"T": "bfloat16"})
    attrs = {"num_k_heads": 2, "head_k_dim": 256, "head_v_dim": 16}
    yield Case("dims_k256-float32", {"L": 9, "HV": 2, "W": 4}, attrs)
    yield Case("one_value_head", {"L": 7, "HV": 1, "W": 4}, _HEADS, {"T": "bfloat16"})
    mixed = {"T": "bfloat16", "weight": "float32", "bias": "float16", "a": "float32", "b": "float16"}
    yield Case("mixed_dtypes", _SMALL, _HEADS, mixed, present=("bias",))
    for layout, dtype in product(("row_strided", "token_stride_1"), ("bfloat16", "float32")):
        yield Case(
            f"{layout}-{dtype}",
            {"L": 37, "HV": 4, "W": 4, "S": 1},
            _HEADS | _FINAL,
            {"T": dtype, "weight": dtype, "initial_state": dtype},
            present=("initial_state",),
            layout=dict.fromkeys(("x", "weight", "a", "b", "initial_state"), layout),
        )
    for fill in ("zeros", "tiny_vectors", "nan_some", "inf_some", "subnormal", "large"):
        state = {"cu_seqlens": "cu_seqlens", "x": fill, "initial_state": fill}
        yield Case(f"qkv_{fill}", _PACKED, _HEADS | _FINAL, fill=state, present=("initial_state", "cu_seqlens", "bias"))
    yield Case("eps_large", _SMALL, _HEADS | {"l2norm_eps": 0.5})
    for exp, fill in product((False, True), ("wide_line", "nan_some", "inf_some")):
        gates = {"a": fill, "b": fill, "dt_bias": "zeros" if fill == "wide_line" else "normal"}
        yield Case(f"gates_{fill}-g_exp_{exp}", {"L": 64, "HV": 4, "W": 4}, _HEADS | {"output_g_exp": exp}, fill=gates)
    yield from _interleaved_cases()
    yield from pools.cases()
    # 300,000 rows: more than 2**31 elements. The last rows are zero, so that each repetition begins as the first does.
    attrs = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    dims = {"L": 600, "HV": 32, "W": 4}
    dtypes = {"T": "bfloat16", "weight": "bfloat16"}
    for name, more in (("over_2_31", {}), ("over_2_31-interleaved", {"interleaved": True})):
        yield Case(name, dims, attrs | more, dtypes, fill={"x": "zero_tail"}, repeat=500)


def _interleaved_cases() -> Iterator[Case]:
    present: tuple[str, ...] = ("bias", "initial_state", "cu_seqlens")
    for shape in _KEY_HEADS[:-1]:
        yield _interleaved("", shape, present=present, fill={"cu_seqlens": "cu_seqlens"}, **SPLIT)
    shape = _KEY_HEADS[0]
    for width, present in product((2, 3), ((), ("bias", "initial_state"))):
        yield _interleaved(f"-width_{width}-{'-'.join(present) or 'plain'}", shape, 13, width, present=present)
    for length in (0, 1, 67):
        yield _interleaved(f"-rows_{length}", shape, length, present=("initial_state",), **SPLIT)
    for layout, dtype in product(("row_strided", "token_stride_1"), ("bfloat16", "float32")):
        layouts = dict.fromkeys(("x", "a", "b", "initial_state"), layout)
        options: dict[str, Any] = {"split": ("a", "b"), "layout": layouts}
        yield _interleaved(f"-{layout}-{dtype}", shape, 13, dtype=dtype, present=("initial_state",), **options)
    yield _interleaved("-l2norm_False", shape, 9, attrs={"l2norm": False}, **SPLIT)
    yield _interleaved("-z_finite", shape, 9, fill={"x": "normal"}, **SPLIT)
    yield _interleaved("", _KEY_HEADS[-1], 5, present=("initial_state",), **SPLIT)


def _interleaved(
    suffix: str,
    shape: tuple[int, int, int, int],
    length: int = 23,
    width: int = 4,
    dtype: str = "bfloat16",
    attrs: Mapping[str, Any] | None = None,
    present: tuple[str, ...] = (),
    fill: Mapping[str, str] | None = None,
    **options: Any,
) -> Case:
    """A case of these key heads, whose columns of z hold NaN unless another fill is given."""
    heads, key, group, value = shape
    own = {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value, "interleaved": True}
    dims = {"L": length, "HV": heads * group, "W": width, "N": 9, "S": 8 if "cu_seqlens" in present else 1}
    return Case(
        f"interleaved-{_key_heads(shape)}{suffix}",
        dims,
        own | _FINAL | dict(attrs or {}),
        {"T": dtype, "initial_state": dtype, "weight": dtype, "a": dtype, "b": dtype},
        present=present,
        fill={"x": f"z_nan-{_key_heads(shape)}"} | dict(fill or {}),
        **options,
    )


def _key_heads(shape: tuple[int, int, int, int]) -> str:
    return "h{}-k{}-g{}-v{}".format(*shape)


def _z_nan(shape: tuple[int, int, int, int]) -> Fill:
    """Normal values, and NaN in the columns of z of each key head."""
    heads, _, group, value = shape

    def fill(rng: np.random.Generator, size: tuple[int, ...], dtype: str) -> F64:
        values = rng.standard_normal((size[0], heads, size[1] // heads))
        values[:, :, -group * value :] = np.nan
        return values.reshape(size)

    return fill


def _zero_tail(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> F64:
    """Zeros in the last 8 rows: what follows finds what a first row finds before it."""
    values = rng.standard_normal(shape)
    values[-8:] = 0
    return values


FILLS: dict[str, Fill] = GATE_FILLS | pools.FILLS | {"zero_tail": _zero_tail}
FILLS |= {f"z_nan-{_key_heads(shape)}": _z_nan(shape) for shape in _KEY_HEADS}


def _rounded_before_the_norm(**values: Any) -> Any:
    """The conv and its SiLU as one kernel, what follows as another."""
    *parts, g, beta, state = right(NAME, {**values, "l2norm": False})
    rows = np.concatenate([part.reshape(len(part), int(np.prod(part.shape[1:]))) for part in parts], axis=1)
    heads = ("num_k_heads", "head_k_dim", "head_v_dim", "l2norm", "l2norm_eps")
    gates = {name: values[name] for name in ("a", "b", "A_log", "dt_bias")}
    q, k, v, *_ = right("gdn_post_conv", {"conv_out": rows, **gates, **{name: values[name] for name in heads}})
    return q, k, v, g, beta, state


def _oldest_tap_dropped(values: dict[str, Any]) -> dict[str, Any]:
    weight = values["weight"].copy()
    weight[:, 0] = 0
    return {"weight": weight}


def _newest_first(values: dict[str, Any]) -> dict[str, Any]:
    state = values["initial_state"]
    return {"initial_state": None if state is None else state[..., ::-1]}


def _one_sequence(windows: Any) -> Any:
    return lambda x, state, cu_seqlens, width: windows(x, state, None, width)


def _without_the_initial_state(final_state: Any) -> Any:
    return lambda x, state, *rest: final_state(x, None, *rest)


def _one_row_early(final_state: Any) -> Any:
    return lambda x, *rest: final_state(np.roll(x, 1, axis=0), *rest)


def _first_columns(in_order: Any) -> Any:
    """An interleaved x read as if its first columns were [q | k | v]."""
    return lambda x, heads, width: x[:, : in_order(x, heads, width).shape[1]]


def _z_for_v(in_order: Any) -> Any:
    def wrong(x: Array, heads: int, width: int) -> Array:
        key_heads = x.reshape(len(x), heads, x.shape[1] // heads).copy()
        values = (key_heads.shape[2] - 2 * width) // 2
        key_heads[:, :, 2 * width : 2 * width + values] = key_heads[:, :, 2 * width + values :]
        return in_order(key_heads.reshape(x.shape), heads, width)

    return wrong


def _values_of_other_heads(**values: Any) -> Any:
    """Value head j is taken for one of key head j % H, in place of j // (HV / H)."""
    q, k, v, *rest = right(NAME, values)
    if values["interleaved"]:
        heads = values["num_k_heads"]
        v = v.reshape(len(v), heads, v.shape[1] // heads, v.shape[2]).swapaxes(1, 2).reshape(v.shape)
    return q, k, v, *rest


MUTANTS: dict[str, Mutant] = (
    common(NAME)
    | pools.MUTANTS
    | {
        "state_leaks_across_sequences": patched(NAME, oracle, "windows", _one_sequence),
        "initial_state_ignored": changed(NAME, lambda v: {"initial_state": None}),
        "initial_state_newest_first": changed(NAME, _newest_first),
        "final_state_without_the_initial_one": patched(NAME, oracle, "final_state", _without_the_initial_state),
        "final_state_one_row_early": patched(NAME, oracle, "final_state", _one_row_early),
        "taps_reversed": changed(NAME, lambda v: {"weight": v["weight"][:, ::-1]}),
        "oldest_tap_dropped": changed(NAME, _oldest_tap_dropped),
        "bias_dropped": changed(NAME, lambda v: {"bias": None}),
        "silu_dropped": patched(NAME, oracle, "silu", lambda silu: lambda c: c),
        "rounded_before_the_norm": _rounded_before_the_norm,
        "truncated_sum_of_squares": patched(NAME, oracle, "inverse_norm", truncated_sum),
        "early_threshold": patched(NAME, oracle, "softplus", early_threshold),
        "l2norm_ignored": changed(NAME, lambda v: {"l2norm": False}),
        "dt_bias_dropped": changed(NAME, lambda v: {"dt_bias": np.zeros_like(v["dt_bias"])}),
        "a_and_b_swapped": changed(NAME, lambda v: {"a": v["b"], "b": v["a"]}),
        "gates_of_other_heads": changed(NAME, heads_exchanged),
        "interleaved_read_as_plain": patched(NAME, oracle, "in_order", _first_columns),
        "z_for_v": patched(NAME, oracle, "in_order", _z_for_v),
        "values_of_other_heads": _values_of_other_heads,
    }
)
