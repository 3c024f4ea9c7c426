"""What makes an oracle: a formula in float64, and the bounds that its spec puts around each exact value."""

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any

import numpy as np

from polyfuse.reference._numerics import F64, Array, Exact, laid_out, round_to
from polyfuse.spec import OPS, REQUIRED, Call, OpSpec, Output, bind

Formula = Callable[..., Any]
Error = Callable[[str], tuple[float, float]]
Bounds = Callable[[Mapping[str, F64], Any, Error], dict[str, Exact]]
Store = Callable[[F64, Output], Array]


def _rounded(value: F64, output: Output) -> Array:
    return round_to(value, output.dtype)


class Oracle:
    """An op on NumPy arrays: every result exact in float64, then rounded once.

    `formula` takes the op's parameters and returns its exact results, in the order of the spec's outputs, and behind
    them what the updated arguments hold afterwards, of those that are given.
    `bounds(exact, given, error)` returns the interval of each: `exact` holds the formula's results by name, `given` the
    arguments as attributes, and `error(value)` is `ErrorBound.error` of that bound for this call. `store` turns one
    exact result into the array that the op returns, where that is more than one rounding.
    """

    def __init__(self, spec: OpSpec, formula: Formula, bounds: Bounds, store: Store = _rounded) -> None:
        self.spec, self.formula, self.bounds, self.store = spec, formula, bounds, store
        self.__name__ = spec.name
        self.__doc__ = f"`{spec.name}` on NumPy arrays, each result rounded once."
        self.__signature__ = Signature(
            [
                Parameter(
                    name,
                    Parameter.POSITIONAL_OR_KEYWORD if name in spec.positional else Parameter.KEYWORD_ONLY,
                    default=Parameter.empty if default is REQUIRED else default,
                )
                for name, default in spec.parameters.items()
            ]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's results: an array, or a tuple of them, updated arguments last. No argument is written.

        Raises `SpecError` for a call that breaks the spec.
        """
        call, arguments = self._bind(args, kwargs)
        exact = self.exact(arguments)
        results = [laid_out(self.store(exact[output.name], output), output.strides) for output in call.results]
        return tuple(results) if len(results) > 1 else results[0]

    def intervals(self, *args: Any, **kwargs: Any) -> dict[str, Exact]:
        """What each result must lie in, by the name of the output. Raises `SpecError` as the call does."""
        call, arguments = self._bind(args, kwargs)
        names = {**call.attrs, **call.dims}

        def error(value: str) -> tuple[float, float]:
            return self.spec.bound(value).error(names)

        exact = self.exact(arguments)
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            return self.bounds(exact, SimpleNamespace(**arguments), error)

    def exact(self, arguments: Mapping[str, Any]) -> dict[str, F64]:
        """The formula's results by name, of every parameter's value: nothing is validated, and float64 arrays count."""
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            results = self.formula(**arguments)
        names = [output.name for output in self.spec.outputs]
        names += [name for name in self.spec.updated if arguments[name] is not None]
        return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bind(self.spec, bound.arguments)
        return call, {**bound.arguments, **call.attrs}


def oracle(op: str) -> Oracle:
    """The oracle of an op, by the op's name."""
    if op not in OPS:
        raise KeyError(op)
    found: Oracle = getattr(import_module(f"polyfuse.reference.{op}"), op)
    return found
