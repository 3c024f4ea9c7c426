"""Whether a backend can run an op here, as `info` and `doctor` say it."""

import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyfuse.spec import OPS, BackendError

if TYPE_CHECKING:
    from polyfuse.dispatch import Backend


@dataclass(frozen=True)
class Verdict:
    """`available`, `interpreted`, `not_implemented`, or why not: `not_installed`, `spec_version` or `broken`."""

    status: str
    reason: str = ""


def verdicts(backend: "Backend", device: str) -> dict[str, Verdict]:
    """The verdict on every op."""
    return {op: _verdict(backend, op, device) for op in OPS}


def _verdict(backend: "Backend", op: str, device: str) -> Verdict:
    try:
        missing = backend.missing(op)
        if missing is not None:
            return Verdict(*missing)
        emulated = device in backend.load(op).capability.interpreted
    except BackendError as error:
        return Verdict("broken", "".join(traceback.format_exception(error.__cause__ or error)))
    return Verdict("interpreted" if emulated else "available")
