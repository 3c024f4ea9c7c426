"""Where tensors come from and what else a graph does: gate and up from anywhere, symbolic widths, chains of norms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.nn.functional import silu

import polyfuse
from polyfuse.runtime import fusion
from polyfuse.runtime.fusion._calls import ROUNDED_SIGMOID
from polyfuse.runtime.fusion._replace import fuse
from tests.runtime.fusion.graphs import (
    DEVICE,
    DTYPES,
    D,
    activated,
    assert_same_bits,
    changed,
    halves_to,
    quantise,
    raw,
    rewrite,
    rows,
    run_changed,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

ANYWHERE: dict[str, tuple[Callable[[torch.Tensor], Any], list[str]]] = {
    "quarters": (lambda x: quantise(silu(x[..., : D // 2]) * x[..., D // 2 : D]), ["up"]),
    "halves_of_the_rows": (lambda x: quantise(silu(x.chunk(2)[0]) * x.chunk(2)[1]), ["up"]),
    "one_tensor_twice": (lambda x: quantise(silu(x) * x), ["up"]),
    "silu_of_silu": (lambda x: quantise(silu(silu(x)) * x), ["up"]),
    "silu_of_a_scaled_gate": (lambda x: quantise(silu(x * x.float().mean(-1, True).to(x.dtype)) * x), ["up"]),
    "up_is_a_silu": (lambda x: quantise(silu(x) * silu(x + 1)), ["up"]),
    "clamped_beforehand": (lambda x: quantise(activated(x.clamp(-0.5, 0.5))), []),
    "gate_copied": (halves_to(lambda gate, up: silu(gate.contiguous()) * up), []),
    "gate_copied_in_rows": (lambda x: quantise(silu(x.flip(0)[:, :D].clone()) * x[:, D:]), ["up"]),
    "flattened": (lambda x: quantise((silu(x[:, :D]) * x[:, D:]).view(2, 3, D)), []),
    "unflattened": (lambda x: quantise(activated(x.view(2, 3, 2 * D)).flatten(0, 1)), []),
    "scalar_weight_for_each_row": (lambda x: quantise(activated(x) * x[:, :1].abs()), ["row_weight"]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ANYWHERE)
def test_gate_and_up_come_from_anywhere(name: str, dtype: torch.dtype) -> None:
    function, tensors = ANYWHERE[name]
    x = rows(6, dtype=dtype)
    got = rewrite(function, x)
    assert got.reasons == []
    (found,) = got.placed
    assert found["op"] == "silu_mul_block_quant"
    copied = name == "gate_copied" and dtype is torch.float32  # on a CPU the last bit of silu depends on the place
    assert found.get("tensors", []) == (["up"] if copied else tensors)
    assert_same_bits(got.outputs, function(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_a_widened_gate_is_that_of_the_gate(dtype: torch.dtype) -> None:
    function = halves_to(lambda gate, up: silu(gate.float()).to(gate.dtype) * up)
    x = rows(6, dtype=dtype)
    got = rewrite(function, x)
    assert [found["op"] for found in got.placed] == ["silu_mul_block_quant"]
    assert_same_bits(got.outputs, function(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_pass_relies_on_holds_for_every_16_bit_number(dtype: torch.dtype) -> None:
    """Rounded to 16 bits, silu and sigmoid do not depend on the place in memory or on the dtype of their argument; and
    the alpha with which the op rounds the sigmoid leaves each gate as it is."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    apart = torch.zeros(len(gate), 3, dtype=dtype, device=DEVICE)
    apart[:, 0] = gate
    for function in (silu, torch.sigmoid):
        for other in (function(apart[:, 0]), function(gate.float()).to(dtype), function(apart.float()[:, 0]).to(dtype)):
            torch.testing.assert_close(function(gate), other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close((gate.float() * ROUNDED_SIGMOID).to(dtype), gate, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close((gate.float() * 1.702).to(dtype), gate * 1.702, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_alpha_of_one_is_none(dtype: torch.dtype) -> None:
    function = halves_to(lambda gate, up: gate * torch.sigmoid(1.0 * gate) * up)
    x = rows(64, dtype=dtype)
    got = rewrite(function, x)
    (found,) = got.placed
    wide = dtype is torch.float32
    assert (found["op"], found.get("alpha")) == (
        ("block_quant", None) if wide else ("silu_mul_block_quant", ROUNDED_SIGMOID)
    )
    assert got.reasons == ["silu_mul_block_quant: silu is written out, not torch's own"] * wide
    assert_same_bits(got.outputs, function(x))


def test_zero_added_to_a_negative_zero_is_kept() -> None:
    function = halves_to(lambda gate, up: silu(gate) * (up + 0.0))
    x = rows(6)
    x[:, D : D + 9] = -0.0
    got = rewrite(function, x)
    assert [(found["op"], found.get("tensors")) for found in got.placed] == [("silu_mul_block_quant", ["up"])]
    assert_same_bits(got.outputs, function(x))


SPECIAL: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "written_out": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "gpt_oss": lambda gate, up: (up.clamp(-7, 7) + 1) * (gate.clamp(max=7) * torch.sigmoid(gate.clamp(max=7) * 1.702)),
    "limit_on_silu": lambda gate, up: silu(gate).clamp(max=7) * up.clamp(-7, 7),
    "up_alone": lambda gate, up: up,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_nan_infinity_and_zeros_go_the_same_way(name: str) -> None:
    function = halves_to(SPECIAL[name])
    x = rows(9)
    x[0], x[1], x[2] = 0, x[1] * 1e-6, x[2] * 1e30
    x[3, 5], x[4, D + 5] = torch.nan, torch.nan
    x[5, 5], x[6, 5], x[7, D + 5], x[8, D + 200] = torch.inf, -torch.inf, torch.inf, -torch.inf
    got = rewrite(function, x)
    assert len(got.placed) == 1
    want = function(x)
    is_nan = want[0].float().isnan()
    assert torch.equal(got.outputs[0].float().isnan(), is_nan)
    assert torch.equal(raw(got.outputs[0])[~is_nan], raw(want[0])[~is_nan])
    torch.testing.assert_close(got.outputs[1], want[1], rtol=0, atol=0, equal_nan=True)


WIDTHS: dict[str, Callable[[torch.Tensor], Any]] = {
    "chunks": lambda x: quantise(activated(x)),
    "slices": lambda x: quantise(silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]),
    "swapped": lambda x: quantise(silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0]),
    "two_tensors": lambda x: quantise(silu(x + 1) * x),
    "block_quant": lambda x: quantise(x * 2),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_one_graph_for_several_widths(name: str) -> None:
    """The width is symbolic, and so is the number of rows."""
    placed: list[Any] = []

    def change(graph: Graph) -> None:
        placed.append(fuse(graph, True))

    inputs = [torch.cat([rows(n)] * copies, -1) for n, copies in ((5, 2), (6, 3), (3, 1))]
    for dim in range(2):
        torch._dynamo.mark_dynamic(inputs[0], dim)
    compiled = changed(WIDTHS[name], change, dynamic=True)
    for x in inputs:
        assert_same_bits(compiled(x), WIDTHS[name](x))
    ((matches, near_misses),) = placed
    assert [match.op for match in matches] == ["block_quant" if name == "block_quant" else "silu_mul_block_quant"]
    assert near_misses == []


def test_reading_a_long_chain_of_products_takes_no_time() -> None:
    """Each of them has the one before it twice."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for _ in range(30):
            x = silu(x) * x
        return quantise(x)

    x = rows(2)
    got = rewrite(function, x)
    assert [found["op"] for found in got.placed] == ["silu_mul_block_quant"]
    assert_same_bits(got.outputs, function(x))


def norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def test_a_chain_of_norms_hands_on_its_sums() -> None:
    """Each sum is the op's result; none is computed twice."""
    x, weight = rows(6), torch.linspace(0.5, 2.0, 2 * D, device=DEVICE).bfloat16()
    adds: list[int] = []

    def function(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        first = x + x.flip(0)
        second = first + x.flip(-1)
        return [*quantise(norm(first, weight)), *quantise(norm(second, weight)), first, second, norm(second, weight)]

    def change(graph: Graph) -> None:
        fuse(graph, False)
        adds.append(sum(n.target is torch.ops.aten.add.Tensor and len(n.meta["val"].shape) == 2 for n in graph.nodes))

    got = run_changed(function, (x, weight), change, dynamic=False)
    one, other = x.flip(0), x.flip(-1)
    floor = float(torch.tensor(1e-10))
    first = polyfuse.rms_norm_block_quant(x, weight, residual=one, scale_min=floor)
    second = polyfuse.rms_norm_block_quant(first[2], weight, residual=other, scale_min=floor)
    assert_same_bits(got, [*first[:2], *second[:2], first[2], second[2], norm(second[2], weight)])
    assert adds == [1]  # of eps to the mean, in the norm that is used beside its quantisation


def test_a_sum_that_is_there_before_the_weight_is_left_in_its_place() -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        total = x + x.flip(0)
        return [*quantise(norm(total, weight.exp())), total]

    x, weight = rows(6), torch.zeros(2 * D, device=DEVICE).bfloat16()
    got = rewrite(function, x, weight, materialize=False)
    assert [found["op"] for found in got.placed] == ["rms_norm_block_quant"]
    want = polyfuse.rms_norm_block_quant(x, weight.exp(), residual=x.flip(0), scale_min=float(torch.tensor(1e-10)))
    assert_same_bits(got.outputs, want)


NORM = "rms_norm_block_quant: "
OTHER_NORMS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "weights_for_each_element": (lambda x: quantise(norm(x, x)), NORM + "a normalised row goes through aten.mul"),
    "weights_of_two_dimensions": (lambda x: quantise(norm(x, x[:1])), NORM + "the weights are not one for each column"),
    "of_other_rows": (
        lambda x: quantise(norm(x.view(-1, 64), x[0, :64]).view(6, -1)),
        NORM + "the rows that are normalised are not those of y",
    ),
    "eps_of_zero": (
        lambda x: quantise(x[0] * (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 0.0)).to(x.dtype)),
        NORM + "eps is not a float32 > 0",
    ),
    "rounded_to_float16": (
        lambda x: quantise(norm(x, x[0]).float().to(torch.float16)),
        NORM + "a normalised row is rounded to torch.float16",
    ),
    "with_a_bias": (lambda x: quantise(norm(x, x[0]) + x[1]), NORM + "a normalised row goes through aten.add"),
    "without_weights": (
        lambda x: quantise((x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 1e-6)).to(x.dtype)),
        NORM + "the normalised rows have no weight",
    ),
}


