"""The gradients that a backend claims, against differences of the oracle's formula in float64."""

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

import ml_dtypes
import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.dispatch import family_of, from_numpy, to_numpy
from polyfuse.reference import oracle
from polyfuse.reference._numerics import F64, numpy_dtype, round_to, to_f64
from polyfuse.spec import FLOATS, FP32_ROUNDOFF

PROVES = (
    "Where a backend claims gradients, those of every argument are the slopes of the oracle's formula in three random "
    "directions (core cases and cases of ordinary values)."
)

DIRECTIONS = 3
# A gradient is rounded once to its argument's dtype, at random; and computed in float32 from results and intermediates
# of the forward pass, each with some hundred roundings at most.
DEVIATIONS, STEPS = 6.0, 512.0
STEP = 1e-6  # of a difference, relative to an argument's size: the cube root of float64's roundoff
ORDINARY = ("normal", "integers")


def check(attempt: Attempt) -> Iterator[str]:
    """Which argument's gradient is not the slope of the formula."""
    if attempt.family == "numpy" or not attempt.single or attempt.call.updated or not attempt.capability.differentiable:
        return
    usual = all(fill in ORDINARY or fill.startswith("cu_seqlens") for fill in attempt.case.fill.values())
    if not (attempt.trial.core or usual) or (attempt.family == "jax" and not attempt.trial.core):
        return
    exact = oracle(attempt.op).exact(attempt.made)
    names = list(_floats(attempt.made))
    if not names or not all(np.isfinite(x).all() for x in exact.values()):
        return
    rng = np.random.default_rng(attempt.trial.seed)
    # What the loss weighs each result with, as a backend gets it: with 0 where anything is right.
    weights = {
        o.name: to_f64(round_to(rng.standard_normal(exact[o.name].shape) * ~free, o.dtype))
        for o, free in zip(attempt.call.outputs, attempt.free, strict=False)
    }
    terms = sum(float((np.abs(w) * np.maximum(np.abs(exact[name]), 1)).sum()) for name, w in weights.items())
    gradients = _gradients(attempt, names, weights)
    for name in names:
        got = gradients[name]
        if got is None:  # which counts as zero
            got = np.zeros(attempt.made[name].shape)
        if got.shape != attempt.made[name].shape or not np.isfinite(got).all():
            yield f"{name}: expected a finite gradient {list(attempt.made[name].shape)}, got {list(got.shape)}"
            continue
        yield from _compared(attempt, name, got, weights, terms, rng)


def _floats(made: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that have gradients: arrays of finite floats."""
    floats = {name: x for name, x in made.items() if isinstance(x, np.ndarray) and x.dtype.name in FLOATS and x.size}
    return {name: x for name, x in floats.items() if np.isfinite(to_f64(x)).all()}


def _compared(attempt: Attempt, name: str, got: F64, weights: dict[str, F64], terms: float, rng: Any) -> Iterator[str]:
    value = to_f64(attempt.made[name])
    largest = max(1.0, *(float(np.abs(to_f64(x)).max()) for x in _floats(attempt.made).values()))
    dtype = attempt.made[name].dtype.name
    roundoff = max(float(ml_dtypes.finfo(numpy_dtype(dtype)).eps) / 2, FP32_ROUNDOFF)
    outputs = max(float(ml_dtypes.finfo(numpy_dtype(o.dtype)).eps) / 2 for o in attempt.call.outputs)
    step = STEP * max(float(np.abs(value).max()), 1e-3)
    for number in range(DIRECTIONS):
        direction = rng.choice([-1.0, 1.0], value.shape)
        high, low = (_loss(attempt, {name: value + sign * step * direction}, weights) for sign in (1, -1))
        slope = (high - low) / (2 * step)
        found = float((got * direction).sum())
        # Of 16-bit results what flows back is rounded on the way too.
        size = sqrt(float((got * got).sum())) * (roundoff + outputs) * DEVIATIONS
        size += float(np.abs(got).sum()) * FP32_ROUNDOFF * STEPS
        # Where terms cancel, each has roundings of its own: a weight times a result, a difference, a product with it,
        # and the sums of such terms in vector lanes.
        size += terms * largest * FP32_ROUNDOFF * 8
        noise = 2.0**-50 * max(abs(high), abs(low), 1.0) * 100 / step
        if not abs(found - slope) <= size + noise + 1e-6 * abs(slope):
            yield (
                f"the gradient of {name}: in direction {number} the slope is {slope:.9g} (within {size + noise:.3g}), "
                f"the gradient gives {found:.9g}"
            )
            return


def _loss(attempt: Attempt, changed: dict[str, F64], weights: dict[str, F64]) -> float:
    results = oracle(attempt.op).exact({**attempt.made, **changed})
    return float(sum((weights[name] * results[name]).sum() for name in weights))


def _gradients(attempt: Attempt, names: list[str], weights: dict[str, F64]) -> dict[str, F64 | None]:
    cotangents = [
        from_numpy(round_to(weights[o.name], o.dtype), attempt.family, attempt.device) for o in attempt.call.outputs
    ]
    arrays = attempt.place()
    if attempt.family == "jax":
        import jax

        fixed = {name: x for name, x in arrays.items() if name not in names}
        _, back = jax.vjp(lambda given: attempt.run({**fixed, **given}), {name: arrays[name] for name in names})
        (found,) = back(tuple(cotangents))
        return {name: to_f64(to_numpy(x)) for name, x in found.items()}
    import torch

    with torch.enable_grad():
        leaves = {name: arrays[name].requires_grad_() for name in names}
        outputs = attempt.run({**arrays, **leaves})
        felt = [(x, g) for x, g in zip(outputs, cotangents, strict=True) if family_of(x) == "torch" and x.requires_grad]
        if not felt:
            return dict.fromkeys(names)
        results, grads = zip(*felt, strict=True)
        reached: Any = torch.autograd.grad(results, list(leaves.values()), grads, allow_unused=True)
    return {name: None if x is None else to_f64(to_numpy(x)) for name, x in zip(names, reached, strict=True)}
