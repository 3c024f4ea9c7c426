"""The kinds of parts that `accelerate` knows, and how each is found in a model, fused, and asked how it stands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyfuse.integrations.transformers import (
    _fp8_experts,
    _fp8_mlp,
    _gated_delta_net,
    _graphs,
    _patch,
    _torchao_mlp,
)
from polyfuse.integrations.transformers._gated_delta_net_checks import why_not


@dataclass(frozen=True)
class Kind:
    """One kind of part: what finds them by name, and what says why one of them, as it is now, is not fused.

    `is_fused` says whether calls of one come to a forward of ours, and `gemm` what multiplies what it quantises.
    """

    doc: str
    find: Callable[[nn.Module], Mapping[str, Any]]
    why_not: Callable[[Any], str]
    is_fused: Callable[[Any], bool] = _patch.is_installed
    gemm: Callable[[Any], str] = lambda module: ""


KINDS: Mapping[str, Kind] = {
    "vision": Kind(f"a vision model ({', '.join(_graphs.ENCODERS)})", _graphs.vision_models, _graphs.why_not),
    "gated_delta_net": Kind("a Gated DeltaNet layer", _gated_delta_net.gated_delta_nets, why_not),
    "fp8_mlp": Kind("an FP8 MLP", _fp8_mlp.fp8_mlps, _fp8_mlp.why_not, _fp8_mlp.is_fused, _fp8_mlp.gemm),
    "fp8_experts": Kind(
        *("FP8 experts", _fp8_experts.fp8_experts, _fp8_experts.why_not, _fp8_experts.is_fused, _fp8_experts.gemm),
    ),
    "torchao_mlp": Kind(
        "an MLP that torchao has quantised to MXFP8, MXFP4 or NVFP4",
        *(_torchao_mlp.torchao_mlps, _torchao_mlp.why_not, _torchao_mlp.is_fused, _torchao_mlp.gemm),
    ),
}

_FUSE: Mapping[str, Callable[[Any, str, bool], str]] = {
    "gated_delta_net": _gated_delta_net.fuse,
    "fp8_mlp": _fp8_mlp.fuse,
    "fp8_experts": _fp8_experts.fuse,
    "torchao_mlp": _torchao_mlp.fuse,
}


def fuse(kind: str, module: Any, name: str, graphs: Mapping[str, Any] | bool | None, by_request: bool) -> str:
    """Put a forward of ours into a part, or say why not."""
    if kind == "vision":
        return _graphs.fuse(module, graphs, name, by_request)
    return _FUSE[kind](module, name, by_request)


def find(model: nn.Module) -> list[tuple[str, str, Any]]:
    """Every part of a model: its kind, its name in the model, and the module itself."""
    return [(kind, name, module) for kind in KINDS for name, module in KINDS[kind].find(model).items()]
