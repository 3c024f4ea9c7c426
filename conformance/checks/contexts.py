"""Where a call is made from: gradient modes, threads, autocast, a compiled function; and what it leaves behind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from polyfuse.conformance.attempt import Attempt
from polyfuse.conformance.checks.values import verdict
from polyfuse.dispatch import family_of

PROVES = (
    "A call is right in inference mode, with gradients on and off, under autocast, with another default dtype, in "
    "another thread and (JAX) under jit, and leaves all of these settings and the random state as they were."
)


def check(attempt: Attempt) -> Iterator[str]:
    """In which context a call is wrong, or which setting it has changed."""
    if attempt.case.repeat > 1:
        return
    for name, context in _contexts(attempt).items():
        arrays = attempt.place()
        with context():
            before = _settings(attempt)
            outputs = attempt.run(arrays)
            after = _settings(attempt)
        problem = verdict(attempt.results(arrays, outputs), attempt.call, attempt.exact)
        if problem:
            yield f"{name}: {problem}"
        for setting, value in before.items():
            if after[setting] != value:
                yield f"{name}: the backend left {setting} changed"
    yield from _in_a_thread(attempt)
    if attempt.family == "jax":
        yield from _under_jit(attempt)


def _contexts(attempt: Attempt) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    if attempt.family != "torch":
        return {"a second call": nullcontext}
    import torch

    kind = torch.device(attempt.device).type
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "in inference mode": torch.inference_mode,
        "without gradients": torch.no_grad,
        "with gradients on": torch.enable_grad,
        "with float64 as the default dtype": _DefaultDtype,
    }
    if kind in ("cpu", "cuda"):
        found["under autocast"] = lambda: torch.autocast(kind, dtype=torch.bfloat16)
    return found


class _DefaultDtype:
    """While this is entered, new tensors are float64 unless another dtype is asked for."""

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error: object) -> None:
        import torch

        torch.set_default_dtype(self.before)


def _settings(attempt: Attempt) -> dict[str, Any]:
    """What a call has no business with."""
    import numpy as np

    found: dict[str, Any] = {"NumPy's random state": str(np.random.get_state(legacy=False))}
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
        }
        if torch.cuda.is_available():
            found |= {
                "the current device": torch.cuda.current_device(),
                "the current stream": torch.cuda.current_stream().cuda_stream,
                "TF32": torch.backends.cuda.matmul.allow_tf32,
            }
    return found


def _in_a_thread(attempt: Attempt) -> Iterator[str]:
    found: list[Any] = []

    def call() -> None:
        try:
            arrays = attempt.place()
            found.append(verdict(attempt.results(arrays, attempt.run(arrays)), attempt.call, attempt.exact))
        except BaseException as error:
            found.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if found[0]:
        yield f"in another thread: {found[0]}"


def _under_jit(attempt: Attempt) -> Iterator[str]:
    import jax

    arrays = attempt.place()
    traced = {name: x for name, x in arrays.items() if family_of(x) == "jax"}
    fixed = {name: x for name, x in arrays.items() if name not in traced}
    read = {t.name for t in attempt.call.op.tensors if t.host_unless and fixed.get(t.host_unless) is None}
    if read & traced.keys():
        return  # a grid in an array has to be read, which a traced one cannot be
    outputs = jax.jit(lambda given: attempt.run({**given, **fixed}))(traced)
    problem = verdict(outputs, attempt.call, attempt.exact)
    if problem:
        yield f"under jax.jit: {problem}"
