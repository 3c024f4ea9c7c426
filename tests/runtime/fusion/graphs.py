"""Rewriting a function's graph, and the functions whose graphs are rewritten: SiLU-mul and quantisation in parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule
from torch.nn.functional import pad, silu

from polyfuse.runtime.fusion._replace import PLACED, fuse
from polyfuse.spec import FLOATS
from polyfuse.spec.block_quant import QMAX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D = 256
DTYPES = [getattr(torch, name) for name in FLOATS]
E4M3 = torch.float8_e4m3fn
Outputs = list[tuple[torch.Tensor, ...]]


class Rewritten(NamedTuple):
    """What a rewritten graph gives, what the op's calls in it compute, and why near misses were left alone."""

    outputs: Any
    placed: list[dict[str, Any]]
    reasons: list[str]


def changed(function: Callable[..., Any], change: Callable[[Graph], None], dynamic: bool) -> Callable[..., Any]:
    """A function whose graph, as Inductor sees it first, is changed and then run node by node."""

    def compiler(module: GraphModule, _: Any) -> Any:
        change(module.graph)
        module.graph.lint()
        module.recompile()
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def run_changed(function: Callable[..., Any], inputs: Any, change: Callable[[Graph], None], dynamic: bool) -> Any:
    """What such a function gives."""
    return changed(function, change, dynamic)(*inputs)


def placed_calls(graph: Graph) -> list[dict[str, Any]]:
    """What each call of the op that the pass put into a graph computes."""
    return [node.meta[PLACED] for node in graph.nodes if PLACED in node.meta]


def rewrite(function: Callable[..., Any], *inputs: Any, materialize: bool = True, dynamic: bool = False) -> Rewritten:
    """Run a function whose graph is rewritten by the pass."""
    placed: list[dict[str, Any]] = []
    reasons: list[str] = []

    def change(graph: Graph) -> None:
        matches, near_misses = fuse(graph, materialize)
        placed.extend(placed_calls(graph))
        reasons.extend(near_miss.reason for near_miss in near_misses)
        if len(matches) != len(placed):
            raise AssertionError(f"{len(matches)} matches, but {len(placed)} calls in the graph")

    return Rewritten(run_changed(function, inputs, change, dynamic), placed, reasons)


def rows(*lead: int, dtype: torch.dtype = torch.bfloat16, scale: float = 3.0) -> torch.Tensor:
    """x [*lead, 2*D] of random values."""
    return (scale * torch.randn((*lead, 2 * D), generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose values can be compared: bytes for the quantised dtypes."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def assert_same_bits(got: Any, want: Any) -> None:
    """Equal values, dtypes, shapes and strides, pair by pair."""
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(raw(one), raw(other), rtol=0, atol=0, check_stride=True)


def by(amax: torch.Tensor, number: float) -> Any:
    """A divisor that divides: a number does so on a CPU only."""
    return number if amax.device.type == "cpu" else torch.full_like(amax, number)


def activated(x: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up."""
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def quantise(y: torch.Tensor, amax: torch.Tensor | None = None, floor: float = 1e-10) -> tuple[torch.Tensor, ...]:
    """q and the scales of groups of 128, in float8_e4m3fn."""
    groups = y.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1) if amax is None else amax
    scale = (amax / by(amax, 448.0)).clamp(min=floor)
    return (groups / scale[..., None]).to(torch.float8_e4m3fn).flatten(-2), scale


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


def in_layout(scale: torch.Tensor, layout: str) -> torch.Tensor:
    """The scales in a layout, as one writes it."""
    if layout == "row_major":
        return scale
    flat = scale.flatten(0, -2)
    padding = -len(flat) % 4 if layout == "col_major_tma" else 0
    return pad(flat, (0, 0, 0, padding)).t().contiguous().t()[: len(flat)].unflatten(0, scale.shape[:-1])


def power_of_two_above(scale: torch.Tensor, exact: bool) -> torch.Tensor:
    """The least power of two that is at least a scale, by its bits or, in 16-bit activations, by its logarithm."""
    if not exact:
        return torch.pow(2.0, torch.ceil(torch.log2(scale.abs())))
    bits = (scale.view(torch.int32) + 0x7FFFFF) & -0x800000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def in_format(y: torch.Tensor, group: int, quant_dtype: str, form: str, layout: str) -> tuple[torch.Tensor, ...]:
    """q and the scales of y in any of the formats, as one writes it."""
    qmax = QMAX[quant_dtype]
    groups = y.unflatten(-1, (-1, group))
    amax = groups.abs().amax(dim=-1, keepdim=True).float()
    scale = (amax / by(amax, qmax)).clamp(min=1e-10)
    if form != "float32":
        scale = power_of_two_above(scale, exact=y.dtype == torch.float32)
    q = groups.float() / scale
    q = q.round().clamp(-128, 127) if quant_dtype == "int8" else q.clamp(-qmax, qmax)
    scale = scale.squeeze(-1)
    if form == "ue8m0_packed":
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
        scale = pad(exponents, (0, -exponents.shape[-1] % 4)).view(torch.int32)
    return q.to(getattr(torch, quant_dtype)).view(y.shape), in_layout(scale, layout)
