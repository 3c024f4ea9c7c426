"""A JAX call without a backward pass raises where a gradient through it is asked for."""

from collections.abc import Callable
from typing import Any, NoReturn

from polyfuse.spec import Unsupported


def without_gradients(op: str, backend: str, reason: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; `jax.grad` and its kin through it raise `Unsupported`, also through `jax.jit` around it.

    `reason` says why there is no gradient.

    JAX would differentiate what the function is made of, such as the roundings of a quantiser, and give zeros.
    """
    import jax

    def call(*positional: Any, **keywords: Any) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(positional)), **keywords}
        arrays = {key: value for key, value in given.items() if isinstance(value, jax.Array)}
        names = list(arrays)

        @jax.custom_jvp
        def opaque(arrays: list[Any]) -> Any:
            everything = given | dict(zip(names, arrays, strict=True))
            in_order = [everything[i] for i in range(len(positional))]
            return function(*in_order, **{name: everything[name] for name in keywords})

        @opaque.defjvp
        def _(primals: Any, tangents: Any) -> NoReturn:
            raise Unsupported(
                f"{op}: {backend}: a gradient is asked for: {reason}; try jax.lax.stop_gradient, or a call or backend "
                "that has one"
            )

        return opaque(list(arrays.values()))

    return call
