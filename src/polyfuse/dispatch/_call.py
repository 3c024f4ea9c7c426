"""From a public function's arguments to a running backend: validate, resolve, cache, call."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from polyfuse.dispatch._arrays import FAMILIES, Device, convert, device_of, family_of, is_traced
from polyfuse.dispatch._registry import Implementation, registry
from polyfuse.dispatch._select import (
    Explanation,
    as_names,
    check_op,
    clear_settings,
    context,
    explain_call,
    resolve,
    warn_once,
)
from polyfuse.spec import OPS, Call, OpSpec, SpecError, Unsupported, bind, docstring, dtype_name

_CACHE_LIMIT = 4096
_ROW, _INTEGER = frozenset([tuple]), frozenset([int])
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class _Plan:
    """Everything about a call that depends only on its signature."""

    usable: tuple[tuple[str, Implementation], ...]
    function: Callable[..., Any]
    attrs: dict[str, Any]
    convert_to: str | None
    convert_back: str
    calls: list[int]


class Op:
    """One op's calls: its parameter order, and the plans of the signatures seen so far."""

    def __init__(self, spec: OpSpec, function: Callable[..., Any]) -> None:
        parameters = [p for p in signature(function).parameters.values() if p.name != "backend"]
        self.spec = spec
        self.names = tuple(p.name for p in parameters)
        self.defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
        self.cache: dict[tuple[Any, ...], _Plan] = {}
        self.last: tuple[list[Any], Any] = [], None  # key and plan
        positional = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        self.positional = len(positional)
        arrays = {t.name for t in spec.tensors}
        self.arrays = [i - len(self.names) for i, n in enumerate(self.names) if n in arrays]  # from the end
        self.attrs = [i for i, n in enumerate(self.names) if n not in arrays]
        self.keyword_arrays = [(i, n) for i, n in enumerate(self.names) if n in arrays and n not in positional]
        self.hosts = [
            (self.names.index(t.name), self.names.index(t.host_unless)) for t in spec.tensors if t.host_unless
        ]


_OPS: dict[str, Op] = {}
_calls: dict[tuple[str, str], list[int]] = {}


def public(function: _Function) -> _Function:
    """Make a function the public face of the op of its name; its body passes its arguments to `run`."""
    spec = OPS[function.__name__]
    _OPS[spec.name] = Op(spec, function)
    function.__doc__ = docstring(spec)
    torch_ops = sys.modules.get("polyfuse.dispatch._torch_library")
    if torch_ops is not None:
        torch_ops.register(_OPS[spec.name])
    return function


def declared() -> dict[str, Op]:
    """Every op with a public function, by name."""
    return dict(_OPS)


def run(name: str, args: tuple[Any, ...], backend: str | Sequence[str] | None) -> Any:
    """Call an op; `args` are all its parameters in order."""
    op = _OPS[name]
    torch = sys.modules.get("torch")
    if torch is not None and (torch.compiler.is_compiling() or (backend is None and _is_recorded(torch))):
        from polyfuse.dispatch._torch_library import traced

        if backend is not None:
            raise SpecError(
                f"{name}: backend: a compiled graph holds no names; try polyfuse.use_backend around its call"
            )
        return traced(op, args)
    if op.hosts:
        args = read_hosts(op, args)
    gradients = torch is not None and torch.is_grad_enabled()
    return _execute(op, planned(op, args, backend, gradients), args)


def _is_recorded(torch: Any) -> bool:
    """Whether `make_fx` records this call, without gradients: as one node, like a compiled graph, with no host read."""
    tracing = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracing is not None and tracing.get_proxy_mode() is not None and not torch.is_grad_enabled()


