"""Products of quantised rows with their experts' weights: the values of both ways to them, and what is refused."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.nn.functional import ScalingType, scaled_grouped_mm

import polyfuse
from polyfuse.dispatch import Device
from polyfuse.runtime import block_scaled_mm_by_expert
from polyfuse.runtime.quantized import experts
from polyfuse.runtime.quantized.experts import experts_gemm_for, reads_ends, route, sums_of_experts
from tests.runtime.quantized.test_gemm import activation, dequantised, weights
from tests.triton_impl.helpers import DEVICE as NAME

DEVICE = torch.device(NAME)
CUDA = DEVICE.type == "cuda"
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
BF16 = torch.bfloat16
# Of a block's sum, of the magnitudes of what it sums: float32 on a CPU, and some 14 bits on Hopper's matrix units.
ERROR = 2.0**-12 if CUDA else 2.0**-20


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that comes first: PyTorch's products of one expert after the other, or one launch of Triton."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with polyfuse.use_backend(request.param):
        yield request.param


def ends_of(*counts: int) -> Any:
    return torch.tensor(counts, device=DEVICE).cumsum(0).int()


def on(device: torch.device, quantized: Any) -> Any:
    return type(quantized)(quantized.values.to(device), quantized.scales.to(device), quantized.format)


def case(rows: int, experts: int, n: int, k: int, layout: str = "row_major") -> tuple[Any, Any, Any]:
    weight, scale = (array.to(DEVICE) for array in weights(experts, n, k))
    with polyfuse.use_backend("torch"):  # on a CPU
        quantized = activation(rows, k, layout)
    return on(DEVICE, quantized), weight, scale


def errors(got: Any, quantized: Any, weight: Any, scale: Any, ends: Any, tokens: Any = None) -> Any:
    """Of each row that an expert has, the errors as parts of the magnitudes of what was summed, and a rounding."""
    x, w = dequantised(quantized.values, quantized.scales, 1), dequantised(weight, scale, 128)
    x = x if tokens is None else x[tokens]
    found, begin = [], 0
    for expert, end in enumerate(ends.tolist()):
        own = slice(begin, end)
        exact, size = x[own] @ w[expert].t(), x[own].abs() @ w[expert].abs().t()
        rounding = exact.abs() * torch.finfo(got.dtype).eps
        found.append(((got[own].double() - exact).abs() - rounding) / size)
        begin = end
    return torch.cat(found)


@pytest.mark.parametrize("layout", ["row_major", "col_major"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_row_has_the_weight_of_its_expert(backend: str, dtype: torch.dtype, layout: str) -> None:
    if CUDA and backend == "torch" and dtype != BF16:
        pytest.skip("scaled_mm has bfloat16 results only")
    (quantized, weight, scale), ends = case(23, 5, 256, 384, layout), ends_of(3, 0, 17, 2, 1)
    got = block_scaled_mm_by_expert(quantized, weight, scale * 1e-3, ends, dtype)
    assert (got.shape, got.dtype) == ((23, 256), dtype)
    assert errors(got, quantized, weight, scale * 1e-3, ends).amax() <= ERROR
    assert (got != 0).all(-1).all()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_tokens_may_have_many_rows(backend: str, index: torch.dtype) -> None:
    (quantized, weight, scale), ends = case(6, 3, 128, 256), ends_of(4, 5, 1)
    tokens = torch.tensor([5, 0, 0, 3, 3, 5, 1, 2, 4, 0], dtype=index, device=DEVICE)
    got = block_scaled_mm_by_expert(quantized, weight, scale, ends, BF16, tokens=tokens)
    assert errors(got, quantized, weight, scale, ends, tokens).amax() <= ERROR
    taken = block_scaled_mm_by_expert(quantized.take(tokens), weight, scale, ends, BF16)
    assert torch.equal(got, taken)


@pytest.mark.parametrize("counts", [(70, 0, 0), (0, 0, 70), (16, 17, 37), (1, 1, 68), (64, 6, 0)])
def test_experts_of_any_size(backend: str, counts: tuple[int, ...]) -> None:
    """Ends in the middle of tiles and at their ends, and experts with several of them."""
    (quantized, weight, scale), ends = case(70, 3, 128, 128), ends_of(*counts)
    got = block_scaled_mm_by_expert(quantized, weight, scale, ends, BF16)
    assert errors(got, quantized, weight, scale, ends).amax() <= ERROR


def test_many_experts_of_which_few_have_rows(backend: str) -> None:
    counts = [0] * 300
    counts[7], counts[255], counts[299] = 2, 1, 3
    (quantized, weight, scale), ends = case(6, 300, 128, 128), ends_of(*counts)
    got = block_scaled_mm_by_expert(quantized, weight, scale, ends, BF16)
    assert errors(got, quantized, weight, scale, ends).amax() <= ERROR


def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    """Of calls with as many rows, and so with the same tiles."""
    quantized, weight, scale = case(40, 4, 128, 256)
    one = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(7, 20, 10, 3), BF16)
    order = torch.arange(40, device=DEVICE).roll(5)
    other = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(0, 30, 10, 0), BF16, tokens=order)
    places = [i for i in range(40) if 7 <= order[i] < 27 and i < 30]
    assert len(places) == 18
    assert torch.equal(other[places], one[order[places]])


def test_rows_past_the_last_end_and_ends_past_the_rows(backend: str) -> None:
    quantized, weight, scale = case(9, 2, 128, 128)
    whole = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(4, 5), BF16)
    some = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(4, 2), BF16)
    assert torch.equal(some[:6], whole[:6])
    beyond = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(4, 100), BF16)
    assert torch.equal(beyond, whole)


def test_weights_with_strides(backend: str) -> None:
    (quantized, weight, scale), ends = case(5, 4, 128, 256), ends_of(2, 3)
    want = block_scaled_mm_by_expert(quantized, weight[::2].contiguous(), scale[::2].contiguous(), ends, BF16)
    assert torch.equal(block_scaled_mm_by_expert(quantized, weight[::2], scale[::2], ends, BF16), want)


def test_no_rows(backend: str) -> None:
    quantized, weight, scale = case(4, 2, 128, 128)
    nobody = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    got = block_scaled_mm_by_expert(quantized, weight, scale, ends_of(0, 0), BF16, tokens=nobody)
    assert (got.shape, got.dtype) == ((0, 128), BF16)


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_a_routing_sorts_tokens_by_their_experts(backend: str, index: torch.dtype) -> None:
    chosen = torch.tensor([[2, 0], [1, 2], [4, 2], [0, 4]], dtype=index, device=DEVICE)  # expert 4 is elsewhere
    routing = route(chosen, 4)
    assert routing.ends.tolist() == [2, 3, 6, 6]
    assert routing.ends.dtype == torch.int32
    assert routing.tokens.tolist()[:6] == [0, 3, 1, 0, 1, 2]
    assert routing.places[chosen < 4].tolist() == [3, 0, 2, 4, 5, 1]
    assert (routing.places[chosen == 4] >= 6).all()


@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(1, 1, 1), (5, 8, 300), (700, 7, 9), (1500, 3, 2)])
def test_a_routing_of_any_size(backend: str, tokens: int, chosen: int, experts: int) -> None:
    """Up to more than one look of a program; one expert in eight is elsewhere, and has any other number."""
    generator = torch.Generator().manual_seed(tokens)
    of = torch.randint(0, experts + experts // 8 + 1, (tokens, chosen), generator=generator)
    given = of.clone()
    given[of >= experts] = torch.tensor([-1, experts, 2**40, -(2**40)])[torch.arange(int((of >= experts).sum())) % 4]
    routing = route(given.to(DEVICE), experts)
    order = of.flatten().argsort(stable=True)
    here = int((of < experts).sum())
    assert (
        routing.ends.tolist() == of.flatten().clamp(max=experts).bincount(minlength=experts + 1)[:-1].cumsum(0).tolist()
    )
    assert routing.tokens.cpu()[:here].tolist() == (order // chosen)[:here].tolist()
    assert routing.places.cpu().flatten()[order[:here]].tolist() == list(range(here))
    assert (routing.places.cpu()[of >= experts] >= here).all()


@pytest.mark.parametrize("by_number", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_round_each_product_and_the_sum(backend: str, dtype: torch.dtype, by_number: bool) -> None:
    """Of experts elsewhere nothing is added, not even what is not a number."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(11)])  # of 6, 4 are here
    routing = route(chosen.to(DEVICE), 4)
    results = torch.randn(33, 200, generator=generator).to(dtype)
    results[int(routing.ends[-1]) :] = float("nan")
    weights = torch.rand(11, 3, generator=generator)
    got = sums_of_experts(results.to(DEVICE), weights.to(DEVICE), routing, by_number=by_number).cpu()
    want = []
    for places, numbers, row in zip(routing.places.cpu(), chosen, weights, strict=True):
        total = torch.zeros(200)
        for i in numbers.argsort() if by_number else range(3):
            if numbers[i] < 4:
                total += (results[places[i]] * row[i].to(dtype)).float()
        want.append(total.to(dtype))
    assert got.dtype == dtype
    assert torch.equal(got, torch.stack(want))


