"""`block_quant` in plain PyTorch: right on every case, from whatever memory."""

import numpy as np
import pytest

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import from_numpy, to_numpy
from polyfuse.torch_impl.block_quant import block_quant

NAME = "block_quant"
CASES = [case for case in cases(NAME) if case.repeat == 1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_oracle_and_leaves_its_inputs(case: Case) -> None:
    trial = Trial(NAME, case, 0)
    values, call = trial.inputs()
    arrays = {k: from_numpy(v, "torch", "cpu") for k, v in values.items() if isinstance(v, np.ndarray)}
    before = {k: to_numpy(v).tobytes() for k, v in arrays.items()}
    assert trial.check(block_quant(**arrays, **call.attrs), call) is None
    assert {k: to_numpy(arrays[k]).tobytes() for k in before} == before