@pytest.mark.parametrize("name", OTHER_NORMS)
def test_of_another_norm_only_the_quantisation_is_replaced(name: str) -> None:
    function, reason = OTHER_NORMS[name]
    x = rows(6)
    got = rewrite(function, x, materialize=False)
    assert [found["op"] for found in got.placed] == ["block_quant"]
    assert got.reasons == [reason]
    assert_same_bits(got.outputs, function(x))


def test_a_sum_in_float32_is_normalised_as_it_is() -> None:
    """The op rounds a sum to the dtype of its terms, which here are those that were widened."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x.float() + x.flip(0).float()
        return quantise(norm(total, x[0].float()))

    x = rows(6)
    got = rewrite(function, x, materialize=False)
    (found,) = got.placed
    assert (found["op"], found["dtype"]) == ("rms_norm_block_quant", "torch.float32")
    assert found["tensors"] == ["weight", "residual"]
    want = polyfuse.rms_norm_block_quant(
        x.float() + x.flip(0).float(), x[0].float(), scale_min=float(torch.tensor(1e-10))
    )
    assert_same_bits(got.outputs, want[:2])


class Layer(torch.nn.Module):
    """A residual sum, an RMSNorm and an MLP of two projections, with both activations quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(2 * D, D, bias=bias) for bias in (False, True))
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 2.0, 2 * D))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> list[torch.Tensor]:
        total = x + residual
        y = norm(total, self.weight)
        return [*quantise(y), total, *quantise(silu(self.gate(y)) * self.up(y))]


def test_a_compiled_layer_has_no_unfused_quantisation_left() -> None:
    layer = Layer().to(DEVICE, torch.bfloat16)
    x = rows(6)
    before = len(fusion.report())
    with fusion.enable(strict=True, materialize=False):
        got = torch.compile(layer)(x, x.flip(0))
    (graph,) = fusion.report()[before:]
    assert [match["op"] for match in graph.matches] == ["rms_norm_block_quant", "silu_mul_block_quant"]
    assert graph.left == ()
    total = x + x.flip(0)
    want = polyfuse.rms_norm_block_quant(x, layer.weight, residual=x.flip(0), scale_min=float(torch.tensor(1e-10)))
    assert_same_bits(got[:3], want)
    torch.testing.assert_close(got[4], layer(x, x.flip(0))[4], rtol=0.05, atol=0)
    assert torch.equal(got[2], total)
