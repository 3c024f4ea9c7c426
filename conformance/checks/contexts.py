"""Where a call is made from: modes, defaults, a compiled function; and what it leaves behind."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import problems
from polyfuse.dispatch import family_of

PROVES = (
    "A call is right in inference mode, with gradients on and off, under autocast, with deterministic algorithms, with "
    "other default dtypes and (JAX) under jit, and leaves these settings, the random states and the environment alone."
)

INFERENCE = "in inference mode"  # where the arguments are made too, as they are in a model that runs in it


def check(attempt: Attempt) -> Iterator[str]:
    """In which context a call is wrong, or which setting it has changed."""
    if not attempt.single:
        return
    for name, context in _contexts(attempt).items():
        outside = attempt.place()
        with context():
            arrays = attempt.place() if name == INFERENCE else outside
            before = _settings(attempt)
            outputs = attempt.run(arrays)
            after = _settings(attempt)
            results = attempt.results(arrays, outputs)
            found = list(problems(results, attempt.call, attempt.exact))
        yield from (f"{name}: {problem}" for problem in found)
        yield from (f"{name}: the backend left {what} changed" for what in before if after[what] != before[what])
        if attempt.family == "torch" and any(x.requires_grad for x in outputs if family_of(x) == "torch"):
            yield f"{name}: a result requires a gradient, though no input does"
    if attempt.family == "jax" and attempt.trial.core:
        yield from _under_jit(attempt)


def _contexts(attempt: Attempt) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """The contexts by name; of a backend that is emulated all of them on its core cases only."""
    if attempt.family != "torch":
        return {"a second call": nullcontext}
    import torch

    kind = torch.device(attempt.device).type
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        INFERENCE: torch.inference_mode,
        "without gradients": torch.no_grad,
        "with gradients on": torch.enable_grad,
        "with float64 as the default dtype": lambda: _default_dtype(torch.float64),
        "with bfloat16 as the default dtype": lambda: _default_dtype(torch.bfloat16),
        "with deterministic algorithms": lambda: _set(torch.are_deterministic_algorithms_enabled, _warning_only, True),
    }
    if kind in ("cpu", "cuda"):
        found["under autocast"] = lambda: torch.autocast(kind, dtype=torch.bfloat16)
    if not attempt.thorough:
        return {name: found[name] for name in (INFERENCE, "with gradients on")}
    return found


def _default_dtype(dtype: Any) -> AbstractContextManager[None]:
    import torch

    return _set(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _warning_only(on: bool) -> None:
    """Switch deterministic algorithms on or off; what has none is no error."""
    import torch

    torch.use_deterministic_algorithms(on, warn_only=True)


@contextmanager
def _set(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    """While this is entered, a setting has that value."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def _settings(attempt: Attempt) -> dict[str, Any]:
    """What a call has no business with."""
    found: dict[str, Any] = {
        "NumPy's random state": _numpy_state(),
        "Python's random state": hash(random.getstate()),
        "NumPy's treatment of errors": str(np.geterr()),
        "the environment": dict(os.environ),
        "the working directory": Path.cwd(),
    }
    if attempt.family == "torch":
        import torch

        found |= {
            "the gradient mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "the default dtype": torch.get_default_dtype(),
            "the default device": str(torch.get_default_device()),
            "PyTorch's random state": torch.get_rng_state().numpy().tobytes(),
            "the number of threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "the precision of matrix products": torch.get_float32_matmul_precision(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "autocast's cache": torch.is_autocast_cache_enabled(),
            "the treatment of subnormal numbers": float(torch.tensor([1e-40]).mul(0.5).item()),
            "anomaly detection": torch.is_anomaly_enabled(),
        }
        if torch.cuda.is_available():
            found |= {
                "the current device": torch.cuda.current_device(),
                "the current stream": torch.cuda.current_stream().cuda_stream,
                "TF32": torch.backends.cuda.matmul.allow_tf32,
                "the device's random state": torch.cuda.get_rng_state().numpy().tobytes(),
                "synchronisation warnings": torch.cuda.get_sync_debug_mode(),
            }
    elif attempt.family == "jax":
        import jax

        found |= {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_default_matmul_precision")}
    return found


def _numpy_state() -> dict[str, Any]:
    """NumPy's random state, its array as bytes: text of 624 numbers takes longer than most calls."""
    state = dict(np.random.get_state(legacy=False))
    parts = state.pop("state")
    return state | {name: x.tobytes() if isinstance(x, np.ndarray) else x for name, x in parts.items()}


def _under_jit(attempt: Attempt) -> Iterator[str]:
    import jax

    arrays = attempt.place()
    traced = {name: x for name, x in arrays.items() if family_of(x) == "jax"}
    fixed = {name: x for name, x in arrays.items() if name not in traced}
    read = {t.name for t in attempt.call.op.tensors if t.host_unless and fixed.get(t.host_unless) is None}
    if read & traced.keys():
        return  # a grid in an array has to be read, which a traced one cannot be
    outputs = jax.jit(lambda given: attempt.run({**given, **fixed}))(traced)
    yield from (f"under jax.jit: {problem}" for problem in problems(outputs, attempt.call, attempt.exact))
