"""What other packages put in Triton's place in a process is none of our kernels' business."""

import pytest
import triton

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.spec import OPS

TRITON = registry().get("triton")


@pytest.mark.parametrize("op", [op for op in OPS if op in TRITON.implements])
def test_kernels_run_where_triton_s_helpers_were_replaced(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang 0.5 replaces `next_power_of_2` when it is imported."""
    for name in ("cdiv", "next_power_of_2"):
        monkeypatch.setattr(triton, name, None)
    case: Case = cases(op)[0]
    assert Trial(op, case, seed=0).on(TRITON)[0] == "passed"
