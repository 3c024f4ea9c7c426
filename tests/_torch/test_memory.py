"""New tensors are those that PyTorch's own functions make."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polyfuse._torch.memory import allocator, contiguous_strides, new

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
SHAPES = [(), (0,), (5,), (3, 0, 2), (2, 1, 7), (4, 16, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_are_those_of_a_contiguous_tensor(shape: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_new_tensor_is_like_one_of_pytorch(device: str, inference: bool) -> None:
    place = torch.empty(0, device=device).device
    with torch.inference_mode(inference):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.float32):
            ours, want = new(place, ((2, 3), dtype), ((0, 3), dtype)), torch.empty(2, 3, dtype=dtype, device=place)
            assert [tuple(x.shape) for x in ours] == [(2, 3), (0, 3)]
            for x in ours:
                assert (x.dtype, x.device, x.is_inference()) == (dtype, place, inference)
                assert (x.layout, x.requires_grad) == (want.layout, want.requires_grad)
                assert x.is_contiguous()
            assert ours[0].stride() == want.stride()
            ours[0].zero_()
            assert not ours[0].view(torch.uint8).any()


@pytest.mark.parametrize("device", DEVICES)
def test_strides_may_leave_gaps(device: str) -> None:
    place = torch.empty(0, device=device).device
    x = allocator(place)((3, 2), (1, 5), torch.int32)
    assert (x.stride(), x.untyped_storage().nbytes()) == ((1, 5), 4 * (1 + 2 + 5))
    x.copy_(torch.arange(6).view(3, 2))
    assert x.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_memory_that_pytorch_fills_is_filled() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        (x,) = new(torch.device("cpu"), ((3,), torch.float32))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    assert x.isnan().all()


def test_a_dispatch_mode_hears_of_a_new_tensor() -> None:
    seen: list[object] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    with Listener():
        new(torch.device("cpu"), ((4,), torch.float32))
    assert seen == [torch.ops.aten.empty_strided.default]


def test_tensors_of_one_call_share_no_memory() -> None:
    first, second = new(torch.device("cpu"), ((4,), torch.float32), ((4,), torch.float32))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_need_not_be_the_current_one() -> None:
    with torch.cuda.device(0):
        (x,) = new(torch.device("cuda", 1), ((4,), torch.float32))
        assert x.device == torch.device("cuda", 1)


def test_a_device_that_has_no_shorter_way_is_served_by_pytorch() -> None:
    assert allocator(torch.device("meta"))((2, 3), (3, 1), torch.float32).is_meta
