"""What is almost an op: replaced as far as no bit changes, the reason, and what `materialize=False` takes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

import polyfuse
from tests.runtime.fusion.graphs import (
    E4M3,
    D,
    activated,
    assert_same_bits,
    by,
    halves_to,
    quantise,
    raw,
    rewrite,
    rows,
    with_ratio,
    with_scale,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

Case = tuple[Callable[[torch.Tensor], Any], str]


def in_float32(function: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    return lambda x: function(x.float())


def weighted(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    """`quantise` of y changed with a weight for each row."""
    return lambda x: quantise(change(activated(x), x[..., :1]))


SILU_ROUNDED = "silu(gate) is rounded to torch.float32, and not to torch.bfloat16"
WRITTEN_OUT = "silu is written out, not torch's own"

LAST_BITS: dict[str, Case] = {  # only their last bits differ from those of silu_mul_block_quant
    "nothing_rounded": (halves_to(lambda gate, up: silu(gate.float()) * up.float()), SILU_ROUNDED),
    "product_not_rounded": (
        halves_to(lambda gate, up: silu(gate).float() * up.float()),
        "the product is rounded to torch.float32, and not to torch.bfloat16",
    ),
    "x_widened": (in_float32(lambda x: quantise(activated(x))), SILU_ROUNDED),
    "silu_written_out_in_float32": (
        lambda x: quantise((x[..., :D].float() * torch.sigmoid(x[..., :D].float())).to(x.dtype) * x[..., D:]),
        "sigmoid(alpha * gate) is rounded to torch.float32, and not to torch.bfloat16",
    ),
    "silu_written_with_exp": (halves_to(lambda gate, up: gate / (1 + torch.exp(-gate)) * up), WRITTEN_OUT),
    "limits_in_float32": (
        halves_to(lambda gate, up: silu(gate.float().clamp(max=0.5)) * up.clamp(-0.5, 0.5)),
        SILU_ROUNDED,
    ),
    "alpha_times_gate_not_rounded": (
        halves_to(lambda gate, up: (gate * torch.sigmoid(gate.float() * 1.5).to(gate.dtype)) * up),
        "alpha * gate is rounded to torch.float32, and not to torch.bfloat16",
    ),
    "up_plus_what_bfloat16_has_not": (
        halves_to(lambda gate, up: silu(gate) * (up + 0.3)),
        "the number added to up is not one of torch.bfloat16, to which PyTorch rounds it on some devices",
    ),
    "weights_of_rows_in_float32": (
        weighted(lambda y, weight: y * weight.float()),
        "the product with the row's weight is rounded to torch.float32, and not to torch.bfloat16",
    ),
}
LAST_BITS_OF_THE_SCALE: dict[str, Case] = {
    "product_with_the_reciprocal": (
        with_ratio(lambda y, scale: (y * (1.0 / scale)).to(E4M3)),
        "y * (1 / scale) is not y / scale",
    ),
    "logarithm_of_float32": (
        in_float32(with_scale(lambda amax, scale: torch.exp2(scale.log2().ceil()))),
        "log2(scale) may round to the integer below it",
    ),
}
ANOTHER_ACTIVATION: dict[str, Case] = {  # of which only the quantisation is replaced
    "limits_differ": (
        halves_to(lambda gate, up: silu(gate.clamp(max=0.5)) * up.clamp(-0.25, 0.5)),
        "up is clamped to (-0.25, 0.5), and the gate clamped to at most 0.5",
    ),
    "only_the_gate_limited": (
        halves_to(lambda gate, up: silu(gate.clamp(max=0.5)) * up),
        "up is not clamped, and the gate clamped to at most 0.5",
    ),
    "only_up_limited": (
        halves_to(lambda gate, up: silu(gate) * up.clamp(-0.5, 0.5)),
        "up is clamped to (-0.5, 0.5), and the gate not clamped",
    ),
    "gate_limited_below": (
        halves_to(lambda gate, up: silu(gate.clamp(-0.5, 0.5)) * up.clamp(-0.5, 0.5)),
        "the gate is clamped from below",
    ),
    "gate_and_silu_limited": (
        halves_to(lambda gate, up: silu(gate.clamp(max=0.5)).clamp(max=0.5) * up.clamp(-0.5, 0.5)),
        "both the gate and silu(gate) are clamped",
    ),
    "limit_of_zero": (halves_to(lambda g, up: silu(g.clamp(max=0.0)) * up.clamp(-0.0, 0.0)), "the limit is not > 0"),
    "silu_with_alpha_limited": (
        halves_to(lambda gate, up: (gate * torch.sigmoid(1.5 * gate)).clamp(max=0.5) * up.clamp(-0.5, 0.5)),
        "silu is clamped, and its sigmoid is rounded or has an alpha",
    ),
    "rounded_on": (
        halves_to(lambda gate, up: (silu(gate) * up).to(torch.float16)),
        "silu(gate) * up is rounded to torch.float16",
    ),
    "without_up": (halves_to(lambda gate, up: silu(gate)), "silu(gate) is not multiplied by an up"),
    "added_to": (lambda x: quantise(activated(x) + x[..., :D]), "silu(gate) * up goes through aten.add"),
    "weight_before_up": (
        lambda x: quantise(silu(x[..., :D]) * x[..., :1] * x[..., D:]),
        "silu(gate) goes through aten.mul",
    ),
    "rows_in_another_order": (lambda x: quantise(activated(x).flip(0)), ""),  # no element-wise operation
    "weights_of_columns": (lambda x: quantise(activated(x) * x[0, :D]), "silu(gate) * up goes through aten.mul"),
    "up_for_all_rows": (lambda x: quantise(silu(x[..., :D]) * x[:1, D:]), "silu(gate) goes through aten.mul"),
    "gate_and_sigmoid_of_all_pairs_of_rows": (
        lambda x: quantise((x[:, None, :D] * torch.sigmoid(x[:, :D])).flatten(0, 1)),
        "",
    ),
    "infinite_numbers": (
        halves_to(lambda g, up: (g * torch.sigmoid(torch.inf * g)).clamp(-1, 1) * (up + torch.inf).clamp(-1, 1)),
        "",
    ),
    "other_dtypes": (
        lambda x: quantise((silu(x[..., :D]) * x[..., D:].to(torch.float16)).to(x.dtype)),
        "gate and up have not the dtype and the rows of one another, or of y",
    ),
}
NOT_GROUPS = "amax is not that of groups of columns, the last dimension of a view of y"
NO_FLOOR = "the scale has no lower bound, or one outside the normal float32 range"
UNSCALED = "what becomes float8_e4m3fn is not divided by a scale of groups of its columns"
ANOTHER_QUANTISATION: dict[str, Case] = {  # of which nothing is replaced
    "not_absolute": (
        lambda x: quantise(activated(x), activated(x).float().unflatten(-1, (-1, 128)).amax(-1)),
        "the scale is made from the largest y, and not from the largest |y|",
    ),
    "amax_of_another": (
        lambda x: quantise(activated(x), activated(x + 1).float().unflatten(-1, (-1, 128)).abs().amax(-1)),
        "a tensor is divided by the scale of another one, or of itself in another rounding",
    ),
    "one_scale_for_a_row_of_groups": (
        lambda x: quantise(x, x.float().unflatten(-1, (-1, 128)).abs().amax((-1, -2), keepdim=True)[..., 0]),
        NOT_GROUPS,
    ),
    "one_scale_for_a_column": (lambda x: (x / (x.float().abs().amax(0) / 448.0).clamp(min=1e-10)).to(E4M3), NOT_GROUPS),
    "groups_over_rows": (lambda x: quantise(activated(x).view(-1, 128, 3).mT), "q is not contiguous"),
    "one_row_of_one_dimension": (
        lambda x: (x[0] / (x[0].float().abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-10)).to(E4M3),
        "y is not known to be rows of whole groups",
    ),
    "no_floor": (with_scale(lambda amax, scale: amax / by(amax, 448.0)), NO_FLOOR),
    "floor_below_normal": (with_scale(lambda amax, scale: (amax / by(amax, 448.0)).clamp(min=1e-40)), NO_FLOOR),
    "another_divisor": (
        with_scale(lambda amax, scale: (amax / by(amax, 440.0)).clamp(min=1e-10)),
        "amax is divided by 440, which is not 448 for float8_e4m3fn",
    ),
    "times_another_reciprocal": (
        with_scale(lambda amax, scale: (amax * (1 / 440.0)).clamp(min=1e-10)),
        "the scale, or what it is made from, goes through aten.mul",
    ),
    "reciprocal_of_another_dtype": (
        with_scale(lambda amax, scale: (amax * (1 / 127.0)).clamp(min=1e-10)),
        "amax is divided by 127, which is not 448 for float8_e4m3fn",
    ),
    "scale_rounded": (with_scale(lambda _, scale: scale.bfloat16().float()), "the scale is rounded to torch.bfloat16"),
    "ceiling_for_infinity_too": (
        with_scale(lambda amax, scale: (amax / by(amax, 448.0)).clamp(1e-10, 0.01)),
        "the upper bound of the scale also bounds an infinite one, which scale_ub does not",
    ),
    "ceiling_only": (
        with_scale(lambda amax, scale: (amax / by(amax, 448.0)).clamp(max=0.01)),
        "the upper bound of the scale also bounds an infinite one, which scale_ub does not",
    ),
    "ceiling_below_zero": (
        with_scale(lambda amax, scale: torch.where(scale == torch.inf, scale, scale.clamp(max=-1.0))),
        "the scale, or what it is made from, goes through aten.where",
    ),
    "floor_after_power": (
        with_scale(lambda amax, scale: torch.exp2(scale.log2().ceil()).clamp(min=1e-5)),
        "the scale is bounded after it was rounded to a power of two",
    ),
    "power_below": (
        with_scale(lambda amax, scale: torch.exp2(scale.log2().floor())),
        "the scale, or what it is made from, goes through aten.floor",
    ),
    "scale_added_to": (
        with_scale(lambda amax, scale: scale + 1e-10),
        "the scale, or what it is made from, goes through aten.add",
    ),
    "divided_by_amax": (with_scale(lambda amax, scale: amax), "y is divided by amax itself"),
    "clamped_narrowly": (
        with_ratio(lambda y, scale: (y / scale).clamp(-400, 400).to(E4M3)),
        "y / scale is not clamped to (-448.0, 448.0)",
    ),
    "truncated": (
        with_ratio(lambda y, scale: (y / scale).to(torch.int8), 127.0),
        "y / scale is not rounded as int8 needs it",
    ),
    "rounded_first": (
        with_ratio(lambda y, scale: (y / scale).round().to(E4M3)),
        "y / scale is not rounded as float8_e4m3fn needs it",
    ),
    "rounded_to_bfloat16_first": (
        with_ratio(lambda y, scale: (y / scale).bfloat16().to(E4M3)),
        "y / scale is rounded to torch.bfloat16",
    ),
    "divided_in_bfloat16": (
        with_ratio(lambda y, scale: (y.bfloat16() / scale.bfloat16()).to(E4M3)),
        "the scale is rounded to torch.bfloat16",
    ),
    "quotient_inverted": (
        with_ratio(lambda y, scale: (scale / y).to(E4M3)),
        "the scale, or what it is made from, goes through aten.div",
    ),
    "one_scale_for_all": (lambda x: (x.float() / 0.25).clamp(-448, 448).to(E4M3), UNSCALED),
    "without_a_scale": (lambda x: gelu(x).to(E4M3), UNSCALED),
    "not_quantised": (with_ratio(lambda y, scale: (y / scale).half()), ""),
    "integers": (lambda x: (x > 0).to(torch.int8), ""),
}


def ops(placed: list[dict[str, Any]]) -> list[str]:
    return [call["op"] for call in placed]


def outputs(results: Any) -> list[torch.Tensor]:
    return [*results] if isinstance(results, tuple) else [results]


def check(case: Case, materialize: bool, placed: list[str], reasons: list[str]) -> None:
    """What is placed and why not more; the outputs are the eager ones to the bit."""
    function, x = case[0], rows(6)
    got = rewrite(function, x, materialize=materialize)
    assert (ops(got.placed), got.reasons) == (placed, reasons)
    assert_same_bits(outputs(got.outputs), outputs(function(x)))


@pytest.mark.parametrize("name", LAST_BITS)
def test_where_last_bits_would_differ_only_the_quantisation_is_replaced(name: str) -> None:
    check(LAST_BITS[name], True, ["block_quant"], [f"silu_mul_block_quant: {LAST_BITS[name][1]}"])


@pytest.mark.parametrize("name", LAST_BITS_OF_THE_SCALE)
def test_where_last_bits_of_the_quantisation_would_differ_nothing_is_replaced(name: str) -> None:
    check(LAST_BITS_OF_THE_SCALE[name], True, [], [LAST_BITS_OF_THE_SCALE[name][1]])


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("name", ANOTHER_ACTIVATION)
def test_of_another_activation_only_the_quantisation_is_replaced(name: str, materialize: bool) -> None:
    reason = ANOTHER_ACTIVATION[name][1]
    reasons = [f"silu_mul_block_quant: {reason}"] if reason else []
    check(ANOTHER_ACTIVATION[name], materialize, ["block_quant"], reasons)


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("name", ANOTHER_QUANTISATION)
def test_another_quantisation_is_left_alone(name: str, materialize: bool) -> None:
    reason = ANOTHER_QUANTISATION[name][1]
    check(ANOTHER_QUANTISATION[name], materialize, [], [reason] if reason else [])


WITHOUT_MATERIALIZE = LAST_BITS | LAST_BITS_OF_THE_SCALE
OPTIONS = {
    "limits_in_float32": {"limit": 0.5},
    "alpha_times_gate_not_rounded": {"alpha": 1.5},
    "up_plus_what_bfloat16_has_not": {"up_offset": float(torch.tensor(0.3))},
}


@pytest.mark.parametrize("name", WITHOUT_MATERIALIZE)
def test_without_materialize_last_bits_may_differ(name: str) -> None:
    function, x = WITHOUT_MATERIALIZE[name][0], rows(6)
    got = rewrite(function, x, materialize=False)
    ((found,), reasons) = (got.placed, got.reasons)
    assert (found["op"], reasons) == ("silu_mul_block_quant", [])
    options = {k: v for k, v in found.items() if k not in ("op", "shape", "dtype", "tensors")}
    assert {k: options.get(k) for k in ("limit", "alpha", "up_offset") if k in options} == OPTIONS.get(name, {})
    assert "materialize" not in options
    weight = x[..., 0] if "tensors" in found else None
    read = x.float() if found["dtype"] == "torch.float32" else x
    q, scale = polyfuse.silu_mul_block_quant(read, row_weight=weight, **options)
    assert torch.equal(raw(got.outputs[0]), raw(q))
    assert torch.equal(got.outputs[1].view(-1), scale.view(-1))
    torch.testing.assert_close(got.outputs[1], function(x)[1], rtol=0.02, atol=0)  # a few roundings of 2**-9
