"""The backends: the five built in, those of installed packages, and those registered at run time."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from polyfuse.spec import FORMER_NAMES, OPS, BackendError, Capability, canonical, how_to_install

GROUP = "polyfuse.backends"


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of one op."""

    function: Callable[..., Any]
    capability: Capability


@dataclass(frozen=True)
class Backend:
    """A set of op implementations for one kind of array.

    `module` is a package with one submodule for each op that it implements, which defines a function of the op's name
    and parameters and a `CAPABILITY`. It is imported only when one of its ops is needed. The package may define
    `unavailable() -> str | None`, the reason why it cannot run on this machine.

    `family` is the kind of array it takes (`"torch"`, `"jax"` or `"numpy"`); `requires` are modules that must
    be installed; `implements` maps each op to the version of the spec that the implementation follows, and an op
    without a submodule is not implemented whatever it says; `override` allows it to take the name of an existing
    backend; `devices` are the device kinds, unknown to polyfuse, on which it comes first without being named.
    `waivers` name conformance cases known to fail, as `"op/case"` with wildcards, each with its reason.
    """

    name: str
    family: str
    module: str
    requires: tuple[str, ...] = ()
    implements: Mapping[str, int] = field(default_factory=dict)
    override: bool = False
    devices: tuple[str, ...] = ()
    waivers: Mapping[str, str] = field(default_factory=dict)
    origin: str = "registered"

    def waiver(self, op: str, case: str) -> str | None:
        """The reason why a conformance case may fail, if there is one."""
        return next((why for what, why in self.waivers.items() if fnmatchcase(f"{op}/{case}", what)), None)

    def missing(self, op: str) -> tuple[str, str] | None:
        """(status, reason) why the op cannot be loaded here, or None. Imports no op module.

        Raises `BackendError` if the package cannot be imported or its `unavailable` fails.
        """
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                return "not_installed", how_to_install(module)
        name = self._name_of(op)
        if name not in self.implements:
            return "not_implemented", f"does not implement {op}"
        version = self.implements[name]
        if version != OPS[op].version:
            return "spec_version", f"implements version {version} of {op}, this is version {OPS[op].version}"
        unavailable = getattr(_import(self, self.module), "unavailable", lambda: None)
        try:
            reason = unavailable()
        except Exception as error:
            raise BackendError(f"{self.name}: unavailable() failed: {type(error).__name__}: {error}") from error
        if reason:
            return "not_installed", reason
        if not _exists(f"{self.module}.{name}"):
            return "not_implemented", f"does not implement {op}: there is no module {self.module}.{name}"
        return None

    def load(self, op: str) -> Implementation:
        """Import the op's module. Raises `BackendError` if it fails, or does not define what it must, or claims what
        the op's spec does not have.
        """
        name = self._name_of(op)
        module = _import(self, f"{self.module}.{name}")
        try:
            function, capability = getattr(module, name), module.CAPABILITY
        except AttributeError as error:
            raise BackendError(f"{self.name}: {error}") from error
        if not isinstance(capability, Capability):
            kind = type(capability).__name__
            raise BackendError(f"{self.name}: {op}: CAPABILITY: expected a polyfuse.spec.Capability, got a {kind}")
        mistakes = capability.mistakes(OPS[op])
        if mistakes:
            raise BackendError(f"{self.name}: {op}: CAPABILITY: {'; '.join(mistakes)}")
        return Implementation(function, capability)

    def _name_of(self, op: str) -> str:
        """The name under which the package has the op: that of now, or a former one that it still implements."""
        former = [old for old, new in FORMER_NAMES.items() if new == op and old in self.implements]
        return op if op in self.implements or not former else former[0]