def planned(op: Op, args: tuple[Any, ...], backend: str | Sequence[str] | None, gradients: bool) -> _Plan:
    """The plan of a call whose host arguments are read; `gradients`: torch records them.

    Raises what `examine_arguments` and `resolve` raise.
    """
    describe = _DESCRIBE[gradients]
    asked = backend if backend is None or isinstance(backend, str) else tuple(backend)
    # Types are part of the key, because True == 1 == 1.0, and come first: equality then meets values of one type only.
    key = [*map(type, args), asked, context(), *args]
    for i in op.arrays:
        value = args[i]
        if value is not None:
            key[i] = (describe.get(type(value)) or _describer(describe, value))(value)
    last, plan = op.last
    if key == last:
        return plan
    try:
        plan = op.cache.get(tuple(key))
    except TypeError:  # an argument that cannot be hashed
        return _plan(op, args, backend)
    if plan is None:
        plan = _plan(op, args, backend)
        if any(family_of(args[i]) for i in op.attrs):  # a number in an array, which can change
            return plan
        if len(op.cache) >= _CACHE_LIMIT:
            op.cache.clear()
        op.cache[tuple(key)] = plan
    op.last = key, plan
    return plan


def _execute(op: Op, plan: _Plan, args: tuple[Any, ...]) -> Any:
    if plan.convert_to:
        args = tuple(convert(value, plan.convert_to) for value in args)
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
    if plan.convert_to:
        if isinstance(result, tuple):
            return tuple(convert(r, plan.convert_back) for r in result)
        return convert(result, plan.convert_back)
    return result


def _next_willing(
    op: Op, plan: _Plan, positional: tuple[Any, ...], keywords: dict[str, Any], error: Unsupported
) -> Any:
    """The result of the first backend after the preferred one that does not decline at the call."""
    for (declined, _), (name, implementation) in pairwise(plan.usable):
        warn_once(op.spec.name, declined, f"declined this call ({error})")
        try:
            result = implementation.function(*positional, **keywords)
            _counter(op.spec.name, name)[0] += 1
            return result
        except Unsupported as another:
            error = another
    raise error


def _plan(op: Op, args: tuple[Any, ...], backend: str | Sequence[str] | None) -> _Plan:
    names = None if backend is None else as_names(backend)
    call, family, device, needs_grad = examine_arguments(op, args)
    usable = resolve(op.spec.name, call, family, device, names, needs_grad)
    target = registry().get(usable[0][0]).family
    if any(registry().get(n).family != target for n, _ in usable):
        raise SpecError(f"{op.spec.name}: backend: expected backends of one array family, got {list(names or ())}")
    function = usable[0][1].function
    calls = _counter(op.spec.name, usable[0][0])
    return _Plan(tuple(usable), function, dict(call.attrs), None if target == family else target, family, calls)


def _counter(op: str, backend: str) -> list[int]:
    return _calls.setdefault((op, backend), [0])


def call_counts() -> dict[tuple[str, str], int]:
    """How many calls of each (op, backend) have returned in this process since the start or the last `refresh`.

    The calls of a compiled graph count when it runs; a replay of a captured one counts nothing.
    """
    return {key: calls for key, (calls,) in sorted(_calls.items()) if calls}


def examine_arguments(op: Op, args: tuple[Any, ...]) -> tuple[Call, str, Device, bool]:
    """Validate a call: (call, array family, device, whether a gradient is wanted). Raises `SpecError`."""
    values = dict(zip(op.names, args, strict=True))
    family = device = first = None
    needs_grad = False
    for tensor in op.spec.tensors:
        value = values[tensor.name]
        kind = family_of(value)
        if kind is None:
            if value is not None and not tensor.host_unless:
                raise SpecError(
                    f"{op.spec.name}: {tensor.name}: expected an array of {', '.join(FAMILIES)}, "
                    f"got {type(value).__name__}"
                )
            continue
        here = device_of(value, kind)
        place = value.device if kind == "torch" else here
        if first is None:
            family, device, first = kind, here, (tensor.name, place)
        elif kind != family or place != first[1]:
            raise SpecError(
                f"{op.spec.name}: {tensor.name}: expected a {family} array on {_place_text(first[1])} "
                f"as {first[0]}, got {kind} on {_place_text(place)}"
            )
        if kind == "torch" and value.requires_grad:
            import torch

            needs_grad = needs_grad or torch.is_grad_enabled()
    call = bind(op.spec, values)
    if family is None or device is None:
        raise SpecError(f"{op.spec.name}: expected at least one array")
    return call, family, device, needs_grad


