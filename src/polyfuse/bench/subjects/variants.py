"""The ways to run a text model with Gated DeltaNet layers: untouched and accelerated, with and without FLA.

FLA is the package flash-linear-attention, of which most users of these models have the delta rule. Transformers calls
it where it is installed, and `accelerate` does through the backend `fla` of examples/polyfuse-fla. So what is installed
decides what a machine can compare. A plain variant runs as if nothing were: Transformers' PyTorch functions, or
Polyfuse's own backends.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from inspect import getclosurevars, unwrap
from typing import Any
from unittest.mock import patch

from torch import nn

import polyfuse
from polyfuse.bench.baseline import untouched
from polyfuse.configs import platform_order
from polyfuse.dispatch import registry
from polyfuse.integrations.transformers._gated_delta_net_checks import FUNCTIONS
from polyfuse.spec import BackendError

UNTOUCHED, ACCELERATED = "untouched", "accelerated"
PLAIN = UNTOUCHED, ACCELERATED
WITH = " + "
FLA = "fla"  # the backend's name, and that of the package's module
ACCELERATED_FLA = WITH.join([ACCELERATED, FLA])


def choose_variants(names: Any) -> tuple[list[str], list[str]]:
    """The variants that this machine has, untouched ones first, and why it lacks others.

    `names` is the Python module of the model's classes, or whatever has its functions.
    """
    found, notes = packages_called(names), []
    variants = [UNTOUCHED, *([WITH.join([UNTOUCHED, *found])] if found else []), ACCELERATED]
    if FLA not in found:
        notes.append(
            f"flash-linear-attention {_why_no_package()}: untouched models run Transformers' PyTorch delta rule"
        )
    if reason := _why_no_backend():
        notes.append(f"no variant '{ACCELERATED_FLA}': {reason}")
    else:
        variants.append(ACCELERATED_FLA)
    return variants, notes


def implementation(function: Any) -> Any:
    """What a function that Transformers' layers call hands its calls to: a package's function, or its own."""
    inner = _inner(function)
    return getclosurevars(inner).nonlocals.get("implementation", inner)


def packages_called(names: Any) -> list[str]:
    """The packages, other than Transformers, that the layers' functions hand their calls to."""
    found = {_package(implementation(getattr(names, name))) for name in FUNCTIONS}
    return sorted(found - {"transformers"})


@contextmanager
def rules_of(variant: str, names: Any, kind: str) -> Iterator[None]:
    """A block in which a variant has its delta rule, on a device of a kind.

    In a plain variant functions that hand on to a package are replaced by what they wrap, and the backend `fla` is
    passed over; in an accelerated one with FLA it comes first.
    """
    own = [name for name in platform_order(kind, "torch", "gated_delta_rule")[0] if name != FLA]
    with ExitStack() as stack:
        if variant in PLAIN:
            for name, function in _plain_functions(names).items():
                stack.enter_context(patch.object(names, name, function))
        if not untouched(variant):
            stack.enter_context(polyfuse.use_backend(own if variant in PLAIN else [FLA, *own]))
        yield


def _plain_functions(names: Any) -> dict[str, Any]:
    """Transformers' own functions, by name, where a layer's function hands on to a package."""
    functions = {name: getattr(names, name) for name in FUNCTIONS}
    calling = {name for name, function in functions.items() if _package(implementation(function)) != "transformers"}
    return {name: unwrap(_inner(functions[name])) for name in calling}


def _why_no_package() -> str:
    """Why Transformers does not call flash-linear-attention."""
    try:
        found = version("flash-linear-attention")
    except PackageNotFoundError:
        return "is not installed"
    return f"{found} is installed, but Transformers cannot import it here"


def _why_no_backend() -> str:
    """Why no call can reach the backend `fla`; "" if one can."""
    if FLA not in registry().names():
        return "polyfuse-fla is not installed"
    try:
        missing = registry().get(FLA).missing("gated_delta_rule")
    except BackendError as error:
        return str(error)
    return missing[1] if missing else ""


def _inner(function: Any) -> Any:
    """A function as Transformers made it, inside of the module that the kernels package makes of it."""
    return getclosurevars(type(function).forward).nonlocals["func"] if isinstance(function, nn.Module) else function


def _package(function: Any) -> str:
    return str(unwrap(function).__module__).partition(".")[0]
