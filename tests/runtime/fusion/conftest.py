"""What all of these tests run with."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from polyfuse.runtime import fusion


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()  # those of other tests, which reports would begin with
    with torch.no_grad():
        yield
    fusion.disable()
