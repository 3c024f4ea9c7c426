"""`rms_norm_block_quant` in Triton: right on every case, and no tile changes a bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.triton_impl import _common
from polyfuse.triton_impl import rms_norm_block_quant as module
from polyfuse.triton_impl.rms_norm_block_quant import rms_norm_block_quant

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NAME = "rms_norm_block_quant"
DEVICE = "cpu" if _common.INTERPRETED.value else "cuda"
CASES = [case for case in cases(NAME) if case.repeat == 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle(case: Case, poisoned_memory: None) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    arrays = {k: from_numpy(v, "torch", DEVICE) for k, v in values.items() if isinstance(v, np.ndarray)}
    before = {k: to_numpy(v).tobytes() for k, v in arrays.items()}
    assert trial.check(rms_norm_block_quant(**arrays, **call.attrs), call) is None
    assert {k: to_numpy(arrays[k]).tobytes() for k in before} == before


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_tiles_do_not_change_bits(rows: int, forget_plans: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    weight = torch.linspace(-1, 1, 96, device=DEVICE)
    options: Any = {"residual": residual, "group_size": 32, "weight_offset": 1.0}
    want = rms_norm_block_quant(x, weight, **options)
    forget_plans()
    monkeypatch.setattr(module, "TILES", ((2**63, rows * 128),))
    for one, other in zip(rms_norm_block_quant(x, weight, **options), want, strict=True):
        assert to_numpy(one).tobytes() == to_numpy(other).tobytes()
    for i in range(len(x)):
        alone = rms_norm_block_quant(x[i : i + 1], weight, **options | {"residual": residual[i : i + 1]})
        for one, other in zip(alone, want, strict=True):
            assert to_numpy(one).tobytes() == to_numpy(other[i : i + 1]).tobytes()
