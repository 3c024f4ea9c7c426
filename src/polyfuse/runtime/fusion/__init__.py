"""A torch.compile pass that puts `silu_mul_block_quant` where a graph computes SiLU-mul and then block quantisation.

    with fusion.enable():
        torch.compile(model)(x)
    fusion.report()

The pass reads the ATen graph before Inductor changes it, so that every rounding of the eager code is still in it, and
replaces what the op computes bit for bit.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.utils import counters
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import polyfuse.spec.silu_mul_block_quant as op
from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS
from polyfuse.runtime.fusion._replace import NAME, PLACED, fuse, is_inference
from polyfuse.spec import SpecError, fail

__all__ = ["Enabled", "GraphReport", "NoMatch", "disable", "enable", "report"]

_COUNTER = "polyfuse.fusion "


class NoMatch(SpecError, ShortenTraceback):
    """A graph compiled under `enable(strict=True)` has nothing to fuse; raised by the call that compiles it."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)  # of the errors that torch does not wrap


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    `matches` has an entry for each call of the op that the pass put there: `shape` and `dtype` of x, and those
    attributes that are not the op's defaults. `left` says for what is almost a match why it was left alone.
    """

    matches: tuple[dict[str, Any], ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The arguments of `enable`."""

    strict: bool
    materialize: bool


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


def enable(*, strict: bool = False, materialize: bool = True) -> Enabled:
    """Fuse in the graphs that torch.compile compiles from now on; as a with-block, to its end.

    `materialize=True` replaces only what the op computes bit for bit. With False y keeps its fp32 value: the op's
    results are then those of the spec, and differ from the unfused ones in the last bits. With `strict` a graph with
    nothing to fuse raises `NoMatch` when it is compiled. Of several calls the last one holds. Passes that
    `torch._inductor.config` already has run first. Raises `SpecError` for arguments that are not booleans.
    """
    for name, value in (("strict", strict), ("materialize", materialize)):
        if not isinstance(value, bool):
            fail("fusion.enable", name, "True or False", repr(value))
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
        if key.startswith(_COUNTER):
            entry = json.loads(key.removeprefix(_COUNTER))
            graphs += [GraphReport(tuple(entry["matches"]), tuple(entry["left"]))] * count
    return graphs


class _Pass(CustomGraphPass):
    """A pass behind those that were configured before it."""

    def __init__(self, settings: Settings, earlier: Any) -> None:
        self.settings = settings
        self.earlier = earlier

    def run(self, graph: Graph) -> None:
        raise NotImplementedError

    def __call__(self, graph: Graph) -> None:
        inference_aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())
        for earlier in _as_tuple(self.earlier):
            options = {"is_inference": is_inference(graph)} if isinstance(earlier, inference_aware) else {}
            earlier(graph, **options)
        self.run(graph)

    def uuid(self) -> Any:
        """What identifies the graphs' changes for compile caches; None if an earlier pass has no such identity."""
        earlier = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in _as_tuple(self.earlier)]
        own = (type(self).__name__, self.settings.strict, self.settings.materialize, _source())
        return None if None in earlier else (own, *earlier)


class _Fuse(_Pass):
    def run(self, graph: Graph) -> None:
        matches, left = fuse(graph, self.settings.materialize) if is_inference(graph) else (0, [_GRADIENTS])
        if not matches and self.settings.strict:
            reasons = f" ({'; '.join(left)})" if left else ""
            raise NoMatch(f"fusion.enable: strict: expected something to fuse in each graph, got none{reasons}")
        _meta(graph)[PLACED] = left


class _Count(_Pass):
    """Adds what is in a graph to Inductor's counters: a compile cache keeps with a graph what it added."""

    def run(self, graph: Graph) -> None:
        matches = [node.meta[PLACED] for node in graph.nodes if PLACED in node.meta]
        left = _meta(graph).get(PLACED, []) if is_inference(graph) else [_GRADIENTS]
        counters["inductor"][_COUNTER + json.dumps({"matches": matches, "left": left})] += 1


_GRADIENTS = "the graph computes gradients, which the op has none of"
_SLOTS: dict[str, type[_Pass]] = {"joint_custom_pre_pass": _Fuse, "post_grad_custom_post_pass": _Count}
_in_force: list[Enabled] = []


def _configure() -> None:
    """Put the passes of the last `enable` into Inductor's configuration, or take them out of it."""
    for slot, kind in _SLOTS.items():
        current = getattr(inductor, slot)
        earlier = current.earlier if isinstance(current, _Pass) else current
        setattr(inductor, slot, kind(_in_force[-1].settings, earlier) if _in_force else earlier)


def _meta(graph: Graph) -> dict[str, Any]:
    module = graph.owning_module
    return {} if module is None else module.meta


def _as_tuple(passes: Any) -> tuple[Any, ...]:
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, Sequence) else (passes,)


@lru_cache(maxsize=1)
def _source() -> str:
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(op.__file__)]
    return sha256(b"".join(f.read_bytes() for f in files) + _torch_library.schema(CALLS[NAME]).encode()).hexdigest()
