"""Which backend runs a call, and why. The one resolver of eager calls, compiled calls and conformance."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from polyfuse.configs import check_variables, did_you_mean, flag, platform_order, user_config
from polyfuse.dispatch._arrays import Device, is_captured, is_recorded
from polyfuse.dispatch._registry import Implementation, on_change, registry
from polyfuse.spec import FORMER_NAMES, BackendError, Call, Capability, SpecError, Unsupported, canonical, fail
from polyfuse.spec._validate import one_line

log = logging.getLogger("polyfuse")

LEVELS = ("debug", "info", "warning", "error")


class Wanted(NamedTuple):
    """What `use_backend` asks for; None leaves it to what is below."""

    names: tuple[str, ...] | None = None
    strict: bool | None = None


_NOTHING = Wanted()
_context: ContextVar[Wanted] = ContextVar("polyfuse_backend", default=_NOTHING)
context = _context.get
_warned: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Preference:
    """An order of backends and where it comes from.

    `asked`: by the user, not by a platform's default. `converts`: none of them takes the call's kind of arrays, so that
    the first that can run the call gets converted ones.
    """

    names: tuple[str, ...]
    source: str
    asked: bool
    converts: bool = False


@dataclass(frozen=True)
class Candidate:
    """One backend's verdict on a call.

    `status` is one of `chosen`, `usable`, `wrong_family`, `not_installed`, `broken`, `not_implemented`,
    `spec_version`, `unsupported`; `reason` says it in words.
    """

    name: str
    status: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Every candidate for a call, the winner (None if there is none) and where the preference came from.

    `strict`: only the first name of the preference may run.
    """

    op: str
    family: str
    device: str
    preference: Preference
    strict: bool
    winner: str | None
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.op} on {self.device} ({self.family} arrays): {self.winner or 'no backend'}"
        lines = [head, f"preference: {', '.join(self.preference.names)}  from {self.preference.source}"]
        lines += [f"  {c.name:10} {c.status:16} {c.reason}" for c in self.candidates]
        return "\n".join(lines)


