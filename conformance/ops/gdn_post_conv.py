"""Conformance of `gdn_post_conv`: cases, fills, and wrong implementations that must be rejected."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

from polyfuse.conformance.case import Case
from polyfuse.conformance.fills import Fill, scaled
from polyfuse.conformance.mutations import Mutant, changed, common, patched, returned, truncated
from polyfuse.reference import gdn_post_conv as oracle
from polyfuse.reference._numerics import F64, FP32_MAX, to_f64
from polyfuse.spec import FLOATS, FP32_ROUNDOFF
from polyfuse.spec.gdn_post_conv import NAME

_SMALL = {"L": 5, "HV": 4}
_HEADS = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
# As views of Qwen3-Next's second projection, whose key heads are [b | a].
SPLIT: dict[str, Any] = {"split": ("a", "b"), "layout": {"b": "first_half", "a": "second_half"}}


def cases() -> Iterator[Case]:
    for norm, exp, dtype in product((True, False), (True, False), FLOATS):
        dtypes = {"T": dtype, "a": dtype, "b": dtype}
        yield Case(f"{dtype}-l2norm_{norm}-g_exp_{exp}", _SMALL, _HEADS | {"l2norm": norm, "output_g_exp": exp}, dtypes)
    for length in (0, 1, 2, 67):
        yield Case(f"rows_{length}", {"L": length, "HV": 4}, _HEADS, {"T": "bfloat16"})
    for key, value, heads in ((24, 40, 3), (1, 1, 1), (80, 96, 4), (128, 64, 2), (256, 256, 1)):
        attrs = {"num_k_heads": heads, "head_k_dim": key, "head_v_dim": value}
        yield Case(f"dims_k{key}-v{value}-heads{heads}", {"L": 9, "HV": 2 * heads}, attrs, {"T": "bfloat16"})
    yield Case("one_value_head", {"L": 7, "HV": 1}, _HEADS, {"T": "bfloat16"})
    yield Case("gates_float32", _SMALL, _HEADS, {"T": "bfloat16", "a": "float32", "b": "float16", "A_log": "bfloat16"})
    for layout, dtype in product(("row_strided", "token_stride_1"), ("bfloat16", "float32")):
        yield Case(
            f"{layout}-{dtype}",
            {"L": 37, "HV": 4},
            _HEADS,
            {"T": dtype, "a": dtype, "b": dtype},
            layout={"conv_out": layout, "a": layout, "b": layout},
        )
    for heads, group in ((2, 1), (2, 2), (1, 3), (3, 4)):
        attrs = {"num_k_heads": heads, "head_k_dim": 8, "head_v_dim": 4}
        yield Case(f"gates_split-h{heads}-g{group}", {"L": 9, "HV": heads * group}, attrs, {"T": "bfloat16"}, **SPLIT)
    yield Case("gates_split-contiguous", _SMALL, _HEADS, split=("a", "b"))
    yield Case("gates_split-rows_0", {"L": 0, "HV": 4}, _HEADS, **SPLIT)
    for name, layout in (("a", "second_half"), ("b", "column_strided")):
        yield Case(f"gates_split-only_{name}", _SMALL, _HEADS, split=(name,), layout={name: layout})
    for fill in ("zeros", "tiny_vectors", "nan_some", "inf_some", "subnormal", "large"):
        yield Case(f"qkv_{fill}", {"L": 11, "HV": 4}, _HEADS, fill={"conv_out": fill})
    yield Case("eps_large", _SMALL, _HEADS | {"l2norm_eps": 0.5})
    for exp in (False, True):
        for fill in ("wide_line", "nan_some", "inf_some"):
            gates = {"a": fill, "b": fill, "dt_bias": "zeros" if fill == "wide_line" else "normal"}
            yield Case(f"gates_{fill}-g_exp_{exp}", {"L": 64, "HV": 4}, _HEADS | {"output_g_exp": exp}, fill=gates)
    # 300,000 rows: more than 2**31 elements.
    attrs = {"num_k_heads": 16, "head_k_dim": 128, "head_v_dim": 128}
    yield Case("over_2_31", {"L": 600, "HV": 32}, attrs, {"T": "bfloat16"}, repeat=500)


FILLS: dict[str, Fill] = {"tiny_vectors": scaled(1e-5)}


def inverse_of(norm: Callable[[F64, float], F64]) -> Callable[[Any], Any]:
    """In place of the oracle's inverse norm, that of another norm."""

    def make(right: Any) -> Any:
        def inverse(x: F64, eps: float) -> F64:
            with np.errstate(divide="ignore", invalid="ignore"):
                return 1 / norm(x, eps)

        return inverse

    return make


def approximate(right: Any) -> Any:
    """An inverse norm that is 11 float32 roundings too large, as an approximate reciprocal root may be."""
    return lambda x, eps: right(x, eps) * (1 + 11 * FP32_ROUNDOFF)


def truncated_sum(right: Any) -> Any:
    """An inverse norm of squares that are added one by one and truncated to 23 bits, one less than float32 has."""

    def inverse(x: F64, eps: float) -> F64:
        total = np.zeros(x.shape[:-1])
        for i in range(x.shape[-1]):
            total = truncated(total + x[..., i] * x[..., i], 23)
        total = total[..., None] + eps
        return 1 / np.sqrt(np.where(total > FP32_MAX, np.inf, total))

    return inverse


def naive_softplus(right: Any) -> Any:
    """log(1 + exp(x)) in float32: 0 far below, infinite far above."""

    def softplus(x: F64) -> F64:
        with np.errstate(over="ignore"):
            return to_f64(np.log(np.float32(1) + np.exp(x.astype(np.float32))))

    return softplus


def heads_exchanged(values: dict[str, Any]) -> dict[str, Any]:
    """a and b of three dimensions read as [L, HV/H, H]: value head j takes the gates of key head j % H."""
    gates = {name: values[name] for name in ("a", "b")}
    return {name: x.swapaxes(1, 2).reshape(x.shape) if x.ndim == 3 else x for name, x in gates.items()}


def early_threshold(right: Any) -> Any:
    """softplus(x) = x from 10 on, where the difference is still many roundings."""
    return lambda x: np.where(x > 10, x, right(x))


def _length(x: F64) -> F64:
    return np.sqrt((x * x).sum(-1, keepdims=True))


def _root_of_mean(x: F64, eps: float) -> F64:
    return np.sqrt((x * x).mean(-1, keepdims=True) + eps)


MUTANTS: dict[str, Mutant] = common(NAME) | {
    "eps_outside_the_root": patched(NAME, oracle, "inverse_norm", inverse_of(lambda x, eps: _length(x) + eps)),
    "eps_as_a_floor": patched(NAME, oracle, "inverse_norm", inverse_of(lambda x, eps: np.maximum(_length(x), eps))),
    "mean_for_sum": patched(NAME, oracle, "inverse_norm", inverse_of(_root_of_mean)),
    "approximate_root": patched(NAME, oracle, "inverse_norm", approximate),
    "naive_softplus": patched(NAME, oracle, "softplus", naive_softplus),
    "early_threshold": patched(NAME, oracle, "softplus", early_threshold),
    "dt_bias_dropped": changed(NAME, lambda v: {"dt_bias": np.zeros_like(v["dt_bias"])}),
    "a_and_b_swapped": changed(NAME, lambda v: {"a": v["b"], "b": v["a"]}),
    "gates_of_other_heads": changed(NAME, heads_exchanged),
    "g_exp_ignored": changed(NAME, lambda v: {"output_g_exp": False}),
    "q_and_k_swapped": returned(NAME, lambda q, k, *rest: (k, q, *rest)),
}
