"""Scales: what becomes `scale_min` and `reciprocal`, and what else a graph does with scales and y."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyfuse.unfused import block_quant, silu_mul
from tests.runtime.fusion.graphs import (
    DEVICE,
    E4M3,
    D,
    activated,
    assert_same_bits,
    by,
    quantise,
    rewrite,
    rows,
    with_scale,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


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
