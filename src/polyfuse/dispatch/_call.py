"""From a public function's arguments to a running backend: plan, call, and what is known of the calls so far."""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from polyfuse.dispatch._arguments import examine_arguments
from polyfuse.dispatch._arrays import convert, is_recorded
from polyfuse.dispatch._plan import CALLS, Calls, Plan, calls, counter, forget_plans
from polyfuse.dispatch._registry import registry
from polyfuse.dispatch._select import Explanation, as_names, clear_settings, explain_call, warn_once
from polyfuse.spec import OPS, REQUIRED, BackendError, SpecError, Unsupported, canonical, docstring

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Result = TypeVar("_Result", bound=tuple[Any, ...])


def public(function: _Function) -> _Function:
    """Give the public function of an op its documentation, from the op's spec."""
    function.__doc__ = docstring(OPS[function.__name__])
    return function


def named(kind: type[_Result], results: tuple[Any, ...]) -> _Result:
    """The results of an op as its named tuple; as they are where updated arguments come behind them."""
    fields: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return kind(*results) if len(results) == len(fields) else results  # type: ignore[return-value]


def run(name: str, args: tuple[Any, ...], backend: str | Sequence[str] | None) -> Any:
    """Call an op; `args` are all its parameters in order."""
    op = CALLS[name]
    torch = sys.modules.get("torch")
    if torch is not None and (torch.compiler.is_compiling() or (backend is None and is_recorded(torch))):
        from polyfuse.dispatch._torch_library import traced

        if backend is not None:
            raise SpecError(
                f"{name}: backend: a compiled graph holds no names; try polyfuse.use_backend around its call"
            )
        return traced(op, args)
    args = op.read(args)
    gradients = torch is not None and torch.is_grad_enabled()
    return _execute(op, op.plan(args, backend, gradients), args)


def _execute(op: Calls, plan: Plan, args: tuple[Any, ...]) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and torch._C._is_any_autocast_enabled():
        with torch._C._DisableAutocast():  # the spec says what dtypes an op computes with
            return _execute(op, plan, args)
    given = args
    if plan.convert_to:
        args = _converted(plan, args)
    keywords = plan.attrs
    if op.keyword_arrays:
        keywords = keywords.copy()
        for i, name in op.keyword_arrays:
            keywords[name] = args[i]
    try:
        result = plan.function(*args[: op.positional], **keywords)
        plan.calls[0] += 1
    except Unsupported as error:
        result = _next_willing(op, plan, args[: op.positional], keywords, error)
    if plan.results > 1 and len(result) != plan.results:
        raise BackendError(f"{op.spec.name}: {plan.usable[0][0]}: expected {plan.results} results, got {len(result)}")
    if plan.convert_to:
        result = _converted_back(op, plan, given, args, result)
    if plan.updated and plan.convert_back == "torch":
        _count_versions([given[i] for i in plan.updated])
    return result


def _converted(plan: Plan, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in the family of the backend. Those that it writes are copies, as others cannot be written."""
    converted = [convert(value, plan.convert_to or "") for value in args]
    if plan.convert_to == "torch":
        for i in plan.updated:
            converted[i] = converted[i].clone()
    return tuple(converted)


def _converted_back(op: Calls, plan: Plan, given: tuple[Any, ...], args: tuple[Any, ...], result: Any) -> Any:
    """What the caller's family returns, of a call in another one; torch's updated arguments are written here."""
    results: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
    if plan.convert_to == "torch":
        results = (*results, *(args[i] for i in plan.updated))
    converted = tuple(convert(r, plan.convert_back) for r in results)
    if plan.convert_back == "torch":
        outputs = len(op.spec.outputs)
        for i, new in zip(plan.updated, converted[outputs:], strict=True):
            given[i].copy_(new)
        converted = converted[:outputs]
    return converted[0] if len(converted) == 1 else converted


def _count_versions(tensors: Sequence[Any]) -> None:
    """Let autograd know that a kernel wrote to these tensors."""
    counted = [tensor for tensor in tensors if not tensor.is_inference()]
    sys.modules["torch.autograd.graph"].increment_version(counted)


def _next_willing(
    op: Calls, plan: Plan, positional: tuple[Any, ...], keywords: dict[str, Any], error: Unsupported
) -> Any:
    """The result of the first backend after the preferred one that does not decline at the call."""
    for (declined, _), (name, implementation) in pairwise(plan.usable):
        warn_once(op.spec.name, declined, f"declined this call ({error})")
        try:
            result = implementation.function(*positional, **keywords)
            counter(op.spec.name, name)[0] += 1
            return result
        except Unsupported as another:
            error = another
    raise error


def call_counts() -> dict[tuple[str, str], int]:
    """How many calls of each (op, backend) have returned in this process since the start or the last `refresh`.

    The calls of a compiled graph count when it runs; a replay of a captured one counts nothing.
    """
    return {key: count for key, (count,) in sorted(calls.items()) if count}


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `polyfuse.<op>(*args, **kwargs)`, and why each other one would not.

    Raises what the call itself would raise for a bad argument.
    """
    op = canonical(op)
    entry, defaults = CALLS[op], OPS[op].parameters
    backend = kwargs.pop("backend", None)
    values = dict(zip(entry.names, args, strict=False)) | kwargs
    unknown = set(values) - set(entry.names)
    if unknown or len(args) > entry.positional:
        raise SpecError(
            f"{op}: expected the parameters {', '.join(entry.names)}, got {', '.join(unknown) or len(args)}"
        )
    for name, default in defaults.items():
        values.setdefault(name, None if default is REQUIRED else default)
    ordered = tuple(values[name] for name in entry.names)
    call, family, device, needs_grad = examine_arguments(entry.spec, entry.names, entry.read(ordered))
    names = None if backend is None else as_names(backend)
    return explain_call(op, call, family, device, names, needs_grad)


def refresh() -> None:
    """Read environment, config file and installed plugins again; they are otherwise read once per process."""
    clear_settings()
    registry.cache_clear()
    forget_plans()
    calls.clear()
