"""What an accelerated model does: each part, fused or not and why, what became of its calls, and its graphs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any

from torch import nn

from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._graphs import forward_of
from polyfuse.integrations.transformers._parts import KINDS, find


@dataclass(frozen=True)
class Part:
    """How one part of a model stands. `reason` says why a plain inference call of it would not run fused now.

    `gemm` says of a part with quantised weights what multiplies them, on the device where they are, by what it
    quantises.
    """

    name: str
    kind: str
    fused: bool
    reason: str
    fused_calls: int = 0
    unfused_calls: Mapping[str, int] = field(default_factory=dict)  # by reason
    graphs: Mapping[int, int] = field(default_factory=dict)  # replays by budget, in tokens
    graph_bytes: int = 0  # of the pool and the static buffers
    changes: Mapping[str, int] = field(default_factory=dict)  # of the model, after which graphs were dropped
    gemm: str = ""


@dataclass(frozen=True)
class Report:
    """The parts of a model, in the order of its modules within each kind. Printed, it is a table."""

    parts: tuple[Part, ...]

    def as_dict(self) -> dict[str, Any]:
        """The parts as JSON has them."""
        return asdict(self)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("part", "kind", "fused", "why not", "fused calls", "other calls", "graphs", "GEMM")
        for part in self.parts:
            others = "; ".join(f"{count} x {reason}" for reason, count in part.unfused_calls.items())
            graphs = ", ".join(f"{tokens}: {count}" for tokens, count in sorted(part.graphs.items()))
            if part.graph_bytes:
                graphs += f" ({part.graph_bytes / 2**20:.0f} MiB)"
            name, fused = part.name or "(the model)", "yes" if part.fused else "no"
            table.add_row(name, part.kind, fused, part.reason, str(part.fused_calls), others, graphs, part.gemm)
        console = Console(file=StringIO(), width=160)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()


def report(model: nn.Module) -> Report:
    """Say of every part that `accelerate` knows in a model whether it runs fused, and what became of its calls.

    Calls are counted since `accelerate`, of copies since they were made; those in a graph of torch.compile are not.
    """
    return Report(tuple(_part(*found) for found in find(model)))


def _part(kind: str, name: str, module: Any) -> Part:
    installed = KINDS[kind].is_fused(module)
    if installed:
        reason = KINDS[kind].why_not(module)
    else:
        own = _patch.own_forward(module, within_hooks=True)
        reason = _patch.refusal(module) or ("not accelerated" if own else "has another forward")
    calls = _patch.calls(module)
    gemm = KINDS[kind].gemm(module)
    part = Part(name, kind, installed and not reason, reason, calls.fused, dict(calls.unfused), gemm=gemm)
    manager = getattr(forward_of(module), "existing", None)
    if manager is None:
        return part
    stats = manager.stats
    graphs = {tokens: stats.replays[tokens] for tokens in stats.costs}
    sizes = stats.pool_bytes + stats.buffer_bytes
    return replace(part, graphs=graphs, graph_bytes=sizes, changes=dict(stats.changes))
