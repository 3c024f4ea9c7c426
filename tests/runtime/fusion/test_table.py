"""The table of sources, options, group sizes, formats, layouts and dtypes: all matched, or explained.

By default each result equals the eager one to the bit. What `materialize=False` takes has fewer roundings: it equals
the op's own result to the bit, and the eager one within the roundings that are left out.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import sqrt
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, relu, rms_norm, silu

import polyfuse
from polyfuse.conformance.covering import Covering, Factor
from polyfuse.spec.block_quant import QMAX, SCALE_FORMATS, SCALE_LAYOUTS
from tests.runtime.fusion.graphs import (
    DEVICE,
    DTYPES,
    D,
    Outputs,
    assert_same_bits,
    in_format,
    quantise,
    rewrite,
    rows,
    run_changed,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own

Table = dict[str, Callable[..., Any]]
FORMATS = list(product((128, 32, D), [name for name in QMAX if "float4" not in name], SCALE_FORMATS[:3]))
LIMIT, ALPHA = 0.5, float(torch.tensor(1.702))


def table(**factors: Any) -> list[tuple[Any, ...]]:
    """Rows in which each pair of values of two factors stands."""
    found = Covering([Factor(name, tuple(values)) for name, values in factors.items()], lambda chosen: "")
    return list(dict.fromkeys(tuple(found.chosen(row).values()) for row in found.rows.values()))


def some_quick(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The rows as parameters, of which every third is for `make test`."""
    return [pytest.param(*row, marks=[pytest.mark.slow] if n % 3 else []) for n, row in enumerate(rows)]


def label(value: Any) -> str:
    """How a test's name has a value."""
    return "-".join(str(part).removeprefix("torch.") for part in (value if isinstance(value, tuple) else (value,)))


LINEAR = rows(64)[:, :D].float().t().contiguous() / 8  # weights [out, in]
COLUMNS = torch.linspace(0.5, 2.0, 2 * D, device=DEVICE)


def two_gemms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = LINEAR.to(x.dtype)
    return linear(x[..., :64], weight), linear(x[..., 64:128], weight)


SOURCES: Table = {
    "halves": lambda x: x.chunk(2, -1),
    "swapped": lambda x: x.chunk(2, -1)[::-1],
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "two_gemms": two_gemms,
    "two_tensors": lambda x: (x[..., :D] + x[..., D:], x[..., D:].contiguous()),
}


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """gpt-oss's activation."""
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


OPTIONS: Table = {
    "silu": lambda g, u, w: silu(g) * u,
    "product_first": lambda g, u, w: u * silu(g),
    "written_out": lambda g, u, w: g * torch.sigmoid(g) * u,
    "limit": lambda g, u, w: silu(g.clamp(max=LIMIT)) * u.clamp(-LIMIT, LIMIT),
    "limit_on_silu": lambda g, u, w: silu(g).clamp(max=LIMIT) * u.clamp(-LIMIT, LIMIT),
    "up_offset": lambda g, u, w: silu(g) * (u + 0.5),
    "gpt_oss": clamped_swiglu,
    "row_weight": lambda g, u, w: silu(g) * u * w,
    "row_weight_in_float32": lambda g, u, w: (silu(g) * u * w.float().exp()).to(g.dtype),
    "gpt_oss_with_row_weight": lambda g, u, w: clamped_swiglu(g, u, w) * w,
}
GPT_OSS = {"limit": LIMIT, "alpha": ALPHA, "up_offset": 1.0}
ATTRS: dict[str, dict[str, Any]] = {
    "silu": {},
    "product_first": {},
    "written_out": {"alpha": 1 + 2.0**-23},  # with which the op rounds the sigmoid
    "limit": {"limit": LIMIT},
    "limit_on_silu": {"limit": LIMIT, "limit_on": "silu"},
    "up_offset": {"up_offset": 0.5},
    "gpt_oss": GPT_OSS,
    "row_weight": {},
    "row_weight_in_float32": {},
    "gpt_oss_with_row_weight": GPT_OSS,
}


def gated(source: str, option: str) -> Callable[..., Any]:
    return lambda x: OPTIONS[option](*SOURCES[source](x), x[..., -1:])


