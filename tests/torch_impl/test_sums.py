from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyfuse.torch_impl._sums import fixed_sum


class Elsewhere(torch.Tensor):
    """A tensor that says that it is not on the CPU."""

    @property
    def device(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(type="cuda")


@pytest.mark.parametrize("size", [0, 1, 2, 3, 80, 128])
@pytest.mark.parametrize("dim", [-1, -2, 0])
@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_it_is_the_sum(size: int, dim: int, kind: type[torch.Tensor]) -> None:
    shape = [3, 2, 4]
    shape[dim] = size
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fixed_sum(x.as_subclass(kind), dim)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), x.sum(dim, keepdim=True))


def test_numbers_are_added_by_halves_and_gradients_flow() -> None:
    x = torch.tensor([1.0, 2.0**24, 1.0], requires_grad=True)
    found = fixed_sum(x.as_subclass(Elsewhere), 0)
    assert float(found.detach()) == 2.0**24 + 2  # (1 + 1) + (2**24 + 0)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert float(fixed_sum(x.detach(), 0)) == float(x.detach().sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose sums depend on how many there are")
@pytest.mark.parametrize("size", [80, 128, 256, 7168])
def test_a_row_alone_has_the_same_bits(size: int) -> None:
    x = torch.randn(300, size, device="cuda")
    whole = fixed_sum(x, -1)
    assert all(torch.equal(fixed_sum(x[i : i + n], -1), whole[i : i + n]) for i, n in ((0, 1), (7, 1), (100, 31)))
