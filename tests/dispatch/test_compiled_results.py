"""What a compiled graph gives has the values and strides of the eager call, also where it is empty.

Inductor compiles the calls, because its code asserts the sizes and strides that the fake kernel promised.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

import polyfuse
from polyfuse.conformance import cases, make_inputs, place
from polyfuse.spec import OPS
from polyfuse.spec.block_quant import SCALE_LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # Inductor's own


def cells() -> Iterator[tuple[str, str, dict[str, object]]]:
    """An op, one of its conformance cases, and the dimensions and attributes that are changed in it."""
    for width, rows in product((24, 0), (None, 150)):
        yield "pos_embed_interpolate", "width_zero", {"D": width, "out_rows": rows}
        yield "pos_embed_interpolate", "grid_as_tensor", {"D": width, "out_rows": rows}
    for name in ("rows_67", "rows_0"):
        yield "gdn_post_conv", name, {}
    for state, (name, final) in product(
        ("", "-initial_state"), (("rows_67", True), ("rows_0", True), ("rows_0", False))
    ):
        yield "gdn_conv_prep", f"{name}{state}", {"output_final_state": final}
    for name, final in product(("width_2-plain-int32", "width_4-bias-initial_state-int64"), (True, False)):
        yield "gdn_conv_prep", name, {"output_final_state": final}
    for layout, fmt in product(SCALE_LAYOUTS[:3], ("float32", "ue8m0_packed")):
        for name in (f"lead_0-{layout}", f"lead_67-{layout}", f"experts-{fmt}-{layout}"):
            yield "silu_mul_block_quant", name, {"scale_format": fmt}
        yield "silu_mul_block_quant", f"lead_67-{layout}", {"scale_format": fmt, "D": 0}
        yield "silu_mul_block_quant", f"experts-{fmt}-{layout}", {"...": (3, 0)}
    for strategy in ("auto", "parallel", "merged"):
        for name in (f"lead_0-{strategy}", f"lead_2x3-{strategy}", f"bias-{strategy}"):
            yield "gdn_in_proj", name, {}
        for empty in ("hidden", "N1", "N2"):
            yield "gdn_in_proj", f"lead_2x3-{strategy}", {empty: 0}
    for name in ("lead_", "lead_0", "lead_3x0", "lead_2x3", "width_0", "gate_sliced-bfloat16", "gate_column_strided"):
        yield "gated_rms_norm", name, {}
    for name in ("no_rows", "no_rows-no_segments", "no_segments", "empty_around", "float32-segments"):
        yield "segment_attention", name, {}


CELLS = {
    "-".join([op, name, *(f"{key}_{value}" for key, value in changes.items())]): (op, name, changes)
    for op, name, changes in cells()
}
SOME = [pytest.param(cell, marks=[pytest.mark.slow] if n % 2 else []) for n, cell in enumerate(CELLS)]


def arguments(op, name, changes):
    case = next(case for case in cases(op) if case.name == name)
    dims = {key: value for key, value in changes.items() if key in case.dims}
    attrs = {key: value for key, value in changes.items() if key not in dims}
    case = replace(case, dims={**case.dims, **dims}, attrs={**case.attrs, **attrs})
    return place(make_inputs(OPS[op], case), "torch", "cpu", case.stacked)


def results(op, values):
    found = getattr(polyfuse, op)(**values)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cell", SOME)
def test_compiled_results_are_those_of_the_eager_call(cell, dynamic):
    torch._dynamo.reset()
    op, name, changes = CELLS[cell]
    values = arguments(op, name, changes)
    arrays = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    options = {key: value for key, value in values.items() if key not in arrays}

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="inductor")
    def compiled(arrays):
        return results(op, {**arrays, **options})

    for got, want in zip(compiled(arrays), results(op, values), strict=True):
        # Eagerly they are views of one buffer; no two results of a graph are.
        strides = torch.empty(want.shape).stride() if options.get("strategy") == "merged" else want.stride()
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, strides)
        assert got.flatten().view(torch.uint8).equal(want.flatten().view(torch.uint8))
