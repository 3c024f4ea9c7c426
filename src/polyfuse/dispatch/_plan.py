"""The plan of a call: everything that its signature decides, found once and looked up afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

from polyfuse.configs import shadow
from polyfuse.dispatch._arguments import examine_arguments, read_hosts
from polyfuse.dispatch._arrays import Device, family_of, is_traced
from polyfuse.dispatch._gradients import without_gradients
from polyfuse.dispatch._registry import Implementation, on_change, registry
from polyfuse.dispatch._select import as_names, capture_refusal, context, resolve
from polyfuse.spec import OPS, Call, OpSpec, SpecError, Unsupported

CACHE_LIMIT = 4096

# Calls of each (op, backend) that have returned, as the one element of a list.
calls: dict[tuple[str, str], list[int]] = {}


@dataclass(frozen=True)
class Plan:
    """Everything about a call that depends only on its signature.

    `usable` are the backends that may run it, in order; `function` is the first one's, and `calls` its counter.
    Arrays are converted to `convert_to` before the call, unless it is None, and results to `convert_back`. `function`
    returns `results` arrays. `updated` are the places of the updated arguments that are given, which it writes in place
    if it takes torch's, and else returns last.
    """

    usable: tuple[tuple[str, Implementation], ...]
    function: Callable[..., Any]
    attrs: dict[str, Any]
    convert_to: str | None
    convert_back: str
    calls: list[int]
    results: int
    updated: tuple[int, ...]


class Calls:
    """The calls of one op: its parameters' places, and the plans of the signatures seen so far."""

    def __init__(self, spec: OpSpec) -> None:
        arrays = {t.name for t in spec.tensors}
        self.spec = spec
        self.names = tuple(spec.parameters)
        self.positional = len(spec.positional)
        self.attrs = [i for i, name in enumerate(self.names) if name not in arrays]
        self.keyword_arrays = [
            (i, name) for i, name in enumerate(self.names) if name in arrays and i >= self.positional
        ]
        self.hosts = [
            (self.names.index(t.name), self.names.index(t.host_unless)) for t in spec.tensors if t.host_unless
        ]
        # A key is the backend asked for, the context, every argument's type, then the arguments themselves.
        first = 2 + len(self.names)
        self.array_slots = [(i, first + i) for i, name in enumerate(self.names) if name in arrays]
        self.updated_slots = [(i, first + i) for i, name in enumerate(self.names) if name in spec.updated]
        self.forget()

    def forget(self) -> None:
        """Drop every plan."""
        self.plans: dict[tuple[Any, ...], Plan] = {}
        self.last: tuple[list[Any], Any] = [], None  # a key and its plan, replaced together

    def read(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with host ones read: as tuples, or as they are where they stay on a device."""
        return read_hosts(self.spec, self.names, self.hosts, args) if self.hosts else args

    def plan(self, args: tuple[Any, ...], backend: str | Sequence[str] | None, gradients: bool) -> Plan:
        """The plan of a call whose host arguments have been `read`; `gradients`: torch records them.

        Raises what `examine_arguments` and `resolve` raise.
        """
        describers = _WITH_GRADIENTS if gradients else _WITHOUT_GRADIENTS
        if backend is None or isinstance(backend, str):
            asked: Any = backend
        else:
            asked = tuple(backend) if isinstance(backend, (list, tuple)) else as_names(backend)
        # Types are compared before the arguments, because True == 1 == 1.0.
        key = [asked, context(), *map(type, args), *args]
        try:
            for index, slot in self.array_slots:
                value = args[index]
                if value is not None:
                    key[slot] = (describers.get(type(value)) or _describer(describers, value))(value)
        except RuntimeError:  # a nested tensor has no shape, and is refused
            return self._make(args, backend)
        for index, slot in self.updated_slots:
            value = args[index]
            if value is not None and callable(getattr(value, "stride", None)):
                key[slot] = key[slot], value.stride()
        last_key, last_plan = self.last
        if key == last_key:
            return last_plan
        try:
            plan = self.plans.get(tuple(key))
        except TypeError:  # an argument that cannot be hashed
            return self._make(args, backend)
        if plan is None:
            plan = self._make(args, backend)
            if any(family_of(args[i]) for i in self.attrs):  # a number in an array, which can change
                return plan
            if len(self.plans) >= CACHE_LIMIT:
                self.plans.clear()
            self.plans[tuple(key)] = plan
        self.last = key, plan
        return plan

    def _make(self, args: tuple[Any, ...], backend: str | Sequence[str] | None) -> Plan:
        names = None if backend is None else as_names(backend)
        call, family, device, needs_grad = examine_arguments(self.spec, self.names, args)
        usable = resolve(self.spec.name, call, family, device, names, needs_grad)
        target = registry().get(usable[0][0]).family
        if any(registry().get(n).family != target for n, _ in usable):
            got = list(names or ())
            raise SpecError(f"{self.spec.name}: backend: expected backends of one array family, got {got}")
        if target == "jax":
            usable = [(name, self._guarded(name, implementation, call)) for name, implementation in usable]
        share, seed = shadow()
        if share:
            usable = [(name, self._watched(name, implementation, share, seed)) for name, implementation in usable]
        usable = [(name, _outside_of_captures(name, implementation, call, device)) for name, implementation in usable]
        name, implementation = usable[0]
        return Plan(
            usable=tuple(usable),
            function=implementation.function,
            attrs=dict(call.attrs),
            convert_to=None if target == family else target,
            convert_back=family,
            calls=counter(self.spec.name, name),
            results=len(self.spec.outputs) if target == "torch" else len(call.results),
            updated=tuple(self.names.index(output.name) for output in call.updated),
        )

    def _guarded(self, backend: str, implementation: Implementation, call: Call) -> Implementation:
        """The implementation, with a function that refuses gradients if none flows through this call."""
        reason = implementation.capability.no_backward(call)
        if reason is None:
            return implementation
        function = without_gradients(self.spec.name, backend, reason, implementation.function)
        return Implementation(function, implementation.capability)

    def _watched(self, backend: str, implementation: Implementation, share: float, seed: int) -> Implementation:
        """The implementation, with a share of its calls checked in the background.

        The module is named by string, as backends are: it stands above dispatch, and is not needed without shadow mode.
        """
        watched = import_module("polyfuse.conformance.shadow").watched
        return Implementation(
            watched(self.spec.name, backend, implementation.function, share, seed), implementation.capability
        )


def _outside_of_captures(backend: str, implementation: Implementation, call: Call, device: Device) -> Implementation:
    """The implementation, which declines the call while a graph is captured if it reads an array of it on the host.

    A plan holds inside of a capture and outside, so that this is looked at each time.
    """
    function, capability = implementation.function, implementation.capability
    if not capability.read_on_host(call):
        return implementation

    def unless_captured(*args: Any, **keywords: Any) -> Any:
        reason = capture_refusal(backend, capability, call, device)
        if reason:
            raise Unsupported(reason)
        return function(*args, **keywords)

    return Implementation(unless_captured, capability)


CALLS = {name: Calls(spec) for name, spec in OPS.items()}


def forget_plans() -> None:
    """Decide every call anew."""
    for op in CALLS.values():
        op.forget()


on_change.append(forget_plans)


def counter(op: str, backend: str) -> list[int]:
    """The counter of an op's calls on a backend."""
    return calls.setdefault((op, backend), [0])


# What decides of an array, by its type.
Describers = dict[type, Callable[[Any], Any]]
_WITH_GRADIENTS: Describers = {}
_WITHOUT_GRADIENTS: Describers = {}


def _describer(describers: Describers, value: Any) -> Callable[[Any], Any]:
    """The function that says what of an array of this type decides a plan; remembered in `describers`."""
    of_torch = ("shape", "dtype", "layout", "device", "requires_grad")
    by_family: dict[str, Callable[[Any], Any]] = {
        "torch": attrgetter(*(of_torch if describers is _WITH_GRADIENTS else of_torch[:4])),
        "numpy": attrgetter("shape", "dtype"),
        "jax": _describe_jax,
    }
    family = family_of(value)
    return describers.setdefault(type(value), by_family[family] if family else _itself)


def _describe_jax(x: Any) -> Any:
    return x.shape, x.dtype, None if is_traced(x) else x.sharding


def _itself(x: Any) -> Any:
    return x
