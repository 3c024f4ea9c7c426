"""What is almost the op: left alone where its bits would change, and what `materialize=False` takes of it."""

import copy

import pytest
import torch
from torch.fx import Graph
from torch.nn.functional import silu

import polyfuse
from polyfuse.runtime.fusion._replace import fuse
from tests.runtime.fusion.graphs import (
    E4M3,
    D,
    Outputs,
    activated,
    by,
    halves_to,
    placed_calls,
    quantise,
    raw,
    rewrite,
    rows,
    run_changed,
    with_ratio,
    with_scale,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


LAST_BITS = {  # only their last bits differ from the op's
    "silu_of_a_widened_gate": halves_to(lambda gate, up: silu(gate.float()).to(gate.dtype) * up),
    "nothing_rounded": halves_to(lambda gate, up: silu(gate.float()) * up.float()),
    "product_not_rounded": halves_to(lambda gate, up: silu(gate).float() * up.float()),
    "x_widened": lambda x: quantise(activated(x.float())),
    "silu_written_out": lambda x: halves_to(lambda gate, up: gate * torch.sigmoid(gate) * up)(x.float()),
    "silu_written_with_exp": lambda x: halves_to(lambda gate, up: gate / (1 + torch.exp(-gate)) * up)(x.float()),
    "product_with_the_reciprocal": with_ratio(lambda y, scale: (y * (1.0 / scale)).to(E4M3)),
    "limit_in_bfloat16": halves_to(lambda gate, up: silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)),
    "logarithm_of_float32": lambda x: with_scale(lambda amax, scale: torch.exp2(scale.log2().ceil()))(x.float()),
}
ANOTHER_FUNCTION = {
    "up_first": halves_to(lambda up, gate: silu(gate) * up),
    "gelu": halves_to(lambda gate, up: torch.nn.functional.gelu(gate) * up),
    "silu_twice": halves_to(lambda gate, up: silu(silu(gate)) * up),
    "gate_squared": halves_to(lambda gate, up: silu(gate) * gate),
    "limits_differ": halves_to(lambda gate, up: silu(gate.clamp(max=0.5)) * up.clamp(-0.25, 0.5)),
    "gate_limited_below": halves_to(lambda gate, up: silu(gate.clamp(-0.5, 0.5)) * up.clamp(-0.5, 0.5)),
    "another_rounding": halves_to(lambda gate, up: (silu(gate) * up).to(torch.float16)),
    "gate_copied": halves_to(lambda gate, up: silu(gate.contiguous()) * up),
    "quarters": lambda x: quantise(silu(x[..., : D // 2]) * x[..., D // 2 : D]),
    "halves_of_the_rows": lambda x: quantise(silu(x.chunk(2)[0]) * x.chunk(2)[1]),
    "two_tensors": lambda x: quantise(silu(x[..., :D]) * (x + 1)[..., D:]),
    "not_absolute": lambda x: quantise(activated(x), activated(x).float().unflatten(-1, (-1, 128)).amax(-1)),
    "amax_of_another": lambda x: quantise(
        activated(x), activated(x + 1).float().unflatten(-1, (-1, 128)).abs().amax(-1)
    ),
    "groups_over_rows": lambda x: quantise(activated(x).view(-1, 128, 3).mT),
    "no_floor": with_scale(lambda amax, scale: amax / by(amax, 448.0)),
    "floor_below_normal": with_scale(lambda amax, scale: (amax / by(amax, 448.0)).clamp(min=1e-40)),
    "another_divisor": with_scale(lambda amax, scale: (amax / by(amax, 440.0)).clamp(min=1e-10)),
    "times_another_reciprocal": with_scale(lambda amax, scale: (amax * (1 / 440.0)).clamp(min=1e-10)),
    "reciprocal_of_another_dtype": with_scale(lambda amax, scale: (amax * (1 / 127.0)).clamp(min=1e-10)),
    "scale_rounded": with_scale(lambda amax, scale: scale.bfloat16().float()),
    "ceiling_for_infinity_too": with_scale(lambda amax, scale: (amax / by(amax, 448.0)).clamp(1e-10, 0.01)),
    "floor_after_power": with_scale(lambda amax, scale: torch.exp2(scale.log2().ceil()).clamp(min=1e-5)),
    "power_below": with_scale(lambda amax, scale: torch.exp2(scale.log2().floor())),
    "scale_added_to": with_scale(lambda amax, scale: scale + 1e-10),
    "clamped_narrowly": with_ratio(lambda y, scale: (y / scale).clamp(-400, 400).to(E4M3)),
    "truncated": with_ratio(lambda y, scale: (y / scale).to(torch.int8), 127.0),
    "rounded_first": with_ratio(lambda y, scale: (y / scale).round().to(E4M3)),
    "quotient_inverted": with_ratio(lambda y, scale: (scale / y).to(E4M3)),
    "not_quantised": with_ratio(lambda y, scale: (y / scale).half()),
}


@pytest.fixture(scope="module")
def matched() -> dict[bool, list[str]]:
    """By `materialize`, which functions are matched. They share a graph, and are told apart by their rows."""
    functions = LAST_BITS | ANOTHER_FUNCTION | {"usual": with_scale(lambda _, scale: scale)}
    inputs = [rows(6 * i) for i in range(1, len(functions) + 1)]
    found = {}

    def graph(*inputs: torch.Tensor) -> Outputs:
        return [function(x) for function, x in zip(functions.values(), inputs, strict=True)]

    def match(graph: Graph) -> None:
        for materialize in (True, False):
            twin = copy.deepcopy(graph)
            fuse(twin, materialize)
            numbers = [int(call["shape"][0]) // 6 - 1 for call in placed_calls(twin)]
            found[materialize] = [list(functions)[number] for number in numbers]

    with torch.no_grad():
        run_changed(graph, inputs, match, dynamic=False)
    return found


def test_what_the_op_does_not_compute_bit_for_bit_is_left_alone(matched: dict[bool, list[str]]) -> None:
    assert matched[True] == ["usual"]


def test_without_materialize_another_function_is_left_alone(matched: dict[bool, list[str]]) -> None:
    assert matched[False] == [*LAST_BITS, "usual"]


@pytest.mark.parametrize("name", LAST_BITS)
def test_without_materialize_last_bits_may_differ(name: str) -> None:
    x = rows(6)
    got = rewrite(LAST_BITS[name], x, materialize=False)
    options = {k: v for k, v in got.placed[0].items() if k not in ("shape", "dtype")}
    assert len(got.placed) == 1
    assert "materialize" not in options
    assert options.get("limit") == (0.5 if name.startswith("limit") else None)
    read = x.float() if name.startswith("logarithm") and got.placed[0]["dtype"] == "torch.float32" else x
    q, scale = polyfuse.silu_mul_block_quant(read, **options)
    assert torch.equal(raw(got.outputs[0]), raw(q))
    assert torch.equal(got.outputs[1].view(-1), scale.view(-1))
    want = LAST_BITS[name](x)
    torch.testing.assert_close(got.outputs[1], want[1], rtol=0.01, atol=0)