QUANTIZED, WEIGHT, SCALE = case(4, 2, 128, 128)
ENDS = ends_of(1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": WEIGHT[0]}, r"weights: expected 3 dimensions, the first of experts, got \[128, 128\]"),
        ({"weights": WEIGHT[:0]}, r"weights: expected 3 dimensions, the first of experts, got \[0, 128, 128\]"),
        ({"weight_scales": SCALE[:1]}, "weight_scales: expected those of 2 experts, got 1"),
        ({"expert_ends": ENDS.long()}, r"expert_ends: expected int32 \[2\], got int64 \[2\]"),
        ({"expert_ends": ENDS[:1]}, r"expert_ends: expected int32 \[2\], got int32 \[1\]"),
        ({"dtype": torch.int8}, "dtype: expected one of float32, bfloat16, float16, got int8"),
        ({"tokens": torch.ones(3)}, r"tokens: expected int32 or int64 \[rows\], got float32 \[3\]"),
        ({"expert_ends": ENDS.to("meta")}, f"expert_ends: expected an array on {DEVICE}"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, backend: str) -> None:
    given = {"weights": WEIGHT, "weight_scales": SCALE, "expert_ends": ENDS, "dtype": BF16}
    with pytest.raises(polyfuse.SpecError, match=f"block_scaled_mm_by_expert: {message}"):
        block_scaled_mm_by_expert(QUANTIZED, **(given | arguments))


def test_weights_of_another_width_are_refused(backend: str) -> None:
    _, weight, scale = case(4, 2, 128, 256)
    with pytest.raises(polyfuse.SpecError, match=r"weight: expected float8_e4m3fn \[N, 128\]"):
        block_scaled_mm_by_expert(QUANTIZED, weight, scale, ENDS, BF16)


@pytest.mark.skipif(CUDA, reason="where nothing but a CPU is there")
def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tl = pytest.importorskip("triton.language")
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    grouped, one_by_one = "a Triton kernel, all experts in one launch", "expert by expert"
    assert experts_gemm_for(cpu, BF16) == f"written-out products on the CPU, {one_by_one}"
    assert reads_ends(cpu, BF16)
    with polyfuse.use_backend("triton"):
        assert experts_gemm_for(cpu, BF16) == grouped
        assert not reads_ends(cpu, BF16)
        assert experts_gemm_for(cpu, torch.int8) == ""
        monkeypatch.setattr(import_module(experts.KERNELS), "INTERPRETED", tl.constexpr(False))
        experts._able_kernels.cache_clear()
        assert experts_gemm_for(cpu, BF16) == f"written-out products on the CPU, {one_by_one}"
    monkeypatch.setattr(experts, "gemm_for", lambda device, dtype: "scaled_mm" if dtype == BF16 else "")
    for arch, expected in (((8, 0), ""), ((8, 9), grouped), ((9, 0), grouped), ((10, 0), grouped)):
        monkeypatch.setattr(experts, "torch_device", lambda device, arch=arch: Device("cuda", arch))
        assert experts_gemm_for(gpu, torch.float16) == expected
        with polyfuse.use_backend("torch"):
            assert experts_gemm_for(gpu, BF16) == "scaled_mm, expert by expert"
            assert reads_ends(gpu, BF16)
    monkeypatch.setattr(experts, "torch_device", lambda device: Device("rocm", (9, 4)))
    assert experts_gemm_for(gpu, torch.float16) == ""
    experts._able_kernels.cache_clear()


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_pytorch_has_no_grouped_gemm_of_these_blocks() -> None:
    """Once it has one, `block_scaled_mm_by_expert` is to be compared with it: this fails then."""
    quantized, weight, scale = case(8, 2, 256, 256)
    with pytest.raises(ValueError, match="No gemm implementation was found"):
        scaled_grouped_mm(
            quantized.values,
            weight.transpose(1, 2),
            quantized.scales,
            ScalingType.BlockWise1x128,
            scale,
            ScalingType.BlockWise128x128,
            offs=ends_of(4, 4),
            output_dtype=torch.bfloat16,
        )
