"""Wrong implementations that the tolerances must reject, per op: a bound that lets one pass is too wide.

Each is a variation of the op in NumPy that makes one mistake a kernel author could make. A mutant takes the op's
parameters by name and returns what the op would.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.reference import gdn_conv_prep, gdn_post_conv, pos_embed_interpolate, silu_mul_block_quant
from polyfuse.reference._numerics import numpy_dtype, round_to, to_f64
from polyfuse.spec import OPS, bind, dtype_name
from polyfuse.spec.silu_mul_block_quant import QMAX

Mutant = Callable[..., Any]


def _right(op: str, values: dict[str, Any]) -> tuple[Any, ...]:
    result = getattr(import_module(f"polyfuse.reference.{op}"), op)(**values)
    return tuple(r.copy() for r in result) if isinstance(result, tuple) else (result,)


def _zeros(op: str, **values: Any) -> Any:
    return tuple(np.zeros_like(r) for r in _right(op, values))


def _constant(op: str, **values: Any) -> Any:
    return tuple(np.full_like(r, r.reshape(-1)[0] if r.size else 0) for r in _right(op, values))


def _last_row_dropped(op: str, **values: Any) -> Any:
    results = _right(op, values)
    for r in results:
        r[-1:] = 0
    return results


def _one_precision_lower(op: str, **values: Any) -> Any:
    """Every floating result passes through the next narrower dtype."""
    narrower = {"float32": "float16", "float16": "bfloat16", "bfloat16": "float8_e5m2"}
    exact = import_module(f"polyfuse.reference.{op}").exact(**values)
    results = []
    for output in bind(OPS[op], values).outputs:
        value = exact[output.name].value
        if output.dtype in narrower and not exact[output.name].as_bytes:
            low = numpy_dtype(narrower[output.dtype])
            with np.errstate(over="ignore", invalid="ignore"):
                value = to_f64(value.astype(np.float32).astype(low))
            results.append(round_to(value, output.dtype))
        else:
            results.append(_right(op, values)[len(results)])
    return tuple(results)


COMMON = (_zeros, _constant, _last_row_dropped, _one_precision_lower)


def _changed(op: str, change: Callable[[dict[str, Any]], dict[str, Any]], **values: Any) -> Any:
    """The op on other arguments."""
    return _right(op, {**values, **change(values)})


def _patched(op: str, module: Any, name: str, make: Callable[[Any], Any], **values: Any) -> Any:
    """The op with another function in place of one of the oracle's."""
    right = getattr(module, name)
    setattr(module, name, make(right))
    try:
        return _right(op, values)
    finally:
        setattr(module, name, right)


# pos_embed_interpolate


def _weights_in_bfloat16(right: Any) -> Any:
    def taps(*args: Any) -> Any:
        cells, weights = right(*args)
        return cells, to_f64(round_to(weights, "bfloat16"))

    return taps


def _float_scale(right: Any) -> Any:
    """The source coordinate as index times a scale rounded to float32."""

    def taps(index: Any, size: int, side: int, mode: str, align_corners: bool) -> Any:
        if mode != "bilinear" or not align_corners:
            return right(index, size, side, mode, align_corners)
        source = index.astype(np.float32) * np.float32((side - 1) / max(size - 1, 1))
        cell = np.floor(source).astype(np.int64)
        f = (source - cell).astype(np.float64)
        return np.clip(cell[:, None] + np.array([0, 1]), 0, side - 1), np.stack([1 - f, f], axis=1)

    return taps


def _rounded_before_base(**values: Any) -> Any:
    """Two roundings: the interpolated rows, then their sum with base."""
    rows = pos_embed_interpolate.exact(**{**values, "base": None, "out_dtype": None})["out"].value
    dtype = bind(OPS["pos_embed_interpolate"], values).outputs[0].dtype
    rows = to_f64(round_to(rows, dtype))
    return round_to(rows if values["base"] is None else rows + to_f64(values["base"]), dtype)


# gdn_post_conv


def _norm_with(norm: Callable[[Any, float], Any]) -> Callable[[Any], Any]:
    def make(right: Any) -> Any:
        def normalised(x: Any, eps: float, steps: float) -> Any:
            with np.errstate(divide="ignore", invalid="ignore"):
                value = x / norm(x, eps)
            return type(right(x, eps, steps)).around(value, np.zeros_like(value))

        return normalised

    return make


def _length(x: Any) -> Any:
    return np.sqrt((x * x).sum(-1, keepdims=True))


def _naive_softplus(right: Any) -> Any:
    def softplus(x: Any) -> Any:
        with np.errstate(over="ignore"):
            return to_f64(np.log(np.float32(1) + np.exp(x.astype(np.float32))))

    return softplus


# gdn_conv_prep


