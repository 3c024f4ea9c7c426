"""What became of one case on one backend, and what the cases of an op add up to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on

Status = Literal["passed", "failed", "waived", "skipped"]
Ending = Literal["", "raised", "crashed", "timed_out", "out_of_memory", "exited"]
Reason = Literal["", "left_out", "unclaimed", "too_large", "unavailable"]
Standing = Literal["conformant", "partial", "failed", "not run"]

# Keys that a report does not know are refused when it is read: pydantic looks for this name.
STRICT: Mapping[str, str] = {"extra": "forbid"}


class Margin(TypedDict):
    """How near a result came to its bound: the largest error, as a share of the bound, and the element that has it.

    `share` is None where the error is no finite number, `at` where no element has an error.
    """

    share: float | None
    at: Sequence[int] | None


@dataclass(frozen=True)
class Result:
    """One case on one backend.

    `waived` is a failure that the backend has declared, with its reason. `detail` has a line for each thing that is
    wrong, or says why the case did not run; `checks` names the checks that failed. `ending` says how a case ended that
    gave no results to check, and `reason` why one was skipped: left out by the level or a filter, not claimed by the
    backend, too large for the level, or on a backend that cannot run here. `margins` has a margin for each result
    that the oracle's interval judged, by its name. `core` marks the cases that the op's spec names as its core.
    """

    __pydantic_config__: ClassVar = STRICT

    op: str
    backend: str
    case: str
    status: Status
    seconds: float = 0.0
    detail: str = ""
    checks: tuple[str, ...] = ()
    ending: Ending = ""
    reason: Reason = ""
    margins: Mapping[str, Margin] = field(default_factory=dict)
    core: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the cases of one op prove of one backend, and why not more.

    `claimed` of the `asked` cases are claimed by the backend. Cases that the level or a filter leaves out, and those
    that are too large for the level, were not asked about.
    """

    status: Standing
    why: str
    claimed: int
    asked: int

    @property
    def share(self) -> float:
        """The claimed share of the cases that were asked about; 0 if there were none."""
        return self.claimed / self.asked if self.asked else 0.0
