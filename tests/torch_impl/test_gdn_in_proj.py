"""`gdn_in_proj` in PyTorch: strategies against the oracle and against one another."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import polyfuse
from polyfuse import SpecError, Unsupported
from polyfuse._torch import projections
from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.runtime import stack_weights

OP = "gdn_in_proj"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = {"w_qkvz": 96, "w_z": 40, "w_ba": 8, "w_a": 6}  # in the order of use


@pytest.fixture(params=DEVICES)
def x(request):
    torch.manual_seed(0)
    return torch.randn(7, 64, device=request.param, dtype=torch.bfloat16)


@pytest.fixture
def weights(x):
    """The four weights by name, each in memory of its own."""
    return {name: torch.randn(size, 64, device=x.device, dtype=x.dtype) for name, size in SIZES.items()}


def stacked(weights):
    return dict(zip(weights, stack_weights(*weights.values()), strict=True))


def two(weights):
    return {name: weights[name] for name in ("w_qkvz", "w_ba")}


def call(x, weights, **options):
    return polyfuse.gdn_in_proj(x, **weights, backend="torch", **options)


@pytest.mark.parametrize("case", [c for c in cases(OP) if c.repeat == 1], ids=lambda c: c.name)
def test_case(case):
    status, detail = Trial(OP, case, 0).on(registry().get("torch"))
    assert (status, detail) == ("passed", "") or (status == "skipped" and "strategy='fused'" in detail)


@pytest.mark.parametrize("choose", [two, dict], ids=["two", "four"])
def test_parallel_is_sequential_bit_for_bit(x, weights, choose):
    one = call(x, choose(weights), strategy="sequential")
    other = call(x, choose(weights), strategy="parallel")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("shape", [(7, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_results_of_four_weights_are_contiguous(x, weights, shape):
    qkvz, ba = call(x.new_ones(shape), weights)
    assert (qkvz.shape, ba.shape) == ((*shape[:-1], 136), (*shape[:-1], 14))
    assert qkvz.is_contiguous()
    assert ba.is_contiguous()


class Operators(TorchDispatchMode):
    """Notes every operator that runs, and how many elements each new result has."""

    def __init__(self):
        super().__init__()
        self.names, self.fresh = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if not function.is_view and "out" not in (kwargs or {}):
            self.fresh += sum(r.numel() for r in (result if isinstance(result, tuple) else (result,)))
        return result


def test_four_weights_are_four_products_into_two_buffers(x, weights, monkeypatch):
    monkeypatch.setattr(projections, "SMALL", 0)
    with torch.no_grad(), Operators() as seen:
        call(x, weights, strategy="sequential")
    assert [name for name in seen.names if "mm" in name] == ["aten.mm.out"] * 4
    assert seen.fresh == 7 * sum(SIZES.values())  # the results, and no copy of a weight or of x


def test_small_weights_are_one_product_of_a_copy_made_in_the_call(x, weights):
    qkvz, ba = call(x, weights, strategy="sequential")
    with torch.no_grad(), Operators() as seen:
        again = call(x, weights, strategy="sequential")
    assert [name for name in seen.names if "mm" in name] == ["aten.mm.default"] * 2
    assert torch.equal(qkvz, again[0])
    weights["w_a"].data.mul_(2)
    changed = call(x, weights, strategy="sequential")[1]
    assert not torch.equal(ba, changed)
    torch.testing.assert_close(changed[..., -SIZES["w_a"] :], 2 * ba[..., -SIZES["w_a"] :])


def test_merged_is_one_product_whose_results_are_views_of_one_buffer(x, weights):
    for given, width in ((two(weights), 104), (weights, 150)):
        views = stacked(given)
        with torch.no_grad(), Operators() as seen:
            qkvz, ba = call(x, views, strategy="merged")
        assert [name for name in seen.names if "mm" in name] == ["aten.mm.default"]
        assert seen.fresh == 7 * width
        assert qkvz.stride() == ba.stride() == (width, 1)
        assert ba.data_ptr() == qkvz.data_ptr() + qkvz.shape[1] * x.element_size()
        for result, want in zip((qkvz, ba), call(x, given, strategy="sequential"), strict=True):
            torch.testing.assert_close(result, want)


def test_merged_declines_weights_that_are_not_one(x, weights):
    message = "gdn_in_proj: strategy merged: expected 4 weights that lie right behind one another in one storage"
    for backend in ("torch", None):
        with pytest.raises(Unsupported, match=message):
            polyfuse.gdn_in_proj(x, **weights, strategy="merged", backend=backend)
    views = stacked(weights)
    with pytest.raises(Unsupported, match=message):
        call(x, views | {"w_z": views["w_z"].clone()}, strategy="merged")


def written_data(views):
    for view in views.values():
        view.data.mul_(2)


def copied(views):
    for view in views.values():
        view.copy_(view * 2)


def stepped(views):
    parameters = [torch.nn.Parameter(view) for view in views.values()]
    for parameter in parameters:
        parameter.grad = -parameter.detach()
    torch.optim.SGD(parameters, lr=1.0, fused=True).step()


@pytest.mark.parametrize("write", [written_data, copied, stepped])
def test_merged_sees_every_write_to_the_views(x, weights, write):
    """Also those that do not count in a tensor's version."""
    x = x.float()
    views = stacked({name: weight.float() for name, weight in weights.items()})
    first = [result.clone() for result in call(x, views, strategy="merged")]
    write(views)
    for result, before in zip(call(x, views, strategy="merged"), first, strict=True):
        assert torch.equal(result, before * 2)


