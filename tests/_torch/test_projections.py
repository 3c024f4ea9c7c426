"""Stacked weights, weights seen as one, and the choice of a strategy by the measured table."""

import re

import pytest
import torch

from polyfuse import Unsupported
from polyfuse._torch import projections
from polyfuse._torch.projections import Projection, as_one_weight, choose, is_recorded, one_bias, one_weight
from polyfuse.runtime import stack_weights

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
GEMMS = ("sequential", "parallel", "merged")
SIZES = (96, 40, 8, 6)


@pytest.fixture(params=DEVICES)
def x(request: pytest.FixtureRequest) -> torch.Tensor:
    """An activation [7, 64]."""
    torch.manual_seed(0)
    return torch.randn(7, 64, device=request.param, dtype=torch.bfloat16)


@pytest.fixture
def weights(x: torch.Tensor) -> list[torch.Tensor]:
    """w_qkvz, w_z, w_ba and w_a, each in memory of its own."""
    return [torch.randn(size, 64, device=x.device, dtype=x.dtype) for size in SIZES]


def test_stacked_weights_are_one_without_a_copy(weights: list[torch.Tensor]) -> None:
    views = stack_weights(*weights)
    assert [len(view) for view in views] == list(SIZES)
    for first, last in ((0, 1), (0, 2), (1, 3), (0, 4)):
        whole = as_one_weight(*views[first:last])
        assert whole is not None
        assert whole.data_ptr() == views[first].data_ptr()
        assert torch.equal(whole, torch.cat(weights[first:last]))


def test_other_weights_are_not_one(weights: list[torch.Tensor]) -> None:
    views = stack_weights(*weights)
    assert as_one_weight(*weights) is None
    assert as_one_weight(views[1], views[0]) is None
    assert as_one_weight(views[0], views[2]) is None
    assert as_one_weight(views[0], views[0]) is None
    assert as_one_weight(views[0][:, ::2], views[1][:, ::2]) is None
    assert as_one_weight(views[0], weights[1]) is None
    # As far from the beginning of its storage as the second view, but of another storage.
    assert as_one_weight(views[0], stack_weights(*weights)[1]) is None


def test_rows_with_a_gap_behind_each_are_one_as_well(weights: list[torch.Tensor]) -> None:
    wide = torch.cat(weights).repeat(1, 2)
    views = wide[:, :64].split(SIZES)
    whole = as_one_weight(*views)
    assert whole is not None
    assert whole.stride() == (128, 1)
    assert torch.equal(whole, torch.cat(weights))


def test_weights_without_elements_lie_anywhere(weights: list[torch.Tensor]) -> None:
    first, second, *_ = stack_weights(*weights)
    none = first.new_empty(0, 64)
    whole = as_one_weight(none, first, none, second, none)
    assert whole is not None
    assert torch.equal(whole, torch.cat(weights[:2]))
    nothing = [as_one_weight(*(w[:, :0] for w in weights)), as_one_weight(none, none)]
    assert [None if w is None else w.shape for w in nothing] == [(sum(SIZES), 0), (0, 64)]


def test_weights_that_do_not_fit_together_are_not_stacked(weights: list[torch.Tensor]) -> None:
    with pytest.raises(
        ValueError, match=re.escape("expected weights of one width, dtype and device, got [(96, 64), (")
    ):
        stack_weights(weights[0], weights[1][:, :32])
    with pytest.raises(ValueError, match="expected weights of one width, dtype and device"):
        stack_weights(weights[0], weights[1].float())


def test_the_weights_of_two_projections_are_one_or_refused(weights: list[torch.Tensor]) -> None:
    w_qkvz, w_z, w_ba, w_a = stack_weights(*weights)
    assert torch.equal(one_weight(Projection(w_qkvz, w_z), Projection(w_ba, w_a)), torch.cat(weights))
    message = (
        "gdn_in_proj: strategy merged: expected 3 weights that lie right behind one another in one storage, got "
        "others; try as weights the views that polyfuse.runtime.stack_weights makes, or strategy auto"
    )
    with pytest.raises(Unsupported, match=re.escape(message)):
        one_weight(Projection(w_qkvz, w_z), Projection(w_a))


def test_a_missing_bias_is_zeros(weights: list[torch.Tensor]) -> None:
    w_qkvz, w_z, w_ba, _ = weights
    b1, b2 = w_qkvz.new_ones(136), w_qkvz.new_ones(8)
    pairs = ((b1, b2), (b1, None), (None, b2))
    found = [one_bias(Projection(w_qkvz, w_z, first), Projection(w_ba, None, second)) for first, second in pairs]
    assert [None if t is None else t.tolist() for t in found] == [[1] * 144, [1] * 136 + [0] * 8, [0] * 136 + [1] * 8]
    assert one_bias(Projection(w_qkvz), Projection(w_ba)) is None


