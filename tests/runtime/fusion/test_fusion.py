import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.nn.functional import pad, silu

import polyfuse
from polyfuse.runtime import fusion
from polyfuse.runtime.fusion._passes import Settings
from polyfuse.runtime.fusion._replace import PLACED, fuse
from polyfuse.spec import FLOATS, SpecError
from polyfuse.spec.silu_mul_block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS
from polyfuse.unfused import block_quant, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 256
DTYPES = [getattr(torch, name) for name in FLOATS]
Outputs = list[tuple[torch.Tensor, ...]]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    fusion.disable()


class Rewritten(NamedTuple):
    outputs: Any
    placed: list[dict[str, Any]]
    reasons: list[str]


def rewrite(function: Callable[..., Any], *inputs: Any, materialize: bool = True, dynamic: bool = False) -> Any:
    """What a function gives when its graph, as Inductor sees it first, is rewritten and then run node by node."""
    seen: dict[str, Any] = {}

    def compiler(module: torch.fx.GraphModule, _: Any) -> Any:
        matches, near_misses = fuse(module.graph, materialize)
        seen["reasons"] = [near_miss.reason for near_miss in near_misses]
        module.graph.lint()
        module.recompile()
        seen["placed"] = [node.meta[PLACED] for node in module.graph.nodes if PLACED in node.meta]
        assert len(matches) == len(seen["placed"])
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())
    outputs = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return Rewritten(outputs, seen["placed"], seen["reasons"])


