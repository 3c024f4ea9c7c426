"""A torch.compile pass that puts the quantising ops where a graph computes what they do.

    with fusion.enable():
        torch.compile(model)(x)
    fusion.report()

The pass reads the ATen graph before Inductor changes it, so that every rounding of the eager code is still in it, and
replaces what an op computes bit for bit.

**The way of a match through the files.** `enable` has `_passes.py` put two passes into Inductor's configuration.
`FusePass` gets each graph first, and calls `fuse` in `_replace.py`, which takes three steps:

1. **Read.** `_reader.py` goes through the nodes from front to back and gives each node a label of `_values.py` or
   `_labels.py`: what its value is, such as "y = silu(gate) * up, rounded to bfloat16". A label depends on those of the
   node's arguments. The reader of `silu` finds the label of a gate on its argument, the reader of `amax` that of |y|,
   until the conversion to fp8 of a quotient whose scale is known gives a `Quantised`: a q, with the whole way to it in
   its label. The readers stand in the order of that way: `_operands.py` (gate and up), `_activation.py` (silu, y),
   `_norm.py` (normalised rows), `_scale.py` (amax, the division, its bounds), `_power_of_two.py` (ue8m0 scales),
   `_ratio.py` (y / scale, q), and `_layout.py` (packed, transposed or padded scales). `_nodes.py` has what all of them
   ask of a node. A tensor that no reader knows is a `Source`, of which every op can start; no label rests on a guess.
   Where a value leaves the way, its `Source` has a `Near` with the reason, which element-wise operations carry on.
2. **Match.** `_match.py` compares each `Quantised` with what a quantiser computes: qmax and bounds. `_calls.py` finds
   the op that computes most of the way to its y: `silu_mul_block_quant`, `rms_norm_block_quant`, or else `block_quant`
   of y as it is. It becomes a `Match`, with the op's tensors and attributes; a `NearMiss` has the reason why it is
   none, or none of an op that computes more. `_results.py` decides which of the graph's scales is the op's result, in
   which format and layout, and which nodes it replaces.
3. **Replace.** `_replace.py` puts the op's call before the first of these nodes, and erases what nothing uses any more.

Then Inductor changes and lowers the graph. `CountPass` runs at the end, and adds what is in the graph to Inductor's
counters, from which `report` reads it.
"""

import json
from dataclasses import dataclass
from typing import Any

from torch._dynamo.utils import counters

from polyfuse.runtime.fusion._passes import COUNTER, NoMatch, Settings, configure
from polyfuse.runtime.fusion._replace import NAMES
from polyfuse.spec import fail

__all__ = ["Enabled", "GraphReport", "NoMatch", "disable", "enable", "report"]


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    `matches` has an entry for each call that the pass put there: the `op`, `shape` and `dtype` of x, the names of its
    other `tensors`, and those attributes that are not the op's defaults. `left` says for what is almost a match why it
    was left alone, or why the call in its place is none of an op that computes more.
    """

    matches: tuple[dict[str, Any], ...]
    left: tuple[str, ...]


class Enabled:
    """The pass, in force from its making to the end of a with-block or to `disable`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _in_force.append(self)
        _configure()

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *error: object) -> None:
        if self in _in_force:
            _in_force.remove(self)
        _configure()


_in_force: list[Enabled] = []


def _configure() -> None:
    """Have the last of what is in force hold, or nothing."""
    configure(_in_force[-1].settings if _in_force else None)


def enable(*, strict: bool | str = False, materialize: bool = True) -> Enabled:
    """Fuse in the graphs that torch.compile compiles from now on; as a with-block, to its end.

    `materialize=True` replaces only what an op computes bit for bit. With False y keeps its fp32 value: the op's
    results are then those of the spec, and differ from the unfused ones in the last bits. With `strict` a graph with
    nothing to fuse raises `NoMatch` when it is compiled, and with `strict` the name of an op one without that op:
    where an activation is almost what `silu_mul_block_quant` computes, `block_quant` alone is a match too. Of several
    calls the last one holds. Passes that `torch._inductor.config` already has run first. Raises `SpecError` for other
    arguments.
    """
    if not isinstance(strict, bool) and strict not in NAMES:
        fail("fusion.enable", "strict", f"True, False or one of {', '.join(NAMES)}", repr(strict))
    if not isinstance(materialize, bool):
        fail("fusion.enable", "materialize", "True or False", repr(materialize))
    return Enabled(Settings(strict, materialize))


def disable() -> None:
    """End every `enable`. What is compiled stays as it is."""
    _in_force.clear()
    _configure()


def report() -> list[GraphReport]:
    """Every graph compiled by this process with the pass in force, or loaded from a compile cache; equal ones together.

    The counts are those of `torch._dynamo.utils.counters`, and are cleared with them.
    """
    graphs: list[GraphReport] = []
    for key, count in counters["inductor"].items():
        if key.startswith(COUNTER):
            entry = json.loads(key.removeprefix(COUNTER))
            graphs += [GraphReport(tuple(entry["matches"]), tuple(entry["left"]))] * count
    return graphs
