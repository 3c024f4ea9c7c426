"""The self-test: every check has defects of its own, and the run says so if one of them survives."""

from typing import Any

import pytest

from polyfuse.conformance import checks as package
from polyfuse.conformance import selftest
from polyfuse.conformance.checks import checks
from polyfuse.conformance.defects import Defect, defects
from polyfuse.conformance.defects.rows import another_order_from_32_rows_on

ONLY_ON_A_GPU = ("execution",)

# Of each check a defect that no other one rejects: without the check it survives.
SOLE = {
    "again": "weight_read_once_for_each_memory",
    "alone": "another_order_from_32_rows_on",
    "contexts": "wrong_in_inference_mode",
    "gradients": "gradient_of_the_decay_of_the_wrong_sign",
    "inputs": "an_input_that_needs_a_gradient_afterwards",
    "memory": "misaligned_inputs_misread",
    "processes": "wrong_after_a_fork",
    "races": "scratch_memory_for_all_threads",
    "repeats": "rows_past_1100_left_out",
    "results": "q_and_k_in_one_buffer",
    "strides": "row_stride_ignored",
    "values": "last_element_of_a_large_call_dropped",
}


def found(name: str) -> Defect:
    return next(defect for defect in defects() if defect.name == name)


def test_every_check_has_a_defect_of_its_own() -> None:
    assert set(SOLE) | set(ONLY_ON_A_GPU) == set(checks())
    assert {defect.check for defect in defects()} == set(SOLE)
    assert len({defect.name for defect in defects()}) >= 60


@pytest.mark.parametrize("check", SOLE)
def test_without_the_check_its_defect_survives(check: str) -> None:
    defect = found(SOLE[check])
    assert selftest.rejecting(defect, only=("values", check)) == {check}
    assert selftest.rejecting(defect, only=set(checks()) - {check}) == set()


@pytest.mark.parametrize(
    "defect",
    [d for d in defects() if d.op == "gated_rms_norm" and d.check != "values"],
    ids=lambda d: f"{d.name}-{d.backend}",
)
def test_a_defect_is_rejected_by_its_check(defect: Defect) -> None:
    assert defect.check in selftest.rejecting(defect, only=("values", defect.check))


@pytest.mark.slow
def test_every_wrong_implementation_is_rejected() -> None:
    lines: list[str] = []
    assert selftest.run(lines.append), lines


def test_a_survivor_fails_the_run_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        PROVES = "Nothing."

        def check(self, attempt: Any) -> Any:
            return iter(())

    seen = {**checks(), "alone": Blind()}
    defect = Defect(
        "order", "gated_rms_norm", "alone", another_order_from_32_rows_on, cases=("float32-sigmoid-offset_1.0",)
    )
    monkeypatch.setattr(selftest, "checks", lambda: seen)
    monkeypatch.setattr(selftest, "defects", lambda: (defect,))
    monkeypatch.setattr(selftest, "_run_mutants", lambda out, ops: iter(()))
    lines: list[str] = []
    assert not selftest.run(lines.append, ops=["gated_rms_norm"])
    assert lines[0] == "gated_rms_norm: alone: 0 of 1 planted defects rejected"
    assert lines[1] == "survives: gated_rms_norm: alone: order"
    assert package.checks()["alone"] is not seen["alone"]


def test_what_cannot_run_here_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    defect = Defect("order", "gated_delta_rule", "alone", another_order_from_32_rows_on, backend="absent")
    monkeypatch.setattr(selftest, "defects", lambda: (defect,))
    monkeypatch.setattr(selftest, "_run_mutants", lambda out, ops: iter(()))
    lines: list[str] = []
    assert selftest.run(lines.append)
    assert lines[0].startswith("gated_delta_rule: alone: order: not run: backend: expected one of")