def _place_text(place: Any) -> str:
    return place.kind if isinstance(place, Device) else str(place)


def read_hosts(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Host arguments as hashable tuples; a tensor is read back here unless it must stay on its device."""
    values = list(args)
    for index, unless in op.hosts:
        value = args[index]
        if not isinstance(value, (list, tuple)):
            value = _read_array(op, args, index, unless)
        if isinstance(value, (list, tuple)):
            values[index] = _rows(value)
    return tuple(values)


def _read_array(op: Op, args: tuple[Any, ...], index: int, unless: int) -> Any:
    """A host argument given as an array as lists, or as it is where it stays or the validator refuses it."""
    value, name = args[index], op.names[index]
    family = family_of(value)
    if family is None or (family == family_of(args[0]) and args[unless] is not None):
        return value
    if is_traced(value):
        raise SpecError(f"{op.spec.name}: {name}: a traced array needs {op.names[unless]}=, got None")
    dtypes = next(t.dtypes for t in op.spec.tensors if t.name == name)
    return value.tolist() if dtype_name(value.dtype) in dtypes and value.ndim == 2 else value


def _rows(value: Sequence[Any]) -> Any:
    """Rows of ints as tuples; what holds anything else as a list, which no cache key matches, for the validator."""
    rows = tuple([tuple(row) if isinstance(row, (list, tuple)) else row for row in value])
    if {*map(type, rows)} <= _ROW and {*map(type, chain.from_iterable(rows))} <= _INTEGER:
        return rows
    return [tuple(int(v) if isinstance(v, np.integer) else v for v in r) if type(r) is tuple else r for r in rows]


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `polyfuse.<op>(*args, **kwargs)`, and why each other one would not.

    Raises what the call itself would raise for a bad argument.
    """
    check_op(op)
    entry = _OPS[op]
    backend = kwargs.pop("backend", None)
    values = dict(zip(entry.names, args, strict=False)) | kwargs
    unknown = set(values) - set(entry.names)
    if unknown or len(args) > entry.positional:
        raise SpecError(
            f"{op}: expected the parameters {', '.join(entry.names)}, got {', '.join(unknown) or len(args)}"
        )
    values = {name: values[name] if name in values else entry.defaults.get(name) for name in entry.names}
    bound = read_hosts(entry, tuple(values.values()))
    call, family, device, needs_grad = examine_arguments(entry, bound)
    names = None if backend is None else as_names(backend)
    return explain_call(op, call, family, device, names, needs_grad)


def refresh() -> None:
    """Read environment, config file and installed plugins again; they are otherwise read once per process."""
    clear_settings()
    registry.cache_clear()
    for op in _OPS.values():
        op.cache.clear()
        op.last = [], None
    _calls.clear()


def _describe_jax(x: Any) -> Any:
    return x.shape, x.dtype, None if is_traced(x) else x.sharding


def _itself(x: Any) -> Any:
    return x


# What decides of an array, by its type; without and with gradients recorded.
_DESCRIBE: tuple[dict[type, Callable[[Any], Any]], dict[type, Callable[[Any], Any]]] = ({}, {})


def _describer(describe: dict[type, Callable[[Any], Any]], value: Any) -> Callable[[Any], Any]:
    of_torch = ("shape", "dtype", "device", "requires_grad")
    describers: dict[str, Callable[[Any], Any]] = {
        "torch": attrgetter(*(of_torch if describe is _DESCRIBE[True] else of_torch[:3])),
        "numpy": attrgetter("shape", "dtype"),
        "jax": _describe_jax,
    }
    family = family_of(value)
    return describe.setdefault(type(value), describers[family] if family else _itself)
