"""What all of these tests run with."""

from collections.abc import Iterator

import pytest
import torch

from polyfuse.runtime import fusion


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    fusion.disable()
