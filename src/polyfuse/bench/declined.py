"""Calls of real models that a platform's first choice declines: each runs on a slower backend, without an error."""

from collections.abc import Iterator
from dataclasses import dataclass

from polyfuse.configs import model_configs, platform_order
from polyfuse.conformance.cases import model_case
from polyfuse.conformance.inputs import described
from polyfuse.dispatch import Device, examine, registry
from polyfuse.spec import OPS, Call, bind

FAMILIES = ("torch", "jax")


@dataclass(frozen=True)
class Declined:
    """A bench case of a model, and why the first backend of a platform does not run it."""

    op: str
    model: str
    case: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.case} of {self.model}: {self.backend}: {self.reason}"


def declined(device: Device, family: str = "torch", model: str | None = None) -> Iterator[Declined]:
    """What the first backend of this device's platform file declines of the models' bench cases, by its capability.

    A backend of another package counts where it is installed. The device need not be there, and no array is made.
    """
    for name, config in model_configs().items():
        if model not in (None, name):
            continue
        for op, cases in config.bench.items():
            for shape in cases:
                call = bind(OPS[op], described(OPS[op], model_case(name, shape)))
                first = _first(op, call, device, family)
                candidate, implementation = examine(op, first, call, family, device, False)
                if implementation is None and candidate.status != "not_installed":
                    yield Declined(op, name, shape.name, first, candidate.reason)


def _first(op: str, call: Call, device: Device, family: str) -> str:
    """The platform's first backend for a call; one that leaves the call to others is not the first."""
    order, _ = platform_order(device.kind, family, op)
    known = [name for name in order if registry().provides(name)]
    return min(known, key=lambda name: _defers(op, name, call, device))


def _defers(op: str, name: str, call: Call, device: Device) -> bool:
    backend = registry().get(name)
    return not backend.missing(op) and backend.load(op).capability.deferral(call, device.kind) is not None
