"""`Peer`: a function of another package that computes one of our ops, and `Package`: the peers of one package."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from polyfuse.bench.timing import Call as Run
from polyfuse.conformance.checks.values import as_tuple
from polyfuse.spec import OPS, REQUIRED, Call, Capability, Unsupported

# Of a q in float8_e4m3fn whose y or divisor was rounded once more: half a step of 32 and what that rounding moves y by,
# together less than 28 of 448.
ROUNDED_TWICE = 2.0**-4


class Prepared(NamedTuple):
    """A peer's call on given arrays: what is timed, and the op's results, of what it returned."""

    run: Run
    results: Callable[[Any], Sequence[Any]] = as_tuple


@dataclass(frozen=True)
class Peer:
    """A function, or a few in a row, of another package that computes an op.

    `places` has a tuple for each function that is called: where it is, as "module:name", the newest version first.
    `prepare(*functions, arguments)` makes the call, of the op's arguments as attributes. It changes layouts where
    the peer has another one, which is not timed, and takes no array that the op does not take. The peer computes what
    `options` allow, with optional arrays among `takes` and all of `needs`.
    `tolerance` is for a peer that by its own design is not exact, as `reason` says: by the name of a result, how large
    the largest error may be as a share of the largest exact value. What it does not name must be exact to the spec.
    """

    op: str
    name: str
    places: tuple[tuple[str, ...], ...]
    prepare: Callable[..., Prepared]
    options: Capability = field(default_factory=Capability)
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tolerance: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def refusal(self, call: Call, device: str) -> str | None:
        """Why the peer has nothing for a call, or None if it has."""
        optional = {t.name for t in OPS[self.op].tensors if t.optional} & call.dtypes.keys()
        if missing := set(self.needs) - optional:
            return f"only with {', '.join(sorted(missing))}"
        if more := optional - {*self.takes, *self.needs}:
            return f"without {', '.join(sorted(more))}"
        return self.options.refusal(call, device)

    def functions(self) -> list[Any]:
        """The functions that it calls. Raises `Unsupported` for one that is nowhere, with the reason."""
        return [_first(places) for places in self.places]


@dataclass(frozen=True)
class Package:
    """A package by the names that it is distributed under, its peers, and what else is to be said where it is there."""

    distributions: tuple[str, ...]
    peers: tuple[Peer, ...] = ()
    note: str = ""
    with_versions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its first name."""
        return self.distributions[0]

    def version(self) -> str | None:
        """The version that is installed, with those of the packages that it hands on to; None if it is not."""
        found = next(filter(None, map(_version, self.distributions)), None)
        others = [f"{name} {other}" for name in self.with_versions if (other := _version(name))]
        return found and " with ".join([found, *others])


def options(op: str, devices: tuple[str, ...] = ("cuda",), **allowed: tuple[Any, ...] | None) -> Capability:
    """An op with the defaults of its attributes alone, but for those named: the values given, or any with None."""
    defaults = {a.name: (a.default,) for a in OPS[op].attrs if a.default is not REQUIRED}
    attrs = {name: values for name, values in (defaults | allowed).items() if values is not None}
    return Capability(devices=devices, attrs=attrs)


def places(name: str, *modules: str) -> tuple[str, ...]:
    """A function of one name that is in one of these modules."""
    return tuple(f"{module}:{name}" for module in modules)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _first(named: tuple[str, ...]) -> Any:
    """The first of some functions that can be imported."""
    reasons = []
    for place in named:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except Exception as error:  # whatever goes wrong in a package that is not ours is a line in the table
            reasons.append(f"{place}: {type(error).__name__}: {error}")
    raise Unsupported("; ".join(reasons))
