"""Where the oracle leaves a backend a choice, and where it does not."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import polyfuse
from polyfuse.conformance.compare import compare
from polyfuse.dispatch import from_numpy, registry, to_numpy
from polyfuse.reference.silu_mul_block_quant import exact

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def underflowing(dtype: Any) -> Any:
    """Rows of one group of 4: an infinite up beside a gate whose sigmoid is small, normal, or whose silu is small."""
    gate = np.array([[-89.0, 1, 1, 1], [-2000.0, 1, 1, 1], [-86.0, 1, 1, 1], [1e-39, 1, 1, 1], [0, 1, 1, 1]])
    up = np.tile([np.inf, 1, -2, 3], (len(gate), 1))
    return np.concatenate([gate, up], -1).astype(dtype)


@pytest.mark.parametrize("quant_dtype", ["float8_e4m3fn", "int8"])
def test_an_infinite_up_where_sigmoid_or_silu_may_count_as_zero(quant_dtype: str) -> None:
    found = exact(underflowing(np.float32), group_size=4, quant_dtype=quant_dtype)
    nan = 0.0 if quant_dtype == "int8" else np.nan

    def allowed(q: float, scale: float) -> list[bool]:
        """Per row, whether these are right for the finite elements and the scale."""
        qs = np.full((5, 4), q)
        qs[:, 0] = nan
        scales = np.full((5, 1), scale, np.float32)
        right = []
        for i in range(5):
            rows = {name: type(e)(e.value[i], e.low[i], e.high[i]) for name, e in found.items()}
            target = np.dtype(getattr(ml_dtypes, quant_dtype, quant_dtype))
            problems = (
                compare("q", qs[i].astype(target), rows["q"], quant_dtype),
                compare("scale", scales[i], rows["scale"], "float32"),
            )
            right.append(problems == (None, None))
        return right

    assert allowed(0.0, np.inf) == [True, True, True, True, False]
    assert allowed(nan, np.nan) == [True, True, False, True, True]
    assert allowed(0.0, 1.0) == [False] * 5


@pytest.mark.parametrize("name", ["numpy", "jax", "pallas", "torch", "triton"])
@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_every_backend_takes_one_of_the_two(name: str, materialize: bool, scale_format: str) -> None:
    x = underflowing(ml_dtypes.bfloat16)
    options: Any = {"group_size": 4, "materialize": materialize, "scale_format": scale_format}
    backend = registry().get(name)
    with np.errstate(all="ignore"):
        got = polyfuse.silu_mul_block_quant(from_numpy(x, backend.family, "cpu"), backend=name, **options)
    dtypes = ("float8_e4m3fn", "float32" if scale_format == "float32" else "int32")
    for result, (output, want), dtype in zip(got, exact(x, **options).items(), dtypes, strict=True):
        assert compare(output, to_numpy(result), want, dtype) is None
