from types import SimpleNamespace
from typing import Any

from polyfuse.conformance.checks.strides import APART, EXPANDED, _some


def attempt(case: str, *, slow: bool) -> Any:
    return SimpleNamespace(slow=slow, case=SimpleNamespace(name=case))


def test_where_calls_are_slow_a_case_has_one_layout_of_an_argument_alone() -> None:
    cases = [f"case_{i}" for i in range(40)]
    for layouts in (APART, EXPANDED):
        assert _some(attempt("case", slow=False), "x", layouts) == layouts
        for name in ("x", "weight"):
            chosen = [_some(attempt(case, slow=True), name, layouts) for case in cases]
            assert all(len(some) == 1 for some in chosen)
            assert {some[0] for some in chosen} == set(layouts)