def _exists(module: str) -> bool:
    """Whether a module can be imported; its package is imported for that."""
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _import(backend: Backend, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise BackendError(f"{backend.name}: importing {module} failed: {type(error).__name__}: {error}") from error


def _ops_of(module: str) -> dict[str, int]:
    """The ops that a built-in layer has a file for, at the version of their specs."""
    folder = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return {name: spec.version for name, spec in OPS.items() if (folder / f"{name}.py").is_file()}


_BUILT_IN = tuple(
    Backend(name, family, module, requires, _ops_of(module), origin="built in")
    for name, family, module, requires in (
        ("numpy", "numpy", "polyfuse.reference", ()),
        ("jax", "jax", "polyfuse.reference.jax", ("jax",)),
        ("pallas", "jax", "polyfuse.reference.pallas", ("jax",)),
        ("torch", "torch", "polyfuse.torch_impl", ("torch",)),
        ("triton", "torch", "polyfuse.triton_impl", ("torch", "triton")),
    )
)


class Registry:
    """Names to backends. An installed plugin stays metadata until something asks for it.

    `problems` holds (name, text) for each plugin that could not be used; a built-in backend keeps its name.
    """

    def __init__(self) -> None:
        self._backends = {b.name: b for b in _BUILT_IN}
        self._plugins: dict[str, EntryPoint] = {}
        self.problems: list[tuple[str, str]] = []
        for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
            twin = self._plugins.setdefault(entry.name, entry)
            if twin is not entry:
                both = f"{twin.value} and {entry.value}"
                self.problems.append((entry.name, f"two installed packages provide it: {both}"))
        for name, _ in self.problems:
            self._plugins.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """Every usable or not yet loaded name, loading nothing."""
        return tuple(dict.fromkeys((*self._backends, *self._plugins)))

    def provides(self, name: str) -> bool:
        """Whether polyfuse or an installed package has a backend of that name, usable or not."""
        return name in self.names() or any(name == problem for problem, _ in self.problems)

    def get(self, name: str) -> Backend:
        """The backend of that name. Raises `BackendError` if it is unknown or cannot be loaded."""
        if name in self._plugins:
            self._load(self._plugins.pop(name))
        if name in self._backends:
            return self._backends[name]
        for problem, text in self.problems:
            if problem == name:
                raise BackendError(f"backend {name!r}: {text.strip().splitlines()[-1]}")
        raise BackendError(f"backend: expected one of {', '.join(self.names())}, got {name!r}")

    def usable(self) -> list[Backend]:
        """Every backend but those that cannot be loaded, which are among the `problems` then."""
        found = []
        for name in self.names():
            with suppress(BackendError):
                found.append(self.get(name))
        return found

    def add(self, backend: Backend) -> None:
        """Register a backend.

        Raises `BackendError` for an op that does not exist, and for a name that is taken unless `override` is set.
        """
        for former in FORMER_NAMES.keys() & backend.implements.keys():
            canonical(former)
        unknown = [op for op in backend.implements if op not in OPS and op not in FORMER_NAMES]
        if unknown:
            raise BackendError(
                f"backend {backend.name!r}: implements: expected ops of {', '.join(OPS)}, got {', '.join(unknown)}"
            )
        if backend.name in self.names() and not backend.override:
            known = self._backends.get(backend.name)
            by = known.origin if known else f"entry point {self._plugins[backend.name].value}"
            raise BackendError(f"backend {backend.name!r} ({backend.module}) exists already ({by}); try override=True")
        self._plugins.pop(backend.name, None)
        self._backends[backend.name] = backend
        for changed in on_change:
            changed()

    def _load(self, entry: EntryPoint) -> None:
        try:
            backend = entry.load()
            if not isinstance(backend, Backend) or backend.name != entry.name:
                raise BackendError(f"entry point {entry.value} must be a polyfuse Backend named {entry.name!r}")
            self.add(replace(backend, origin=f"entry point {entry.value}"))
        except Exception:
            self.problems.append((entry.name, traceback.format_exc()))


# Called when a backend is added: what was decided without it is decided anew.
on_change: list[Callable[[], None]] = []


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The process's registry."""
    return Registry()
