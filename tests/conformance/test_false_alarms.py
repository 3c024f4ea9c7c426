"""What is right passes every check: unusual backends, and the built-in ones on their core cases."""

from dataclasses import replace

import pytest

import polyfuse
from polyfuse.conformance import Trial
from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.cases import all_cases, cases
from polyfuse.conformance.checks import checks
from polyfuse.conformance.defects._planted import planted
from polyfuse.dispatch import Backend, registry
from polyfuse.spec import OPS
from tests.conformance.unusual import UNUSUAL

# Those that are loops of many small calls, or are compiled.
SLOW = ("compiled", "one_sequence_after_another")
LONG = ("segment_attention",)
NOT_DIFFERENTIABLE = ("products_out_of_place", "one_sequence_after_another")


def backend_of(name: str) -> tuple[str, Backend]:
    """The op of an unusual backend, and the backend."""
    op, make = UNUSUAL[name]
    right = registry().get("torch").load(op).capability
    return op, planted(
        "unusual", op, "torch", make, replace(right, differentiable=False) if name in NOT_DIFFERENTIABLE else right
    )


def complaints(backend: Backend, op: str, name: str, seed: int, left_out: tuple[str, ...] = ()) -> list[str]:
    case = next(c for found in (cases, all_cases) for c in found(op) if c.name == name)
    attempt = Attempt(Trial(op, case, seed), backend, "cpu", backend.load(op).capability)
    if attempt.support.status != "usable":
        return []
    return [
        f"{check}: {line}"
        for check, module in checks().items()
        if check not in left_out
        for line in module.check(attempt)
    ]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in UNUSUAL])
def test_an_unusual_backend_is_right(name: str) -> None:
    op, backend = backend_of(name)
    try:
        assert complaints(backend, op, OPS[op].core[0], 0, ("races",)) == []
    finally:
        polyfuse.refresh()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_backend_is_right_on_every_seed(name: str, seed: int) -> None:
    op, backend = backend_of(name)
    try:
        for case in OPS[op].core:
            assert complaints(backend, op, case, seed, () if seed == 0 else ("races",)) == []
    finally:
        polyfuse.refresh()


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow if op in LONG else ()) for op in OPS])
@pytest.mark.parametrize("name", ["torch", "numpy", "jax"])
def test_a_built_in_backend_is_right(name: str, op: str) -> None:
    backend = registry().get(name)
    assert complaints(backend, op, OPS[op].core[0], 0, ("races",)) == []


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("silu_mul_block_quant", "experts-float32-row_major"),  # num_rows, of experts and not of rows
        ("gated_rms_norm", "lead_"),  # no leading dimensions
        ("gdn_decode", "tokens_2-int32-accepted"),  # num_accepted, of sequences
        ("gdn_in_proj", "float16-merged"),  # weights in one buffer, under autocast
        ("block_quant", "nvfp4-row_major"),  # global_scale, of no dimensions
    ],
)
def test_a_call_of_an_unusual_form_is_right(op: str, case: str) -> None:
    assert complaints(registry().get("torch"), op, case, 0, ("races",)) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["torch", "numpy", "jax", "pallas", "triton"])
def test_a_built_in_backend_is_right_on_all_core_cases(name: str, op: str) -> None:
    backend = registry().get(name)
    if backend.missing(op):
        pytest.skip(f"{name} does not implement {op}")
    for case in OPS[op].core:
        assert complaints(backend, op, case, 0) == []


@pytest.mark.parametrize(
    "case",
    [
        "pair-segments_around_128-q.fill_tiny",
        "pair-segments_one_row-heads_dim_1x33",
        pytest.param("pair-T_float32-segments_1030_rows", marks=pytest.mark.slow),
        pytest.param("pair-segments_1030_rows-heads_dim_1x128", marks=pytest.mark.slow),
    ],
)
def test_sums_of_like_terms_are_rounded_in_one_direction(case: str) -> None:
    """Attention whose weights and values are alike, and the gradient of what does not change its result."""
    assert complaints(registry().get("torch"), "segment_attention", case, 0, ("races", "processes")) == []
