"""`block_quant` in Triton: right on every case, and as the op with SiLU."""

from typing import Any

import numpy as np
import pytest
import torch

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.triton_impl import _common
from polyfuse.triton_impl.block_quant import block_quant
from polyfuse.triton_impl.silu_mul_block_quant import silu_mul_block_quant

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAME = "block_quant"
DEVICE = "cpu" if _common.INTERPRETED.value else "cuda"
CASES = [case for case in cases(NAME) if case.repeat == 1]
QUICK = [pytest.param(case, marks=[pytest.mark.slow] if n % 4 else []) for n, case in enumerate(CASES)]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, poisoned_memory: None) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    before = {k: to_numpy(v).tobytes() for k, v in arrays.items()}
    assert trial.check(block_quant(**arrays, **call.attrs), call) is None
    assert {k: to_numpy(arrays[k]).tobytes() for k in before} == before


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0", "ue8m0_packed"])
def test_it_quantises_as_the_op_with_silu_does(scale_format: str) -> None:
    """A gate of 64 is its own silu, and 2**-6 of a number times 64 is that number."""
    y = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    options: Any = {"group_size": 32, "scale_format": scale_format, "scale_layout": "col_major_tma"}
    got = block_quant(y, **options)
    want = silu_mul_block_quant(torch.cat([torch.full_like(y, 64), y / 64], -1), **options)
    assert [result.float().tolist() for result in got] == [result.float().tolist() for result in want]
