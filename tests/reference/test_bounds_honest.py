"""A backend that computes in float32 sits within every interval, whatever the seed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import polyfuse
from polyfuse.conformance import Case, Trial, cases, compare, make_inputs
from polyfuse.dispatch import registry
from polyfuse.reference import Exact, oracle
from polyfuse.reference._numerics import F64, to_f64
from polyfuse.spec import FP32_ROUNDOFF, FP32_TINY, OPS

SEEDS = range(20)
HEADS_OF_128 = {"num_k_heads": 2, "head_k_dim": 128, "head_v_dim": 16}

# The interpreter computes with NumPy, which reports what overflows or is invalid.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def own(op: str, *names: str) -> list[Case]:
    """Cases of the op whose names begin so."""
    found = [case for case in cases(op) if case.name.startswith(names)]
    assert len(found) >= len(names)
    return found


def projections() -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    for hidden in (64, 2048, 4096):
        dims = {"...": (4,), "hidden": hidden, "N1": 48, "N2": 8}
        for dtype in ("float32", "bfloat16"):
            yield "gdn_in_proj", Case(f"hidden_{hidden}-{dtype}", dims, {}, {"T": dtype}), ("torch", "jax")


def heads_of_128() -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    for dtype in ("float32", "bfloat16"):
        post = Case(f"k128-{dtype}", {"L": 4, "HV": 4}, HEADS_OF_128, {"T": dtype})
        yield "gdn_post_conv", post, ("torch", "jax", "triton")
        prep = Case(f"k128-{dtype}", {"L": 4, "HV": 4, "W": 4}, HEADS_OF_128, {"T": dtype}, present=("bias",))
        yield "gdn_conv_prep", prep, ("torch", "jax", "triton")


def rows_of_128() -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    for activation in ("silu", "sigmoid"):
        dims, attrs = {"...": (8,), "V": 128}, {"activation": activation}
        yield "gated_rms_norm", Case(f"v128-{activation}", dims, attrs), ("torch", "jax", "triton")


def own_cases() -> Iterator[tuple[str, Case, tuple[str, ...]]]:
    for op in ("gdn_post_conv", "gdn_conv_prep"):
        for case in own(op, "gates_wide_line"):
            yield op, case, ("torch", "jax")
    for case in own("gated_rms_norm", "gate_wide_line", "width_1000"):
        yield "gated_rms_norm", case, ("torch", "jax", "triton")
    for case in own("silu_mul_block_quant", "ties"):
        yield "silu_mul_block_quant", case, ("torch", "jax", "triton")
    for case in own("pos_embed_interpolate", "grid_points"):
        yield "pos_embed_interpolate", case, ("torch", "jax", "triton")


ALL = (*projections(), *heads_of_128(), *rows_of_128(), *own_cases())
HONEST = [(backend, op, case) for op, case, names in ALL for backend in names]


@pytest.mark.parametrize(("backend", "op", "case"), HONEST, ids=[f"{b}-{op}-{case.name}" for b, op, case in HONEST])
def test_an_honest_backend_is_within_the_bounds(backend: str, op: str, case: Case) -> None:
    seeds = SEEDS if backend != "triton" else SEEDS[:3]  # interpreted, a tenth of a second each
    verdicts = {seed: Trial(op, case, seed).on(registry().get(backend)) for seed in seeds}
    assert {seed: verdict for seed, verdict in verdicts.items() if verdict != ("passed", "")} == {}


def flushed(x: Any) -> Any:
    """float32 numbers, of which subnormal ones count as zero."""
    x = np.asarray(x, np.float32)
    return np.where(np.abs(x) < np.float32(FP32_TINY), np.float32(0), x)


def flushing_gates(values: dict[str, Any]) -> tuple[Any, Any]:
    """g and beta in float32 on a machine that flushes every subnormal input and result."""
    a, dt_bias, A_log, b = (flushed(values[name]) for name in ("a", "dt_bias", "A_log", "b"))
    with np.errstate(over="ignore", under="ignore"):
        x = flushed(a + dt_bias)
        softplus = flushed(np.maximum(x, 0) + flushed(np.log1p(flushed(np.exp(-np.abs(x))))))
        g = flushed(-flushed(np.exp(A_log)) * softplus)
        beta = flushed(1 / (1 + np.exp(-b)))
        return flushed(np.exp(g)) if values["output_g_exp"] else g, beta


@pytest.mark.parametrize("op", ["gdn_post_conv", "gdn_conv_prep"])
@pytest.mark.parametrize("name", ["gates_wide_line-g_exp_False", "gates_wide_line-g_exp_True"])
def test_a_backend_that_flushes_subnormals_is_within_the_bounds(op: str, name: str) -> None:
    [case] = own(op, name)
    for seed in SEEDS:
        values = make_inputs(OPS[op], case, seed)
        exact, (g, beta) = oracle(op).intervals(**values), flushing_gates(values)
        assert compare("g", g, exact["g"], "float32") is None
        assert compare("beta", beta, exact["beta"], "float32") is None


def test_a_flushed_softplus_counts_as_often_as_the_rate_multiplies_it() -> None:
    """Where A_log is above 0, one flush that counts once is less than a flushed softplus changes."""
    [case] = own("gdn_post_conv", "gates_wide_line-g_exp_False")
    rejected = 0
    for seed in SEEDS:
        values = make_inputs(OPS["gdn_post_conv"], case, seed)
        value: F64 = oracle("gdn_post_conv").intervals(**values)["g"].value
        x, rate = to_f64(values["a"]) + to_f64(values["dt_bias"]), np.abs(to_f64(values["A_log"]))
        relative = 8 * FP32_ROUNDOFF * np.abs(value) * (1 + np.abs(x) + rate)
        once = Exact.around(value, relative + FP32_TINY)
        rejected += compare("g", flushing_gates(values)[0], once, "float32") is not None
    assert rejected >= len(SEEDS) // 2


def test_the_wide_line_reaches_where_float32_is_subnormal() -> None:
    [case] = own("gdn_post_conv", "gates_wide_line-g_exp_False")
    g = polyfuse.gdn_post_conv(**make_inputs(OPS["gdn_post_conv"], case, 0))[3]
    assert ((g != 0) & (np.abs(g) < np.float32(FP32_TINY))).any()
