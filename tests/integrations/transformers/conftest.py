"""What all of these tests run with."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import polyfuse


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More are slower on products this small, and far slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def op_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops in the order of their calls."""
    from tests.integrations.transformers.gated_delta_net_models import DECODE, PREFILL, spy

    seen: list[str] = []
    for name in {*PREFILL, *DECODE}:
        monkeypatch.setattr(polyfuse, name, spy(seen, name, getattr(polyfuse, name)))
    return seen


@pytest.fixture
def fp8_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the results of the model's FP8 linear function, as it is called."""
    from transformers.integrations import finegrained_fp8

    from tests.integrations.transformers.fp8_mlp_models import emulated_linear

    widths: list[int] = []

    def recorded(input: Any, weight: Any, *args: Any, **options: Any) -> Any:
        widths.append(len(weight))
        return emulated_linear(input, weight, *args, **options)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", recorded)
    return widths
