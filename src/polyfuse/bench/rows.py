"""What `polyfuse bench` finds of the ops: a row for each case and backend, and for each case and peer."""

from dataclasses import dataclass, field

from polyfuse.bench.results import Results


@dataclass(frozen=True)
class Row:
    """One case on one backend. Times are in microseconds per call, `fraction` is of the measured stream ceiling.

    `device_us` is of calls in a row on the same inputs, `cold_us` of a call whose inputs no cache holds.
    """

    op: str
    model: str
    case: str
    backend: str
    device_us: float
    host_us: float
    gigabytes_per_s: float
    fraction: float
    eager_ratio: float
    compile_ratio: float | None
    cold_us: float | None = None


@dataclass(frozen=True)
class PeerRow:
    """One case on a function of another package, and how many times the time of ours, of the backend `ours`, it takes.

    `status` is `right`, `differs` or `wrong` by the oracle, or `failed` where it did not run; `note` says how or why.
    """

    op: str
    model: str
    case: str
    peer: str
    version: str
    status: str
    note: str = ""
    device_us: float | None = None
    host_us: float | None = None
    cold_us: float | None = None
    ours: str | None = None
    ratio: float | None = None
    cold_ratio: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """What of a case was not measured, and why."""

    op: str
    model: str
    case: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} {self.case} of {self.model}: {self.what}: {self.reason}"


@dataclass
class Bench(Results):
    """The time of every op that was measured. `packages` are those of the peers, with the version or None."""

    ceiling_gb_s: float
    rows: list[Row] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    packages: dict[str, str | None] = field(default_factory=dict)
    budget_s: float = 0.0

    def add(self, found: Row | PeerRow | LeftOut) -> None:
        """Keep what was found."""
        match found:
            case Row():
                self.rows.append(found)
            case PeerRow():
                self.peers.append(found)
            case LeftOut():
                self.left_out.append(found)
