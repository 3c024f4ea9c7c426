"""Mistakes in a small part of an op's calls: past a size, in one dtype, for two values together.

What hand-picked cases of an op miss; `conformance.plans` is there to find them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from polyfuse.conformance.mutations import Mutant, right
from polyfuse.reference._numerics import Array, round_to, to_f64
from polyfuse.spec import FLOATS, OPS, Call, bind, dtype_name

# Of each op two values that hand-picked cases do not have together: attributes, and dtypes of arguments.
TOGETHER: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "pos_embed_interpolate": (
        {"mode": "bicubic", "merge_size": 3},
        {"mode": "bicubic", "out_dtype": "float16"},
        {"base": "bfloat16", "align_corners": False},
    ),
    "gdn_post_conv": (
        {"l2norm_eps": 0.5, "T": "float16"},
        {"l2norm": False, "l2norm_eps": 0.5},
        {"a": "float32", "T": "float16"},
    ),
    "gdn_conv_prep": (
        {"activation": None, "interleaved": True},
        {"activation": None, "T": "float16"},
        {"bias": "float32", "T": "float16"},
    ),
    "silu_mul_block_quant": (
        {"scale_ub": 10.0, "quant_dtype": "float8_e5m2"},
        {"limit": 0.75, "quant_dtype": "int8"},
        {"reciprocal": True, "scale_ub": 10.0},
        {"limit_on": "silu", "T": "float16"},
        {"alpha": 1.702, "scale_layout": "swizzled_128x4"},
        {"row_weight": "float16", "interleaved": True},
    ),
    "block_quant": (
        {"scale_ub": 10.0, "quant_dtype": "float8_e5m2"},
        {"scale_min": 0.5, "quant_dtype": "int8"},
        {"fill": 0.5, "x": "float16"},
    ),
    "rms_norm_block_quant": (
        {"eps": 0.5, "T": "float16"},
        {"weight_offset": -1.0, "quant_dtype": "int8"},
        {"weight": "float16", "scale_layout": "col_major_tma"},
    ),
    "gdn_in_proj": (
        {"strategy": "parallel", "bias_ba": "float16"},
        {"strategy": "fused", "bias_qkvz": "float32"},
        {"strategy": "merged", "bias_qkvz": "float32"},
    ),
    "segment_attention": (
        {"scale": 2.0, "T": "float16"},
        {"cu_seqlens": "int64", "T": "float32"},
        {"scale": 0.02, "cu_seqlens": "int64"},
    ),
    "gated_rms_norm": (
        {"eps": 0.5, "T": "float16"},
        {"eps": 0.5, "activation": "sigmoid"},
        {"weight_offset": -1.0, "T": "bfloat16"},
    ),
    "gated_delta_rule": (
        {"scale": 0.02, "state_pool": "float32"},
        {"scale": 2.0, "T": "float16"},
        {"state_pool": "float16", "state_indices": "int64"},
    ),
    "gdn_decode": (
        {"norm_eps": 0.5, "T": "float16"},
        {"scale": 0.7, "interleaved": True},
        {"num_accepted": "int64", "T": "bfloat16"},
    ),
}


def narrow(op: str) -> dict[str, Mutant]:
    """Wrong implementations of an op that are right in nearly all calls, by name."""
    found = {"past_1024_rows": _where(op, _all, _past_1024_rows)}
    for dtype in FLOATS:
        found[f"nan_lost_in_{dtype}"] = _where(op, _in(dtype), _nan_lost)
    found["float16_subnormals_flushed"] = _flushing(op)
    for values in TOGETHER.get(op, ()):
        name = "-".join(f"{name}_{value}" for name, value in values.items())
        found[f"wrong_for_{name}"] = _where(op, _having(values), _doubled)
    return found


def _where(op: str, chosen: Callable[[Call], bool], change: Callable[[Array], Array]) -> Mutant:
    """The op with its first result changed in some calls."""

    def mutant(**values: Any) -> tuple[Array, ...]:
        first, *others = right(op, values)
        return (change(first) if chosen(bind(OPS[op], values)) else first, *others)

    return mutant


def _all(call: Call) -> bool:
    return True


def _in(dtype: str) -> Callable[[Call], bool]:
    return lambda call: _dtypes(call)[call.op.tensors[0].name] == dtype


def _flushing(op: str) -> Mutant:
    """The op on arrays whose subnormal numbers of float16 are taken for zero."""

    def flushed(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or dtype_name(value.dtype) != "float16":
            return value
        return np.where(np.abs(to_f64(value)) < 2.0**-14, 0, value).astype(value.dtype)

    return lambda **values: right(op, {name: flushed(value) for name, value in values.items()})


def _having(values: Mapping[str, Any]) -> Callable[[Call], bool]:
    return lambda call: all(
        {**call.dtypes, **call.attrs, **_dtypes(call)}.get(n, values) == v for n, v in values.items()
    )


def _dtypes(call: Call) -> dict[str, str]:
    return {t.name: call.dtypes[t.dtype_var or t.name] for t in call.op.tensors if t.name in call.dtypes}


def _past_1024_rows(result: Array) -> Array:
    result[1024:] = 0
    return result


def _nan_lost(result: Array) -> Array:
    result[np.isnan(to_f64(result))] = 0
    return result


def _doubled(result: Array) -> Array:
    return round_to(2 * to_f64(result), dtype_name(result.dtype))