def _rounded_before_the_norm(**values: Any) -> Any:
    """The conv and its SiLU as one kernel, what follows as another."""
    *parts, g, beta, state = _right("gdn_conv_prep", {**values, "l2norm": False})
    rows = np.concatenate([part.reshape(len(part), int(np.prod(part.shape[1:]))) for part in parts], axis=1)
    heads = ("num_k_heads", "head_k_dim", "head_v_dim", "l2norm", "l2norm_eps")
    gates = {name: values[name] for name in ("a", "b", "A_log", "dt_bias")}
    q, k, v, *_ = _right("gdn_post_conv", {"conv_out": rows, **gates, **{name: values[name] for name in heads}})
    return q, k, v, g, beta, state


def _oldest_tap_dropped(values: dict[str, Any]) -> dict[str, Any]:
    weight = values["weight"].copy()
    weight[:, 0] = 0
    return {"weight": weight}


def _one_sequence(right: Any) -> Any:
    return lambda x, state, row, starts, width: right(x, state, 0 * row, 0 * starts, width)


def _newest_first(values: dict[str, Any]) -> dict[str, Any]:
    state = values["initial_state"]
    return {"initial_state": None if state is None else state[..., ::-1]}


# silu_mul_block_quant


def _results_changed(change: Callable[[Any, Any], tuple[Any, Any]], **values: Any) -> Any:
    return change(*_right("silu_mul_block_quant", values))


def _scale_of_the_next_group(q: Any, scale: Any) -> tuple[Any, Any]:
    return q, np.roll(scale, 1, axis=-1)


def _scale_transposed(q: Any, scale: Any) -> tuple[Any, Any]:
    return q, np.ascontiguousarray(np.moveaxis(scale, -1, 0)).reshape(scale.shape)


def _packed_in_reverse(q: Any, scale: Any) -> tuple[Any, Any]:
    return q, scale.byteswap() if scale.dtype == np.int32 else scale


def _nan_saturates(q: Any, scale: Any) -> tuple[Any, Any]:
    """A maximum that skips NaN, and a cast that saturates it."""
    nan = np.isnan(to_f64(q))
    q[nan] = np.float32(QMAX.get(dtype_name(q.dtype), 0)).astype(q.dtype)
    return q, scale


def _truncating(right: Any) -> Any:
    def quantised(*args: Any) -> Any:
        exact = right(*args)
        grid = np.float64(2) ** (np.frexp(exact.value)[1] - 4)
        value = np.trunc(exact.value / grid) * grid
        return type(exact)(value, value, value)

    return quantised


def _quantised_with_unrounded_scale(right: Any) -> Any:
    def quantised(y: Any, scale: Any, group: int, qmax: float, integer: bool) -> Any:
        amax = np.abs(y[0].reshape(*scale[0].shape, group)).max(-1)
        return right(y, (np.maximum(amax / qmax, scale[0] / 2),) * 3, group, qmax, integer)

    return quantised


def _rounded_down(right: Any) -> Any:
    return lambda scale: np.where(np.isfinite(scale), right(scale) / 2, scale)


# gdn_in_proj


