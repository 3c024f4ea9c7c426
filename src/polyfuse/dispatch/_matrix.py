"""What every backend claims to run, as data: the support matrix."""

from dataclasses import dataclass
from typing import Any

from polyfuse.dispatch._registry import registry
from polyfuse.spec import OPS, BackendError


@dataclass(frozen=True)
class Support:
    """One backend's claim on one op. `missing` says why it cannot run here at all; the other fields are then empty."""

    op: str
    backend: str
    family: str
    missing: str | None
    devices: tuple[str, ...] = ()
    interpreted: tuple[str, ...] = ()
    differentiable: bool = False
    limits: tuple[str, ...] = ()  # what it is restricted to, in words
    host_reads: tuple[str, ...] = ()  # arrays whose values are read on the host
    compiled: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """Of a table's row, after the op."""
        if self.missing:
            return self.backend, self.family, "-", "-", self.missing
        devices = ("any" if d == "*" else f"{d} (interpreted)" if d in self.interpreted else d for d in self.devices)
        return (
            self.backend,
            self.family,
            ", ".join(devices),
            "yes" if self.differentiable else "no",
            "; ".join(self.limits) or "-",
        )


COLUMNS = ("op", "backend", "arrays", "devices", "gradients", "limits")


def support_matrix() -> list[Support]:
    """Every known backend's claim on every op. Loads all of them; a broken one is left to `polyfuse info`."""
    return [support(op, name) for op in OPS for name in registry().names()]


def support(op: str, name: str) -> Support:
    """A backend's claim on an op. Loads the backend."""
    try:
        backend = registry().get(name)
        missing = backend.missing(op)
        if missing:
            return Support(op, name, backend.family, missing[1])
        capability = backend.load(op).capability
    except BackendError as error:
        return Support(op, name, "", str(error).strip().splitlines()[-1])
    return Support(
        op, name, backend.family, None, capability.devices, capability.interpreted,
        capability.differentiable, tuple(_limits(capability)), capability.host_reads,
        capability.compiled,
    )  # fmt: skip


def _limits(capability: Any) -> list[str]:
    limits = [f"{device} {major}.{minor} or later" for device, (major, minor) in capability.min_arch.items()]
    limits += [f"{name} in {', '.join(dtypes)}" for name, dtypes in capability.dtypes.items()]
    limits += [f"{name} in {', '.join(map(repr, values))}" for name, values in capability.attrs.items()]
    limits += [f"{name} a multiple of {divisor}" for name, divisor in capability.multiples.items()]
    limits += [f"{name} from {least} to {greatest}" for name, (least, greatest) in capability.ranges.items()]
    limits += [f"{name} is read on the host: never in the capture of a graph" for name in capability.host_reads]
    for deferral in capability.defers:
        which = " and ".join(f"{name} a multiple of {divisor}" for name, divisor in deferral.multiples.items())
        limits.append(f"last on {deferral.device} with {which}: {deferral.reason}")
    return limits


def as_markdown(rows: list[Support]) -> str:
    """The matrix as one Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *((row.op, *row.cells()) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"
