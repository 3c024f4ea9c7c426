"""Which backend runs a call, and why. The one resolver of eager calls, compiled calls and conformance."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from polyfuse.configs import platform_order, user_config
from polyfuse.dispatch._arrays import Device
from polyfuse.dispatch._registry import Implementation, registry
from polyfuse.spec import OPS, BackendError, Call, SpecError, Unsupported

log = logging.getLogger("polyfuse")

_context: ContextVar[tuple[str, ...] | None] = ContextVar("polyfuse_backend", default=None)
context_names = _context.get


@dataclass(frozen=True)
class Preference:
    """An order of backends and where it comes from. `strict`: the user asked, so running out of names raises."""

    names: tuple[str, ...]
    source: str
    strict: bool


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
    """Every candidate for a call, the winner (None if there is none) and where the preference came from."""

    op: str
    family: str
    device: str
    preference: Preference
    winner: str | None
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.op} on {self.device} ({self.family} arrays): {self.winner or 'no backend'}"
        lines = [head, f"preference: {', '.join(self.preference.names)}  from {self.preference.source}"]
        lines += [f"  {c.name:10} {c.status:16} {c.reason}" for c in self.candidates]
        return "\n".join(lines)


def as_names(backend: str | Sequence[str]) -> tuple[str, ...]:
    """A backend name or a list of them as a tuple. Raises `SpecError` for anything else."""
    names = (backend,) if isinstance(backend, str) else tuple(backend)
    if not names or not all(isinstance(n, str) for n in names):
        raise SpecError(f"backend: expected a name or a list of names, got {backend!r}")
    for name in names:
        if name not in registry().names():
            registry().get(name)
    return names


@contextmanager
def use_backend(backend: str | Sequence[str]) -> Iterator[None]:
    """Prefer a backend, or a list in order, for the calls made inside the block by this thread or task.

    Raises `BackendError` for an unknown name.
    """
    token = _context.set(as_names(backend))
    try:
        yield
    finally:
        _context.reset(token)


@lru_cache(maxsize=64)
def _user_preferences(op: str) -> tuple[Preference, ...]:
    """What environment and config file say about an op, highest first; read once per process."""
    found = []
    for variable in (f"POLYFUSE_BACKEND_{op.upper()}", "POLYFUSE_BACKEND"):
        value = os.environ.get(variable)
        if value:
            names = as_names([n.strip() for n in value.split(",") if n.strip()])
            found.append(Preference(names, f"environment variable {variable}", True))
    config = user_config()
    if config:
        settings, path = config
        if op in settings.ops:
            found.append(Preference(as_names(settings.ops[op]), f"{path}: ops.{op}", True))
        if settings.backend:
            found.append(Preference(as_names(settings.backend), f"{path}: backend", True))
    return tuple(found)


def clear_settings() -> None:
    """Forget what was read from the environment and the config file."""
    _user_preferences.cache_clear()


def preference(op: str, family: str, device: Device, names: tuple[str, ...] | None) -> Preference:
    """The highest preference that names a backend for arrays of this family.

    A name on the call counts whatever its family: the caller asked for the conversion.
    """
    if names is not None:
        return Preference(names, "backend= on the call", True)
    above = list(_user_preferences(op))
    context = context_names()
    if context is not None:
        above.insert(0, Preference(context, "polyfuse.use_backend", True))
    for candidate in above:
        if any(_family(name) in (family, None) for name in candidate.names):
            return candidate
    order, source = platform_order(device.kind, family, op)
    return Preference(order, source, False)


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


def resolve(
    op: str, call: Call, family: str, device: Device, names: tuple[str, ...] | None, needs_grad: bool = False
) -> list[tuple[str, Implementation]]:
    """The backends that can run the call, in order of preference; at least one.

    Raises `Unsupported` or `BackendError` when the preference names none that can.
    """
    wanted = preference(op, family, device, names)
    usable, refused = [], []
    for name in wanted.names:
        candidate, implementation = examine(op, name, call, None if names else family, device, needs_grad)
        if implementation:
            usable.append((name, implementation))
        else:
            refused.append(candidate)
            if not wanted.strict and not usable:
                log.warning("%s: %s does not run this call (%s), trying the next", op, name, candidate.reason)
    if not usable:
        text = "; ".join(f"{c.name}: {c.reason}" for c in refused)
        kind = Unsupported if all(c.status == "unsupported" for c in refused) else BackendError
        raise kind(f"{op}: no backend of [{', '.join(wanted.names)}] ({wanted.source}) can run this call: {text}")
    log.debug("%s: %s (%s)", op, usable[0][0], wanted.source)
    return usable


def explain_call(
    op: str, call: Call, family: str, device: Device, names: tuple[str, ...] | None, needs_grad: bool = False
) -> Explanation:
    """The resolver's decision on a call with the verdict of every known backend."""
    wanted = preference(op, family, device, names)
    order = list(dict.fromkeys((*wanted.names, *registry().names())))
    candidates, winner = [], None
    for name in order:
        candidate, implementation = examine(op, name, call, None if names else family, device, needs_grad)
        if implementation and name not in wanted.names:
            candidate = Candidate(name, "usable", f"not named by {wanted.source}")
        elif implementation and winner is None:
            winner, candidate = name, Candidate(name, "chosen", f"first usable of {wanted.source}")
        elif implementation:
            candidate = Candidate(name, "usable", f"comes after {winner} in {wanted.source}")
        candidates.append(candidate)
    return Explanation(op, family, device.kind, wanted, winner, tuple(candidates))


def check_op(op: str) -> None:
    """Raise `SpecError` for an unknown op name."""
    if op not in OPS:
        raise SpecError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