ACTIVATIONS: Table = {
    "as_it_is": lambda x: x,
    "gelu": gelu,
    "squared_relu": lambda x: relu(x).square(),
    "attention_gate": lambda x: x * torch.sigmoid(x.flip(-1)),
    "heads": lambda x: (x.unflatten(-1, (-1, D)) * 2).transpose(-2, -3).contiguous().transpose(-2, -3).flatten(-2),
    "layer_norm": lambda x: layer_norm(x, x.shape[-1:]),
    "residual": lambda x: x + x.flip(-1),
    "gemm": lambda x: linear(x[..., :64], LINEAR.to(x.dtype)),
    "columns": lambda x: x[..., D:],
    "every_second_column": lambda x: x[..., ::2],
    "float32_of_it": lambda x: x.float(),
}


def rounded_twice(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm of Llama and Qwen3 in Transformers."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def with_an_offset(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """That of Gemma, Qwen3-Next and Qwen3.5."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.float())).type_as(x)


def over_the_root(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


NORMS: Table = {
    "rounded_twice": rounded_twice,
    "with_an_offset": with_an_offset,
    "over_the_root": over_the_root,
    "torch": lambda x, weight: rms_norm(x, (2 * D,), weight, 1e-5),
}


def normed(name: str, residual: bool) -> Callable[..., Any]:
    """The normalised rows, and the sum where there is one."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + x.flip(0) if residual else x
        y = NORMS[name](total, COLUMNS.to(x.dtype))
        return (y, total) if residual else (y,)

    return function


def check(found: dict[str, Any], op: str, dtype: torch.dtype, form: tuple[int, str, str], layout: str) -> None:
    """Whether a call computes just this."""
    columns = int(found["shape"][-1]) // form[0]  # one column of scales lies as one row
    got = [found[name] for name in ("op", "dtype")]
    got += [found.get(n, d) for n, d in zip(("group_size", "quant_dtype", "scale_format"), DEFAULTS, strict=True)]
    assert got == [op, str(dtype), *form]
    assert found.get("scale_layout", "row_major") == layout or columns < 8


DEFAULTS = (128, "float8_e4m3fn", "float32")
LEADS = ((5,), (2, 3))


def check_gated(source: str, option: str, dtype: torch.dtype, heads: list[tuple[Any, str]]) -> None:
    """In one graph: an activation in several formats and layouts, each of a tensor of its own."""
    activation, x = gated(source, option), rows(*LEADS[len(option) % 2], dtype=dtype)
    inputs = [x.clone() for _ in heads]

    def graph(*inputs: torch.Tensor) -> Outputs:
        return [in_format(activation(x), *form, layout) for x, (form, layout) in zip(inputs, heads, strict=True)]

    want, got = graph(*inputs), rewrite(graph, *inputs)
    written_out = option == "written_out" and dtype is torch.float32
    assert got.reasons == ["silu_mul_block_quant: silu is written out, not torch's own"] * len(heads) * written_out
    for (form, layout), found, one, other in zip(heads, got.placed, got.outputs, want, strict=True):
        assert_same_bits(one, other)
        if written_out:
            check(found, "block_quant", dtype, form, layout)
            continue
        check(found, "silu_mul_block_quant", dtype, form, layout)
        options = {name: found[name] for name in ("limit", "limit_on", "alpha", "up_offset") if name in found}
        assert options == ATTRS[option]
        assert found["materialize"] is True
        assert found.get("interleaved", False) == (source == "interleaved")
        tensors = [] if source in ("halves", "interleaved") else ["up"]
        assert found.get("tensors", []) == tensors + ["row_weight"] * ("row_weight" in option)


@pytest.mark.parametrize(
    ("source", "option", "dtype", "layout", "form"),
    some_quick(table(source=SOURCES, option=OPTIONS, dtype=DTYPES, layout=SCALE_LAYOUTS[:3], form=FORMATS[::7])),
    ids=label,
)
def test_a_gated_activation(source: str, option: str, dtype: torch.dtype, layout: str, form: tuple[Any, ...]) -> None:
    check_gated(source, option, dtype, [(form, layout)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_gated_activation_in_every_format(source: str, option: str, dtype: torch.dtype) -> None:
    heads = [(form, SCALE_LAYOUTS[i % 3]) for i, form in enumerate(FORMATS)]
    heads += [(form, SCALE_LAYOUTS[(i + 1) % 3]) for i, form in enumerate(FORMATS[:9])]
    check_gated(source, option, dtype, heads)


@pytest.mark.parametrize(
    ("name", "dtype", "layout", "form"),
    some_quick(table(name=ACTIVATIONS, dtype=DTYPES, layout=SCALE_LAYOUTS[:3], form=FORMATS[::7])),
    ids=label,
)
def test_any_other_activation(name: str, dtype: torch.dtype, layout: str, form: tuple[Any, ...]) -> None:
    """Equal to the graph without the pass, in which Inductor has decomposed gelu and layer_norm."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return in_format(ACTIVATIONS[name](x), *form, layout)

    x = rows(*LEADS[len(name) % 2], dtype=dtype)
    got = rewrite(function, x)
    assert got.reasons == []
    assert len(got.placed) == 1
    check(got.placed[0], "block_quant", dtype, form, layout)
    assert_same_bits(got.outputs, run_changed(function, [x], lambda graph: None, dynamic=False))


ROUNDED_ELSEWHERE = (
    "rms_norm_block_quant: the squares of a row are added in the op's own order, and nothing is rounded before q; "
    "materialize=False takes it"
)


@pytest.mark.parametrize(
    ("name", "residual", "dtype", "layout", "form"),
    table(name=NORMS, residual=(False, True), dtype=DTYPES, layout=SCALE_LAYOUTS[:3], form=FORMATS[::7]),
    ids=label,
)
def test_a_normalisation(name: str, residual: bool, dtype: torch.dtype, layout: str, form: tuple[Any, ...]) -> None:
    """By default the quantisation alone, to the bit; else all of it, just as the op computes it."""
    norm = normed(name, residual)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, *total = norm(x)
        return *in_format(y, *form, layout), *total

    x = rows(6, dtype=dtype)
    got = rewrite(function, x)
    assert got.reasons == [ROUNDED_ELSEWHERE]
    assert len(got.placed) == 1
    check(got.placed[0], "block_quant", dtype, form, layout)
    assert_same_bits(got.outputs, function(x))

    got = rewrite(function, x, materialize=False)
    assert got.reasons == []
    (found,) = got.placed
    check(found, "rms_norm_block_quant", dtype, form, layout)
    assert found["tensors"] == ["weight"] + ["residual"] * residual
    assert found.get("weight_offset", 0.0) == (name == "with_an_offset")
    assert found["eps"] == float(torch.tensor(1e-5))
    attrs = {n: v for n, v in found.items() if n not in ("op", "shape", "dtype", "tensors")}
    want = polyfuse.rms_norm_block_quant(x, COLUMNS.to(dtype), residual=x.flip(0) if residual else None, **attrs)
    assert_same_bits(got.outputs, want[: 2 + residual])
    if residual:
        assert_same_bits(got.outputs[2:], [x + x.flip(0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_differs_by_the_roundings_left_out(name: str, dtype: torch.dtype) -> None:
    """Of n and of y, half an ulp each; and by twice the op's bound of y, and the rounding of the quotient."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantise(NORMS[name](x, COLUMNS.to(x.dtype)))

    x = rows(16, dtype=dtype)
    q, scale = rewrite(function, x, materialize=False).outputs
    want_q, want_scale = function(x)
    bound = 2 * (sqrt(2 * D) / 2 + 9 + 2) * 2.0**-24
    bound += torch.finfo(dtype).eps if dtype is not torch.float32 else 0
    torch.testing.assert_close(scale, want_scale, rtol=bound, atol=0)
    got, want = ((q.float().unflatten(-1, (-1, 128)) * s[..., None]) for q, s in ((q, scale), (want_q, want_scale)))
    step = torch.maximum(want.abs() * 2.0**-3, want_scale[..., None] * 2.0**-9)  # of float8_e4m3fn
    assert bool(((got - want).abs() <= step + 2 * bound * want.abs()).all())
    assert not torch.equal(scale, want_scale) or dtype is torch.float32