def as_names(backend: str | Sequence[str], source: str = "backend") -> tuple[str, ...]:
    """A backend name or a list of them as a tuple; `source` is where it was given.

    Raises `SpecError` for anything else, and `BackendError` for a name that no backend has.
    """
    names = (backend,) if isinstance(backend, str) else tuple(backend) if isinstance(backend, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise SpecError(f"{source}: expected a name or a list of names, got {one_line(repr(backend))}")
    for name in names:
        if name not in registry().names():
            check_known(name, source)
    return names


def check_known(name: str, source: str) -> None:
    """Raise `BackendError` for a name that no backend has, or that of one that cannot be used."""
    try:
        registry().get(name)
    except BackendError as error:
        known = list(registry().names())
        if registry().provides(name):
            raise
        expected = f"{source}: expected one of {', '.join(known)}, got {name!r}"
        raise BackendError(expected + did_you_mean(name, known).partition("; known are")[0]) from error


@contextmanager
def use_backend(backend: str | Sequence[str] | None = None, *, strict: bool | None = None) -> Iterator[None]:
    """Prefer a backend, or a list in order, for the calls made inside the block by this thread or task.

    With `strict` only the first backend of whatever preference holds may run, and a call that it cannot run raises;
    False allows the others again. What is None stays as it is outside of the block.

    A graph of `torch.compile` holds no names: around the call of a compiled function the block decides each time the
    function runs, whichever block it was compiled in. Inside of one it would have to be in the graph, and raises;
    without `fullgraph` PyTorch then runs the function that holds the block uncompiled, and the block decides.

    Raises `BackendError` for an unknown name, and `SpecError` inside what is being compiled.
    """
    torch = sys.modules.get("torch")
    if torch is not None and (torch.compiler.is_compiling() or is_recorded(torch)):
        expected = "a block around the call of the compiled function"
        fail("use_backend", "with", expected, "one inside of it, where a graph holds no names")
    outer = context()
    names = outer.names if backend is None else as_names(backend)
    token = _context.set(Wanted(names, outer.strict if strict is None else strict))
    try:
        yield
    finally:
        _context.reset(token)


@lru_cache(maxsize=64)
def _user_preferences(op: str) -> tuple[Preference, ...]:
    """What environment and config file say about an op, highest first; read once per process."""
    check_variables()
    found = []
    variables = [f"POLYFUSE_BACKEND_{op.upper()}", "POLYFUSE_BACKEND"]
    for former in (old for old, new in FORMER_NAMES.items() if new == op):
        if os.environ.get(f"POLYFUSE_BACKEND_{former.upper()}"):
            canonical(former)
            variables.insert(1, f"POLYFUSE_BACKEND_{former.upper()}")
    for variable in variables:
        value = os.environ.get(variable)
        if value:
            source = f"environment variable {variable}"
            names = as_names([n.strip() for n in value.split(",") if n.strip()], source)
            found.append(Preference(names, source, True))
    config = user_config()
    if config:
        settings, path = config
        if op in settings.ops:
            source = f"{path}: ops.{op}"
            found.append(Preference(as_names(settings.ops[op], source), source, True))
        if settings.backend:
            source = f"{path}: backend"
            found.append(Preference(as_names(settings.backend, source), source, True))
    return tuple(found)


@lru_cache(maxsize=1)
def _strict_setting() -> bool:
    """What environment and config file say of strictness; read once per process."""
    asked = flag("POLYFUSE_STRICT")
    if asked is not None:
        return asked
    config = user_config()
    return config is not None and config[0].strict


def is_strict() -> bool:
    """Whether only the first preferred backend may run a call made here."""
    asked = context().strict
    return _strict_setting() if asked is None else asked


def clear_settings() -> None:
    """Forget what was read from the environment and the config file, and what was warned of."""
    _user_preferences.cache_clear()
    _strict_setting.cache_clear()
    _plugins_of.cache_clear()
    _warned.clear()


def configure_log() -> None:
    """Log to stderr from the level that POLYFUSE_LOG names on."""
    level = os.environ.get("POLYFUSE_LOG")
    if not level:
        return
    if level not in LEVELS:
        raise SpecError(f"environment variable POLYFUSE_LOG: expected one of {', '.join(LEVELS)}, got {level!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("polyfuse %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level.upper())


configure_log()


def warn_once(op: str, name: str, reason: str) -> None:
    """Say that a backend was passed over, once for each op and reason."""
    if (op, name, reason) not in _warned:
        _warned.add((op, name, reason))
        log.warning("%s: %s %s: passed over", op, name, reason)


def preference(op: str, family: str, device: Device, names: tuple[str, ...] | None) -> Preference:
    """The highest preference for a call with arrays of this family, wherever it was given.

    Of a list for several families the backends of this one count. A list without one asks for the arrays to be
    converted.
    """
    given = list(_user_preferences(op))
    in_context = context().names
    if in_context is not None:
        given.insert(0, Preference(in_context, "polyfuse.use_backend", True))
    if names is not None:
        given.insert(0, Preference(names, "backend= on the call", True))
    if given:
        highest = given[0]
        own = tuple(name for name in highest.names if _family(name) in (family, None))
        return Preference(own or highest.names, highest.source, True, converts=not own)
    order, source = platform_order(device.kind, family, op)
    # A default may name backends of other packages, which nobody has to install.
    order = tuple(name for name in order if registry().provides(name))
    own = _plugins_of(device.kind) if source.endswith("default.yaml") else ()
    if own:
        source = f"backends of other packages for {device.kind}, then {source}"
    return Preference((*own, *order), source, False)


@lru_cache(maxsize=64)
def _plugins_of(kind: str) -> tuple[str, ...]:
    """The backends that name a device kind as their own. Loads every installed plugin."""
    names = []
    for name in registry().names():
        try:
            if kind in registry().get(name).devices:
                names.append(name)
        except BackendError:  # `polyfuse info` shows it
            continue
    return tuple(names)


on_change.append(_plugins_of.cache_clear)


def _family(name: str) -> str | None:
    try:
        return registry().get(name).family
    except BackendError:
        return None


def examine(
    op: str, name: str, call: Call, family: str | None, device: Device, needs_grad: bool
) -> tuple[Candidate, Implementation | None]:
    """One backend's verdict on a call, and its implementation if it can run it. `family` None takes any."""
    try:
        backend = registry().get(name)
        if family not in (None, backend.family):
            return Candidate(name, "wrong_family", f"takes {backend.family} arrays"), None
        missing = backend.missing(op)
        if missing:
            return Candidate(name, *missing), None
        implementation = backend.load(op)
    except BackendError as error:
        return Candidate(name, "broken", str(error)), None
    refusal = implementation.capability.refusal(call, device.kind, device.arch, needs_grad)
    if refusal:
        return Candidate(name, "unsupported", refusal), None
    return Candidate(name, "usable", backend.origin), implementation


def capture_refusal(name: str, capability: Capability, call: Call, device: Device) -> str | None:
    """Why a backend declines a call now that it runs at other times: a graph that is captured cannot be waited for."""
    read = capability.read_on_host(call)
    if not read or not is_captured(device):
        return None
    return f"{', '.join(read)} in the capture of a CUDA graph: {name} reads the values on the host"


def _in_order(op: str, wanted: Preference, call: Call, device: Device) -> tuple[str, ...]:
    """The names of a preference; of a platform's default those come last whose backends defer the call to others."""
    if wanted.asked:
        return wanted.names
    return tuple(sorted(wanted.names, key=lambda name: _deferral(op, name, call, device) is not None))


def _deferral(op: str, name: str, call: Call, device: Device) -> str | None:
    """Why a backend leaves the call to others that can run it, or None."""
    try:
        backend = registry().get(name)
        return None if backend.missing(op) else backend.load(op).capability.deferral(call, device.kind)
    except BackendError:
        return None


def resolve(
    op: str, call: Call, family: str, device: Device, names: tuple[str, ...] | None, needs_grad: bool = False
) -> list[tuple[str, Implementation]]:
    """The backends that can run the call, in order of preference; at least one, and in strict mode the first only.

    Raises `Unsupported` or `BackendError` when the preference names none that can.
    """
    wanted = preference(op, family, device, names)
    order = _in_order(op, wanted, call, device)
    allowed = order[:1] if is_strict() else order
    usable, refused = [], []
    for name in allowed:
        candidate, implementation = examine(op, name, call, None if wanted.converts else family, device, needs_grad)
        if implementation:
            usable.append((name, implementation))
        else:
            refused.append(candidate)
            if not wanted.asked and not usable and len(allowed) > 1:
                warn_once(op, name, f"does not run this call ({candidate.reason})")
    if not usable:
        text = "; ".join(f"{c.name}: {c.reason}" for c in refused)
        kind = Unsupported if all(c.status == "unsupported" for c in refused) else BackendError
        source = f"strict, {wanted.source}" if len(allowed) < len(order) else wanted.source
        raise kind(f"{op}: no backend of [{', '.join(allowed)}] ({source}) can run this call: {text}")
    log.debug("%s: %s (%s)", op, usable[0][0], wanted.source)
    return usable


def explain_call(
    op: str, call: Call, family: str, device: Device, names: tuple[str, ...] | None, needs_grad: bool = False
) -> Explanation:
    """The resolver's decision on a call with the verdict of every known backend."""
    wanted = preference(op, family, device, names)
    strict = is_strict()
    order = _in_order(op, wanted, call, device)
    allowed = order[:1] if strict else order
    candidates, winner = [], None
    for name in dict.fromkeys((*order, *registry().names())):
        candidate, implementation = examine(op, name, call, None if wanted.converts else family, device, needs_grad)
        reason = capture_refusal(name, implementation.capability, call, device) if implementation else None
        if reason:
            candidate, implementation = Candidate(name, "unsupported", reason), None
        if implementation and name not in wanted.names:
            candidate = Candidate(name, "usable", f"not named by {wanted.source}")
        elif implementation and name not in allowed:
            candidate = Candidate(name, "usable", f"strict mode allows {', '.join(allowed)} only")
        elif implementation and winner is None:
            winner, candidate = name, Candidate(name, "chosen", f"first usable of {wanted.source}")
        elif implementation:
            deferral = None if wanted.asked else _deferral(op, name, call, device)
            after = f"comes after {winner}"
            candidate = Candidate(name, "usable", f"{after}: {deferral}" if deferral else f"{after} in {wanted.source}")
        candidates.append(candidate)
    return Explanation(op, family, device.kind, wanted, strict, winner, tuple(candidates))