def test_views_as_parameters_are_trained_and_run_as_one(x):
    """Each weight of four layers is a view of one buffer, and stays it while an optimizer trains them."""
    layers = [torch.nn.Linear(64, size, bias=False, device=x.device) for size in SIZES.values()]
    x = x.float()
    views = stack_weights(*(layer.weight for layer in layers))
    for layer, view in zip(layers, views, strict=True):
        layer.weight.data = view
    given = dict(zip(SIZES, (layer.weight for layer in layers), strict=True))
    optimizer = torch.optim.AdamW(given.values(), lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        sum(result.square().sum() for result in call(x, given, strategy="merged")).backward()
        optimizer.step()
    with torch.no_grad():
        results = call(x, given, strategy="merged")
        wanted = [layer(x) for layer in layers]
    for result, parts in zip(results, (wanted[:2], wanted[2:]), strict=True):
        torch.testing.assert_close(result, torch.cat(parts, dim=-1))


@pytest.mark.parametrize(
    ("strategy", "stack"),
    [(strategy, dict) for strategy in ("auto", "sequential", "parallel")] + [("auto", stacked), ("merged", stacked)],
)
def test_gradients_reach_every_operand(strategy, stack):
    torch.manual_seed(0)
    x = torch.randn(3, 64, requires_grad=True)
    weights = stack({name: torch.randn(size, 64) for name, size in SIZES.items()})
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    biases = {"bias_qkvz": torch.randn(136, requires_grad=True), "bias_ba": torch.randn(14, requires_grad=True)}
    factor = torch.randn(150)  # another one for each column
    results = call(x, weights, strategy=strategy, **biases)
    (torch.cat(results, dim=-1) * factor).sum().backward()
    torch.testing.assert_close(x.grad, (factor @ torch.cat([*weights.values()]).detach()).expand(3, 64))
    for weight, part in zip(weights.values(), factor.split([*SIZES.values()]), strict=True):
        torch.testing.assert_close(weight.grad, part[:, None] * x.detach().sum(0))
    for bias, part in zip(biases.values(), factor.split([136, 14]), strict=True):
        torch.testing.assert_close(bias.grad, 3 * part)


def test_gradients_reach_a_new_weight_alone():
    x, first, second, small = (torch.ones(s) for s in ((3, 8), (5, 8), (4, 8), (2, 8)))
    second.requires_grad_()
    qkvz, ba = polyfuse.gdn_in_proj(x, first, small, w_z=second)
    assert not ba.requires_grad
    qkvz.sum().backward()
    assert torch.equal(second.grad, torch.full((4, 8), 3.0))


@pytest.mark.parametrize("strategy", ["auto", "sequential", "merged"])
def test_compiles_into_one_full_graph(strategy):
    torch._dynamo.reset()
    torch.manual_seed(0)
    weights = stacked({name: torch.randn(size, 64) for name, size in SIZES.items()})

    def layer(x):
        qkvz, ba = polyfuse.gdn_in_proj(x * 2, **weights, strategy=strategy)
        return qkvz + 1, ba

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((5, 64), (9, 64), (2, 3, 64)):
            x = torch.randn(shape)
            for result, want in zip(compiled(x), layer(x), strict=True):
                torch.testing.assert_close(result, want)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w_qkvz": (96, 32)}, "w_qkvz: expected hidden=64 in [N1, hidden], got [96, 32]"),
        ({"x": (64,)}, "x: expected at least 2 dimensions, got 1"),
        ({"w_z": (40, 32)}, "w_z: expected hidden=64 in [NZ, hidden], got [40, 32]"),
        ({"w_a": (64,)}, "w_a: expected shape [NA, hidden], got [64]"),
        ({"bias_qkvz": (95,)}, "bias_qkvz: expected M1=96 in [M1], got [95]"),
        ({"w_z": (40, 64), "bias_qkvz": (96,)}, "bias_qkvz: expected M1=136 in [M1], got [96]"),
        ({"w_a": (6, 64), "bias_ba": (8,)}, "bias_ba: expected M2=14 in [M2], got [8]"),
    ],
)
def test_bad_shapes(shapes, message):
    given = {"x": (7, 64), "w_qkvz": (96, 64), "w_ba": (8, 64)} | shapes
    with pytest.raises(SpecError, match=re.escape(message)):
        polyfuse.gdn_in_proj(**{name: torch.zeros(shape) for name, shape in given.items()})


@pytest.mark.parametrize("lead", [(9,), (2, 3)])
@pytest.mark.parametrize("strategy", ["sequential", "merged"])
def test_a_bias_is_added_before_the_rounding_whatever_the_strides(strategy, lead):
    bias_of_gaps = {"bias_qkvz": "every_other", "bias_ba": "expanded_last"}
    for layout in ({"x": "every_other"}, bias_of_gaps):
        case = Case(
            f"strided-{strategy}-{len(lead)}-{'-'.join(layout)}",
            {"...": lead, "hidden": 32, "N1": 40, "N2": 24, "M1": 40, "M2": 24},
            {"strategy": strategy},
            {"T": "float16"},
            present=("bias_qkvz", "bias_ba"),
            layout=layout,
            stacked=("w_qkvz", "w_ba") if strategy == "merged" else (),
        )
        assert Trial(OP, case, 0).on(registry().get("torch")) == ("passed", "")