def rows(*lead: int, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn((*lead, 2 * D), generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def assert_same_bits(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(raw(one), raw(other))
        assert one.stride() == other.stride()


def by(amax: torch.Tensor, number: float) -> Any:
    """A divisor that divides: a number does so on a CPU only."""
    return number if amax.device.type == "cpu" else torch.full_like(amax, number)


HALVES: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.chunk(2, -1),
    lambda x: (x[..., :D], x[..., D:]),
    lambda x: x.split(D, -1),
]


def in_layout(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The scales in a layout, as one writes it."""
    if layout == "row_major":
        return scale
    flat = scale.flatten(0, -2)
    padding = -len(flat) % 4 if layout == "col_major_tma" else 0
    return pad(flat, (0, 0, 0, padding)).t().contiguous().t()[: len(flat)].unflatten(0, scale.shape[:-1])


def power_of_two_above(scale: torch.Tensor, exact: bool) -> torch.Tensor:
    if not exact:
        return torch.pow(2.0, torch.ceil(torch.log2(scale.abs())))
    bits = (scale.view(torch.int32) + 0x7FFFFF) & -0x800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def plain(
    x: torch.Tensor, halve: Any, group: int, quant_dtype: str, form: str, layout: str
) -> tuple[torch.Tensor, ...]:
    gate, up = halve(x)
    y = (silu(gate) * up).unflatten(-1, (-1, group))
    qmax = QMAX[quant_dtype]
    amax = y.abs().amax(dim=-1, keepdim=True).float()
    scale = (amax / by(amax, qmax)).clamp(min=1e-10)
    if form != "float32":
        scale = power_of_two_above(scale, exact=x.dtype == torch.float32)
    q = y.float() / scale
    q = q.round().clamp(-128, 127) if quant_dtype == "int8" else q.clamp(-qmax, qmax)
    scale = scale.squeeze(-1)
    if form == "ue8m0_packed":
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
        scale = pad(exponents, (0, -exponents.shape[-1] % 4)).view(torch.int32)
    return q.to(getattr(torch, quant_dtype)).view(*x.shape[:-1], D), in_layout(scale, layout)


def library(
    x: torch.Tensor, halve: Any, group: int, quant_dtype: str, form: str, layout: str
) -> tuple[torch.Tensor, ...]:
    return block_quant(silu_mul(x), group_size=group, quant_dtype=quant_dtype, scale_format=form, scale_layout=layout)


def transformers(x: torch.Tensor, halve: Any, group: int, _: str, form: str, layout: str) -> tuple[torch.Tensor, ...]:
    """An MLP's activation, and then the quantisation of an FP8 linear layer's input."""
    gate, up = halve(x)
    y = (silu(gate) * up).float().view(*x.shape[:-1], -1, group)
    amax = y.abs().amax(-1)
    scale = amax / by(amax, 448.0)
    q = (y / scale.clamp(min=1e-12).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return q.view(*x.shape[:-1], D), in_layout(scale, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("source", "forms"), [(plain, SCALE_FORMATS), (library, SCALE_FORMATS), (transformers, SCALE_FORMATS[:1])]
)
def test_every_pattern_is_matched_and_changes_no_bit(source: Any, forms: tuple[str, ...], dtype: torch.dtype) -> None:
    """Every group size, layout and format, with halvings, ranks and quantised dtypes in turn, in one graph."""
    table = list(product((32, 64, 128, D), SCALE_LAYOUTS, forms))
    heads = [
        (
            rows(*((5,), (2, 3))[i % 2], dtype=dtype),
            HALVES[(i + i // 3) % 3],
            group,
            list(QMAX)[i // 2 % 4],
            form,
            layout,
        )
        for i, (group, layout, form) in enumerate(table)
    ]

    def graph(*inputs: torch.Tensor) -> Outputs:
        return [source(x, *rest) for x, (_, *rest) in zip(inputs, heads, strict=True)]

    inputs = [x for x, *_ in heads]
    want = graph(*inputs)
    got = rewrite(graph, *inputs)
    assert got.reasons == []
    assert len(got.placed) == len(table) == 12 * len(forms)
    for (group, layout, form), placed, one, other in zip(table, got.placed, got.outputs, want, strict=True):
        assert_same_bits(one, other)
        found = [placed.get(name, default) for name, default in (("group_size", 128), ("scale_format", "float32"))]
        assert found == [group, form]
        assert placed["dtype"] == str(dtype)
        columns = D // group if form != "ue8m0_packed" else -(-D // group // 4)
        layouts = {layout, "row_major"} if columns == 1 else {layout}  # in memory one column is as one row
        assert placed.get("scale_layout", "row_major") in layouts
        assert placed.get("scale_min") == {plain: float(torch.tensor(1e-10)), transformers: 0.0}.get(source)


def deepgemm(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, ...]:
    """What Transformers' DeepGEMM linear does with its input."""
    y = torch.zeros(len(x), D, dtype=x.dtype, device=x.device)
    y[:, :D] = activated(x)
    groups = y.view(len(x), -1, 128)
    amax = groups.abs().float().amax(dim=2).view(len(x), -1).clamp(1e-4)
    scale = amax / by(amax, 448.0)
    if power_of_two:
        scale = torch.pow(2.0, torch.ceil(torch.log2(scale.abs())))
    q = (groups * (1.0 / scale.unsqueeze(2))).to(torch.float8_e4m3fn)
    return q.view(len(x), D)[:, :D].contiguous(), scale


def test_deepgemm_is_matched_where_its_reciprocal_is_exact() -> None:
    x = rows(6)
    got = rewrite(lambda x: deepgemm(x, True), x)
    assert [placed["scale_format"] for placed in got.placed] == ["ue8m0"]
    assert_same_bits(got.outputs, deepgemm(x, True))
    got = rewrite(lambda x: deepgemm(x, False), x)
    assert (got.placed, got.reasons) == ([], ["y * (1 / scale) is not y / scale"])
    assert len(rewrite(lambda x: deepgemm(x, False), x, materialize=False).placed) == 1


def quantise(y: torch.Tensor, amax: torch.Tensor | None = None, floor: float = 1e-10) -> tuple[torch.Tensor, ...]:
    groups = y.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1) if amax is None else amax
    scale = (amax / by(amax, 448.0)).clamp(min=floor)
    return (groups / scale[..., None]).to(torch.float8_e4m3fn).flatten(-2), scale


def activated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def with_scale(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    """`quantise` with another scale, made from amax and the usual one."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = activated(x).float().unflatten(-1, (-1, 128))
        amax = groups.abs().amax(-1, keepdim=True)
        scale = change(amax, (amax / by(amax, 448.0)).clamp(min=1e-10))
        return (groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale

    return function


def with_ratio(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], number: float = 448.0) -> Any:
    """`quantise` with another quotient, made from y and the scale."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        groups = activated(x).float().unflatten(-1, (-1, 128))
        amax = groups.abs().amax(-1, keepdim=True)
        scale = (amax / by(amax, number)).clamp(min=1e-10)
        return change(groups, scale).flatten(-2), scale

    return function


def halves_to(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], Any]:
    """`quantise` of another y, made from gate and up."""
    return lambda x: quantise(change(*x.chunk(2, -1)))


E4M3 = torch.float8_e4m3fn
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


def matched(functions: dict[str, Any], materialize: bool) -> list[str]:
    """Which of the functions are matched; they share a graph, and are told apart by their numbers of rows."""
    inputs = [rows(6 * i) for i in range(1, len(functions) + 1)]

    def graph(*inputs: torch.Tensor) -> Outputs:
        return [function(x) for function, x in zip(functions.values(), inputs, strict=True)]

    placed = rewrite(graph, *inputs, materialize=materialize).placed
    return [list(functions)[int(call["shape"][0]) // 6 - 1] for call in placed]


def test_what_the_op_does_not_compute_bit_for_bit_is_left_alone() -> None:
    assert matched(LAST_BITS | ANOTHER_FUNCTION | {"usual": with_scale(lambda _, scale: scale)}, True) == ["usual"]


def test_without_materialize_another_function_is_left_alone() -> None:
    assert matched(ANOTHER_FUNCTION | {"usual": with_scale(lambda _, scale: scale)}, False) == ["usual"]


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


@pytest.mark.parametrize(
    ("change", "scale_min"),
    [
        (lambda amax, scale: (amax / by(amax, 448.0)).clamp(min=1 / (448 * 512)), None),
        (lambda amax, scale: (amax / by(amax, 448.0)).clamp(min=1e-7), float(torch.tensor(1e-7))),
        (lambda amax, scale: amax.clamp(min=1e-4) / by(amax, 448.0), (torch.tensor(1e-4) / torch.tensor(448.0)).item()),
        (lambda amax, scale: (amax.clamp(min=4.0) / by(amax, 448.0)).clamp(min=1e-7), 4 / 448),
        (lambda amax, scale: (amax / by(amax, 448.0)).clamp(min=1e-12), float(torch.tensor(1e-12))),
        (lambda amax, scale: torch.where((s := amax / by(amax, 448.0)) == torch.inf, s, s.clamp(max=2e-3)).clamp(1e-7),
         float(torch.tensor(1e-7))),
    ],
)  # fmt: skip
def test_the_place_and_value_of_the_floor_become_scale_min(change: Any, scale_min: float | None) -> None:
    x = rows(6)
    x[0], x[1] = 0, x[1] * 1e-6
    function = with_scale(change)
    got = rewrite(function, x)
    assert got.placed[0].get("scale_min") == (scale_min and float(torch.tensor(scale_min)))
    assert_same_bits(got.outputs, function(x))


def test_a_floor_of_a_bfloat16_amax_is_one_of_bfloat16() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = activated(x).unflatten(-1, (-1, 128))
        scale = y.abs().max(dim=-1).values.clamp(min=1e-4).float()
        scale = scale / by(scale, 448.0)
        return (y / scale[..., None]).to(E4M3), scale

    x = rows(6)
    x[0] = 0
    got = rewrite(function, x)
    assert got.placed[0]["scale_min"] == (torch.tensor(1e-4).bfloat16().float() / torch.tensor(448.0)).item()
    assert_same_bits(got.outputs, function(x))


def test_what_else_a_graph_uses_stays_right() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = activated(x)
        amax = y.float().unflatten(-1, (-1, 128)).abs().amax(-1)
        q, scale = quantise(y, amax)
        return [q.float() * 2, q, y, amax + 1, scale, scale.t().contiguous().t(), scale.view(torch.int32), 1 / scale]

    x = rows(6)
    got = rewrite(function, x)
    assert len(got.placed) == 1
    assert "scale_layout" not in got.placed[0]
    assert_same_bits(got.outputs, function(x))


def test_packed_scales_beside_plain_ones_are_computed_from_these() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        q, scale = block_quant(silu_mul(x), group_size=64, scale_format="ue8m0")
        return [q, scale, (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)]

    x = rows(6)
    got = rewrite(function, x)
    assert [placed["scale_format"] for placed in got.placed] == ["ue8m0"]
    assert_same_bits(got.outputs, function(x))


def test_two_quantisations_of_one_activation_are_two_calls() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = silu_mul(x)
        return [*block_quant(y, group_size=32), *block_quant(y, group_size=64, quant_dtype="int8")]

    x = rows(6)
    got = rewrite(function, x)
    assert [placed["group_size"] for placed in got.placed] == [32, 64]
    assert_same_bits(got.outputs, function(x))


@pytest.mark.parametrize("lead", [(5,), (2, 3)])
@pytest.mark.parametrize("view", ["groups", "flat"])
def test_results_in_another_shape(view: str, lead: tuple[int, ...]) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale = quantise(activated(x))
        shape = (-1, 128) if view == "flat" else (*x.shape[:-1], 2, 128)
        return q.view(shape), scale.view(*shape[:-1], 1)

    x = rows(*lead)
    for dim in range(x.ndim - 1):
        torch._dynamo.mark_dynamic(x, dim)
    got = rewrite(function, x)
    assert len(got.placed) == 1
    assert_same_bits(got.outputs, function(x))


# A build for CUDA makes no tensors for XPU, not even fake ones.
XPU = pytest.param("xpu", marks=pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA"))


@pytest.mark.parametrize("device", ["cpu", "cuda", XPU, "meta"])
def test_a_number_divides_on_a_cpu_and_on_a_gpu_its_reciprocal_multiplies(device: str) -> None:
    def function(x: torch.Tensor, tensor: bool) -> tuple[torch.Tensor, ...]:
        groups = activated(x).float().unflatten(-1, (-1, 128))
        amax = groups.abs().amax(-1, keepdim=True)
        scale = (amax / (torch.full_like(amax, 448.0) if tensor else 448.0)).clamp(min=1e-10)
        return (groups / scale).to(E4M3), scale

    def reciprocals(tensor: bool, materialize: bool = True) -> tuple[list[bool], list[str]]:
        torch._dynamo.reset()
        with FakeTensorMode():  # a graph for any device
            x = torch.empty(6, 2 * D, dtype=torch.bfloat16, device=device)
            got = rewrite(function, x, tensor, materialize=materialize)
        return [placed.get("reciprocal", False) for placed in got.placed], got.reasons

    multiplies = device in ("cuda", "xpu")
    assert reciprocals(True) == ([False], [])
    if device == "meta":
        assert reciprocals(False) == ([], ["on meta, amax / 448.0 may be amax * (1 / 448.0)"])
    else:
        assert reciprocals(False) == ([multiplies], [])
    assert reciprocals(False, materialize=False) == ([multiplies], [])


def test_a_division_by_a_number_changes_no_bit() -> None:
    function = with_scale(lambda amax, scale: (amax / 448.0).clamp(min=1e-10))
    x = rows(64)
    got = rewrite(function, x)
    assert [placed.get("reciprocal", False) for placed in got.placed] == [DEVICE == "cuda"]
    assert_same_bits(got.outputs, function(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda amax, scale: (amax * (1 / 448.0)).clamp(min=1e-10),
        lambda amax, scale: (0.002232142857142857 * amax).clamp(min=1e-10),
        lambda amax, scale: (amax * float(torch.tensor(1 / 448.0))).clamp(min=1e-10),
        lambda amax, scale: amax.clamp(min=1e-4) * (1 / 448.0),
        lambda amax, scale: torch.exp2((amax * (1 / 448.0)).clamp(min=1e-10).log2().ceil()),
    ],
)
def test_a_product_with_the_reciprocal_is_one_of_the_op(change: Any) -> None:
    x = rows(64)
    x[0] = 0
    function = with_scale(change)
    got = rewrite(function, x)
    assert [placed.get("reciprocal") for placed in got.placed] == [True]
    assert_same_bits(got.outputs, function(x))


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
def test_the_library_with_reciprocal_is_matched(scale_format: str) -> None:
    def function(x: torch.Tensor) -> Outputs:
        y = silu_mul(x)
        return [block_quant(y, quant_dtype=name, scale_format=scale_format, reciprocal=True) for name in QMAX]

    x = rows(6)
    got = rewrite(function, x)
    assert [(placed.get("quant_dtype", "float8_e4m3fn"), placed["reciprocal"]) for placed in got.placed] == [
        (name, True) for name in QMAX
    ]
    for one, other in zip(got.outputs, function(x), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", sorted({*QMAX.values()}))
def test_the_logarithm_of_a_16_bit_amax_gives_its_power_of_two(divisor: float, dtype: torch.dtype) -> None:
    """What the pass relies on, at every positive amax."""
    amax = torch.arange(1, 2**15, dtype=torch.int16, device=DEVICE).view(dtype)
    amax = amax[amax.isfinite()].float()
    number = torch.full_like(amax, divisor)
    for scale in (amax / number, amax.clamp(min=1e-4) / number, amax * (1 / divisor)):
        scale = scale[scale >= 2.0**-126]
        assert torch.equal(power_of_two_above(scale, exact=False), power_of_two_above(scale, exact=True))


def test_a_graph_with_gradients_is_left_alone() -> None:
    compiled = torch.compile(lambda x: quantise(activated(x))[1].sum())
    before = len(fusion.report())
    x = rows(4, dtype=torch.float32).requires_grad_()
    with fusion.enable(), torch.enable_grad():
        compiled(x).backward()
    assert x.grad is not None
    assert [(len(graph.matches), len(graph.left)) for graph in fusion.report()[before:]] == [(0, 1), (0, 1)]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(64, 2 * D, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise(activated(self.gate_up(x)))


def test_a_compiled_module_follows_its_batch_and_changes_no_bit() -> None:
    block = Block().to(DEVICE, torch.bfloat16)
    inputs = [rows(n)[:, :64] for n in (5, 8, 33)]
    before = len(fusion.report())
    with fusion.enable(strict=True):
        compiled = torch.compile(block, dynamic=True)
        got = [compiled(x) for x in inputs]
    for x, outputs in zip(inputs, got, strict=True):
        assert_same_bits(outputs, quantise(activated(block.gate_up(x))))
    (graph,) = fusion.report()[before:]
    (match,) = graph.matches
    assert match == {
        "shape": [match["shape"][0], "512"],
        "dtype": "torch.bfloat16",
        "scale_min": float(torch.tensor(1e-10)),
        "materialize": True,
    }
    assert not match["shape"][0].isdigit()


def test_a_graph_without_the_pattern_is_compiled_to_the_same_code() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return silu(x.chunk(2, -1)[0]).abs().amax(-1) / 448

    codes = []
    for enabled in (False, True):
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache(), fusion.enable() if enabled else nullcontext():
            _, code = torch._inductor.utils.run_and_get_code(torch.compile(function), rows(4))
        codes.append([re.sub(r"# AOT ID.*|/tmp/\S+", "", part) for part in code])
    assert codes[0] == codes[1]
    assert "polyfuse" not in codes[1][0]
    assert fusion.report()[-1] == fusion.GraphReport((), ())


REPORTED = """
import torch
from torch._dynamo.utils import counters
from polyfuse.runtime import fusion
from polyfuse.unfused import block_quant, silu_mul

def function(x, y):
    return *block_quant(silu_mul(x)), *block_quant(silu_mul(y), group_size=32)

with torch.no_grad(), fusion.enable():
    for f in function, torch.mm:  # neither has a kernel of Inductor's own, which takes seconds
        torch.compile(f)(torch.ones(256, 256), torch.zeros(256, 256))
print(counters["aot_autograd"]["autograd_cache_hit"], *fusion.report(), sep="\\n")
"""


def test_the_report_survives_the_compile_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    outputs = []
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", REPORTED], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.splitlines())
    (cold, *want), (warm, *got) = outputs
    assert (cold, warm) == ("0", "2")
    assert got == want
    assert got[0].count("'shape'") == 2
    assert got[1:] == ["GraphReport(matches=(), left=())"]


def test_strict_raises_for_each_graph_with_no_match_and_says_what_was_left() -> None:
    x = rows(4)
    text = r"^fusion\.enable: strict: expected something to fuse in each graph, got none"
    with fusion.enable(strict=True):
        with pytest.raises(fusion.NoMatch, match=text + r"\n"):
            torch.compile(lambda x: x + 1)(x)
        with pytest.raises(SpecError, match=text + r" \(y \* \(1 / scale\) is not y / scale\)"):
            torch.compile(LAST_BITS["product_with_the_reciprocal"])(x)
        with torch.enable_grad(), pytest.raises(SpecError, match=text + r" \(the graph computes gradients"):
            torch.compile(lambda x: x * 2)(x.float().requires_grad_())
    assert torch.equal(torch.compile(lambda x: x + 1)(x), x + 1)


class Counting(CustomGraphPass):
    """A pass of the user's own, with an identity or without."""

    def __init__(self, identity: str | None = "mine") -> None:
        self.identity = identity
        self.calls = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self.identity


InferenceAwareBase: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)  # torch 2.12


class InferenceAware(InferenceAwareBase):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen: list[bool] = []

    def __call__(self, graph: Graph, is_inference: bool = True) -> None:
        self.seen.append(is_inference)

    def uuid(self) -> str:
        return "aware"


def slots() -> tuple[Any, Any]:
    return inductor.joint_custom_pre_pass, inductor.post_grad_custom_post_pass


def test_enable_ends_with_its_block_and_runs_earlier_passes_first() -> None:
    joint, after, aware = Counting(), Counting(), InferenceAware()
    with inductor.patch(joint_custom_pre_pass=joint, post_grad_custom_post_pass=[after, aware], fx_graph_cache=False):
        with fusion.enable():
            assert all(isinstance(slot, CustomGraphPass) for slot in slots())
            for slot, earlier in zip(slots(), (joint, [after, aware]), strict=True):
                assert slot.earlier == earlier
            with torch._inductor.utils.fresh_cache():
                torch.compile(lambda x: x + 1)(rows(4))
        assert slots() == (joint, [after, aware])
        assert (joint.calls, after.calls, aware.seen) == (1, 1, [True])


def test_the_last_enable_holds_and_disable_ends_all() -> None:
    assert slots() == (None, None)
    fusion.enable()
    with fusion.enable(materialize=False, strict=True):
        assert [slot.settings for slot in slots()] == [Settings(strict=True, materialize=False)] * 2
    assert [slot.settings for slot in slots()] == [Settings(strict=False, materialize=True)] * 2
    fusion.enable(strict=True)
    fusion.disable()
    assert slots() == (None, None)


def test_an_identity_has_the_settings_and_the_earlier_pass_in_it() -> None:
    identities = []
    for earlier, settings in (
        (None, {}),
        (None, {"strict": True}),
        (None, {"materialize": False}),
        (Counting("one"), {}),
        ([Counting("one"), Counting("two")], {}),
    ):
        with inductor.patch(joint_custom_pre_pass=earlier), fusion.enable(**settings):
            identities += [slot.uuid() for slot in slots()]
            assert identities[-2:] == [slot.uuid() for slot in slots()]
    assert len({*identities}) == len(identities) - 2  # of the second slot, which had no earlier pass
    for earlier in (Counting(None), lambda graph: None):
        with inductor.patch(joint_custom_pre_pass=earlier), fusion.enable():
            assert slots()[0].uuid() is None


@pytest.mark.parametrize("argument", ["strict", "materialize"])
def test_settings_are_booleans(argument: str) -> None:
    with pytest.raises(SpecError, match=rf"^fusion\.enable: {argument}: expected True or False, got 'yes'$"):
        fusion.enable(**{argument: "yes"})
    assert slots() == (None, None)


def test_the_documents_example_is_matched() -> None:
    text = (Path(__file__).parents[3] / "docs/fusion.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    before = len(fusion.report())
    exec(code, names)
    ((match,),) = [graph.matches for graph in fusion.report()[before:]]
    assert str(match) in re.sub(r"\s+", " ", text)
    assert (names["q"].shape, names["scale"].shape) == ((4, 256), (4, 2))
