"""The kinds of parts that `accelerate` knows, and how each is found in a model, fused, and asked how it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyfuse.integrations.transformers import _fp8_mlp, _gated_delta_net, _graphs
from polyfuse.integrations.transformers._gated_delta_net_checks import why_not


@dataclass(frozen=True)
class Kind:
    """One kind of part: what finds them by name, and what says why one of them, as it is now, is not fused."""

    doc: str
    find: Callable[[nn.Module], Mapping[str, Any]]
    why_not: Callable[[Any], str]


KINDS: Mapping[str, Kind] = {
    "vision": Kind(f"a vision model ({', '.join(_graphs.ENCODERS)})", _graphs.vision_models, _graphs.why_not),
    "gated_delta_net": Kind("a Gated DeltaNet layer", _gated_delta_net.gated_delta_nets, why_not),
    "fp8_mlp": Kind("an FP8 MLP", _fp8_mlp.fp8_mlps, _fp8_mlp.why_not),
}


def fuse(kind: str, module: Any, name: str, graphs: Mapping[str, Any] | bool | None, by_request: bool) -> str:
    """Put a forward of ours into a part, or say why not."""
    if kind == "vision":
        return _graphs.fuse(module, graphs, name, by_request)
    return (_gated_delta_net if kind == "gated_delta_net" else _fp8_mlp).fuse(module, name, by_request)


def find(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Every part of a model: its kind, its name in the model, and the module itself."""
    return [(kind, name, module) for kind in KINDS for name, module in KINDS[kind].find(model).items()]
