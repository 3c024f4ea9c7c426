"""The passes that Inductor runs: one that fuses before it changes a graph, and one that reports what is in it then."""

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

from polyfuse import spec
from polyfuse.dispatch import _torch_library
from polyfuse.dispatch._plan import CALLS
from polyfuse.runtime.fusion._replace import NAMES, PLACED, fuse, is_inference
from polyfuse.spec import SpecError

COUNTER = "polyfuse.fusion "  # the start of the names under which Inductor's counters hold a graph's report

_LEFT = "polyfuse_fusion_left"  # in the meta of a graph's module: why near misses were left alone
_GRADIENTS = "the graph computes gradients, which the op has none of"


class NoMatch(SpecError, ShortenTraceback):
    """A graph compiled under a strict `enable` lacks what must match; raised by the call that compiles it."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)  # of the errors that torch does not wrap


@dataclass(frozen=True)
class Settings:
    """The arguments of `enable`."""

    strict: bool | str
    materialize: bool


class OurPass(CustomGraphPass):
    """A pass that first runs those that were configured before it; `run` is its own work."""

    def __init__(self, settings: Settings, earlier: Any) -> None:
        self.settings = settings
        self.earlier = earlier

    def run(self, graph: Graph) -> None:
        """Read or change the graph in place."""
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


class FusePass(OurPass):
    """Fuses in a graph, and keeps in the meta of its module why near misses were left alone."""

    def run(self, graph: Graph) -> None:
        ops, left = set[str](), [_GRADIENTS]
        if is_inference(graph):
            matches, near_misses = fuse(graph, self.settings.materialize)
            ops, left = {match.op for match in matches}, [near_miss.reason for near_miss in near_misses]
        strict = self.settings.strict
        if strict and (strict not in ops if isinstance(strict, str) else not ops):
            wanted = strict if isinstance(strict, str) else "something to fuse"
            reasons = f" ({'; '.join(left)})" if left else ""
            got = ", ".join(sorted(ops)) or "none"
            raise NoMatch(f"fusion.enable: strict: expected {wanted} in each graph, got {got}{reasons}")
        _module_meta(graph)[_LEFT] = left


class CountPass(OurPass):
    """Adds what is in a graph to Inductor's counters: a compile cache keeps with a graph what it added."""

    def run(self, graph: Graph) -> None:
        matches = [node.meta[PLACED] for node in graph.nodes if PLACED in node.meta]
        left = _module_meta(graph).get(_LEFT, []) if is_inference(graph) else [_GRADIENTS]
        counters["inductor"][COUNTER + json.dumps({"matches": matches, "left": left})] += 1


_SLOTS: dict[str, type[OurPass]] = {"joint_custom_pre_pass": FusePass, "post_grad_custom_post_pass": CountPass}


def configure(settings: Settings | None) -> None:
    """Put the passes with these settings into Inductor's configuration, or with None take them out of it."""
    for slot, kind in _SLOTS.items():
        current = getattr(inductor, slot)
        earlier = current.earlier if isinstance(current, OurPass) else current
        setattr(inductor, slot, earlier if settings is None else kind(settings, earlier))


def _module_meta(graph: Graph) -> dict[str, Any]:
    module = graph.owning_module
    return {} if module is None else module.meta


def _as_tuple(passes: Any) -> tuple[Any, ...]:
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, Sequence) else (passes,)


@lru_cache(maxsize=1)
def _source() -> str:
    """A hash of all that decides what the passes do: this package, the ops' specs and their schemas."""
    specs = [Path(spec.__file__).parent / f"{name}.py" for name in NAMES]
    files = [*sorted(Path(__file__).parent.glob("*.py")), *specs]
    schemas = "".join(_torch_library.schema(CALLS[name]) for name in NAMES)
    return sha256(b"".join(f.read_bytes() for f in files) + schemas.encode()).hexdigest()
