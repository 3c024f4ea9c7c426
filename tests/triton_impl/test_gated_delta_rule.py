import pytest

from polyfuse.conformance import Case, Trial, cases
from polyfuse.dispatch import registry
from polyfuse.triton_impl._common import INTERPRETED

OP = "gated_delta_rule"
DEVICE = "cpu" if INTERPRETED.value else "cuda"


@pytest.mark.parametrize("case", [c for c in cases(OP) if c.repeat == 1], ids=lambda case: case.name)
def test_cases(case: Case) -> None:
    assert Trial(OP, case, 0).on(registry().get("triton"), DEVICE) == ("passed", "")