def _tail_dropped(values: dict[str, Any]) -> dict[str, Any]:
    x = values["x"].copy()
    x[..., -x.shape[-1] // 8 :] = 0
    return {"x": x}


def _bias_after_rounding(**values: Any) -> Any:
    both = _right("gdn_in_proj", {**values, "bias_qkvz": None, "bias_ba": None})
    biases = (values["bias_qkvz"], values["bias_ba"])
    dtype = dtype_name(values["x"].dtype)
    pairs = zip(both, biases, strict=True)
    return tuple(r if b is None else round_to(to_f64(r) + to_f64(b), dtype) for r, b in pairs)


def _sums_in_bfloat16(**values: Any) -> Any:
    results = []
    for name in ("w_qkvz", "w_ba"):
        total = np.zeros((*values["x"].shape[:-1], len(values[name])), np.float32)
        for k in range(0, values["x"].shape[-1], 16):
            part = to_f64(values["x"][..., k : k + 16]) @ to_f64(values[name][:, k : k + 16]).T
            total = (total + part).astype(ml_dtypes.bfloat16).astype(np.float32)
        results.append(total.astype(values["x"].dtype))
    return tuple(results)


def _named(op: str, **mutants: Mutant) -> dict[str, Mutant]:
    return {f.__name__.lstrip("_"): partial(f, op) for f in COMMON} | mutants


def _patch(op: str, module: Any, name: str, make: Callable[[Any], Any]) -> Mutant:
    return partial(_patched, op, module, name, make)


def _change(op: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Mutant:
    return partial(_changed, op, change)


_POS, _POST, _CONV, _SILU, _PROJ = OPS

MUTANTS: dict[str, dict[str, Mutant]] = {
    _POS: _named(
        _POS,
        rounded_before_base=_rounded_before_base,
        weights_in_bfloat16=_patch(_POS, pos_embed_interpolate, "axis_taps", _weights_in_bfloat16),
        float_scale=_patch(_POS, pos_embed_interpolate, "axis_taps", _float_scale),
        other_corners=_change(_POS, lambda v: {"align_corners": not v["align_corners"]}),
        other_mode=_change(_POS, lambda v: {"mode": "bicubic" if v["mode"] == "bilinear" else "bilinear"}),
        raster_order=_change(_POS, lambda v: {"merge_size": 1}),
        height_and_width_swapped=_change(_POS, lambda v: {"grid_thw": [(t, w, h) for t, h, w in v["grid_thw"]]}),
    ),
    _POST: _named(
        _POST,
        eps_outside_the_root=_patch(_POST, gdn_post_conv, "_normalised", _norm_with(lambda x, eps: _length(x) + eps)),
        eps_as_a_floor=_patch(
            _POST, gdn_post_conv, "_normalised", _norm_with(lambda x, eps: np.maximum(_length(x), eps))
        ),
        mean_for_sum=_patch(
            _POST,
            gdn_post_conv,
            "_normalised",
            _norm_with(lambda x, eps: np.sqrt((x * x).mean(-1, keepdims=True) + eps)),
        ),
        naive_softplus=_patch(_POST, gdn_post_conv, "softplus", _naive_softplus),
        dt_bias_dropped=_change(_POST, lambda v: {"dt_bias": np.zeros_like(v["dt_bias"])}),
        a_and_b_swapped=_change(_POST, lambda v: {"a": v["b"], "b": v["a"]}),
        g_exp_ignored=_change(_POST, lambda v: {"output_g_exp": False}),
        q_and_k_swapped=lambda **v: (lambda q, k, *rest: (k, q, *rest))(*_right(_POST, v)),
    ),
    _CONV: _named(
        _CONV,
        state_leaks_across_sequences=_patch(_CONV, gdn_conv_prep, "windows", _one_sequence),
        initial_state_ignored=_change(_CONV, lambda v: {"initial_state": None}),
        initial_state_newest_first=_change(_CONV, _newest_first),
        final_state_without_the_initial_one=_patch(
            _CONV, gdn_conv_prep, "final_state", lambda right: lambda x, state, *rest: right(x, None, *rest)
        ),
        final_state_one_row_early=_patch(
            _CONV, gdn_conv_prep, "final_state", lambda right: lambda x, *rest: right(np.roll(x, 1, axis=0), *rest)
        ),
        taps_reversed=_change(_CONV, lambda v: {"weight": v["weight"][:, ::-1]}),
        oldest_tap_dropped=_change(_CONV, _oldest_tap_dropped),
        bias_dropped=_change(_CONV, lambda v: {"bias": None}),
        silu_dropped=_patch(_CONV, gdn_conv_prep, "sigmoid", lambda right: np.ones_like),
        rounded_before_the_norm=_rounded_before_the_norm,
        l2norm_ignored=_change(_CONV, lambda v: {"l2norm": False}),
        dt_bias_dropped=_change(_CONV, lambda v: {"dt_bias": np.zeros_like(v["dt_bias"])}),
        a_and_b_swapped=_change(_CONV, lambda v: {"a": v["b"], "b": v["a"]}),
    ),
    _SILU: _named(
        _SILU,
        scale_of_the_next_group=partial(_results_changed, _scale_of_the_next_group),
        scale_transposed=partial(_results_changed, _scale_transposed),
        packed_in_reverse=partial(_results_changed, _packed_in_reverse),
        nan_saturates=partial(_results_changed, _nan_saturates),
        truncated=_patch(_SILU, silu_mul_block_quant, "_quantised", _truncating),
        unrounded_scale_used=_patch(_SILU, silu_mul_block_quant, "_quantised", _quantised_with_unrounded_scale),
        scale_rounded_down=_patch(_SILU, silu_mul_block_quant, "power_of_two_above", _rounded_down),
        no_scale_floor=_patch(_SILU, silu_mul_block_quant, "scale_floor", lambda right: lambda *_: 1e-30),
        gate_and_up_swapped=_change(_SILU, lambda v: {"x": np.roll(v["x"], v["x"].shape[-1] // 2, axis=-1)}),
        limit_ignored=_change(_SILU, lambda v: {"limit": None}),
        scale_ub_ignored=_change(_SILU, lambda v: {"scale_ub": None}),
        scale_min_ignored=_change(_SILU, lambda v: {"scale_min": None}),
        zero_scale_min_raised=_change(_SILU, lambda v: {"scale_min": 1e-12 if v["scale_min"] == 0 else v["scale_min"]}),
        always_materialized=_change(_SILU, lambda v: {"materialize": True}),
        never_materialized=_change(_SILU, lambda v: {"materialize": False}),
        reciprocal_ignored=_change(_SILU, lambda v: {"reciprocal": False}),
    ),
    _PROJ: _named(
        _PROJ,
        tail_dropped=_change(_PROJ, _tail_dropped),
        bias_dropped=_change(_PROJ, lambda v: {"bias_qkvz": None, "bias_ba": None}),
        bias_after_rounding=_bias_after_rounding,
        sums_in_bfloat16=_sums_in_bfloat16,
    ),
}