def test_recorded_is_what_requires_a_gradient_while_gradients_are_enabled(x: torch.Tensor) -> None:
    assert not is_recorded(x, None)
    x.requires_grad_()
    assert is_recorded(None, x)
    with torch.no_grad():
        assert not is_recorded(x)


def usual(x: torch.Tensor) -> str:
    """The choice for few rows of 16 bits without a measurement."""
    return "fused" if x.is_cuda else "sequential"


def test_without_a_measurement_the_choice_is_sequential(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    assert choose(x, weights[0], weights[2], GEMMS) == "sequential"
    assert choose(x, weights[0], weights[2], (*GEMMS, "fused")) == usual(x)


def test_on_a_gpu_few_rows_of_16_bits_without_a_measurement_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "_table", lambda device: {(64, 96, 8, "bfloat16"): ((None, ("sequential",)),)})
    device = torch.device("cuda", 0)
    sizes = {"bfloat16": ("fused",), "float16": ("fused",), "float32": ()}
    for dtype, ranking in sizes.items():
        assert projections._ranking(device, 64, 128, 8, getattr(torch, dtype), 64) == ranking
    assert projections._ranking(device, 64, 128, 8, torch.bfloat16, 65) == ()
    assert projections._ranking(device, 64, 96, 8, torch.bfloat16, 64) == ("sequential",)
    assert projections._ranking(torch.device("cpu"), 64, 128, 8, torch.bfloat16, 64) == ()


def test_the_choice_follows_the_table(
    x: torch.Tensor, weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    w1, w2 = weights[0], weights[2]
    ranges = ((4, ("fused", "merged", "parallel")), (None, ("merged", "parallel", "sequential")))
    monkeypatch.setattr(projections, "_table", lambda device: {(64, 96, 8, "bfloat16"): ranges})
    every = (*GEMMS, "fused")
    assert choose(x, w1, w2, every) == "sequential"
    assert choose(x[:4], w1, w2, every) == "fused"
    monkeypatch.setattr(projections, "_capturing", lambda device: True)
    assert choose(x[:4], w1, w2, GEMMS) == "parallel"
    assert choose(x, *stack_weights(w1, w2), every) == "merged"
    assert choose(x, w1, w2, every) == "parallel"
    monkeypatch.setattr(projections, "streams_enabled", lambda: False)
    assert choose(x, w1, w2, every) == "sequential"


def test_four_weights_are_looked_up_by_the_widths_of_their_results(
    x: torch.Tensor, weights: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {(64, 136, 14, "bfloat16"): ((None, ("merged", "fused", "sequential")),)}
    monkeypatch.setattr(projections, "_table", lambda device: table)
    every = (*GEMMS, "fused")
    w_qkvz, w_z, w_ba, w_a = weights
    assert choose(x, w_qkvz, w_ba, every) == usual(x)
    assert choose(x, w_qkvz, w_ba, every, w_z=w_z) == usual(x)
    assert choose(x, w_qkvz, w_ba, every, w_z=w_z, w_a=w_a) == "fused"
    w_qkvz, w_z, w_ba, w_a = stack_weights(*weights)
    assert choose(x, w_qkvz, w_ba, every, w_z=w_z, w_a=w_a) == "merged"
    assert choose(x, w_qkvz, w_ba, every, w_z=w_z, w_a=weights[3]) == "fused"


@pytest.mark.parametrize("before", [True, False, (False, False)], ids=str)
def test_parts_of_a_product_are_added_up_in_float32(before: bool | tuple[bool, bool]) -> None:
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"

    def found() -> tuple[bool, bool]:
        return getattr(settings, name), getattr(settings, f"{name}_split_k")

    usual = found()
    sums = projections._SUMS[torch.bfloat16]
    try:
        setattr(settings, name, before)
        given = found()
        with sums:
            assert found() == (False, given[1])
            with sums:  # as another thread does meanwhile
                assert found() == (False, given[1])
            assert found() == (False, given[1])
        assert found() == given
        with pytest.raises(ValueError, match="inside"), sums:
            raise ValueError("inside")
        assert found() == given
    finally:
        setattr(settings, name, usual)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_on_a_gpu_is_rounded_once(dtype: torch.dtype, biased: bool, recorded: bool) -> None:
    """Integers of at most 3 have sums below 2048, which float16 and float32 have; bfloat16 rounds them once."""
    torch.manual_seed(0)
    for rows in (1, 4, 65):
        x, weight = (torch.randint(-3, 4, (size, 1024), device="cuda").to(dtype) for size in (rows, 64))
        bias = torch.randint(-99, 100, (64,), device="cuda").to(dtype) if biased else None
        want = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).to(dtype)
        weight.requires_grad_(recorded)
        with projections.rounded_once(x):
            assert torch.equal(projections.product(x, weight, bias), want)
            if not recorded:
                columns = x.new_empty(rows, 96)[:, 8:72]
                projections.product_into(columns, x, weight, bias)
                assert torch.equal(columns, want)
