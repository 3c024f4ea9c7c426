"""The experts of Transformers' FP8 models: quantised once, and multiplied by block-scaled GEMMs.

Transformers dispatches experts by a name in the model's config. `accelerate` leaves that config alone, which models
share and pickles hold, and puts `forward` into the module, as with the other parts. The same path is registered under
`NAME`, for who wants to choose it by `model.set_experts_implementation("polyfuse")`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn

from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._formula import SILU, formula
from polyfuse.integrations.transformers._plain import odd_weights, oddity
from polyfuse.runtime.quantized.activation import block_quantized, silu_mul_block_quantized
from polyfuse.runtime.quantized.experts import (
    block_scaled_mm_by_expert,
    experts_gemm_for,
    reads_ends,
    route,
    sums_of_experts,
)
from polyfuse.runtime.quantized.gemm import BLOCK

NAME = "polyfuse"
MODULE = "transformers.integrations.finegrained_fp8"
FP8_EXPERTS = f"{MODULE}.FP8Experts"
# Transformers' ways to compute the same: of others, such as DeepGEMM's, a user has chosen the kernel.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", NAME)
BY_NUMBER = (None, "eager")  # of them, those that sum up a token's results in the order of its experts' numbers
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")

_HALVES = tuple(f"getitem(chunk(x, 2, dim=-1), {half})" for half in range(2))
GATES = (f"mul(silu({_HALVES[0]}), {_HALVES[1]})", f"mul({_HALVES[1]}, silu({_HALVES[0]}))")
_known_gates: dict[CodeType, bool] = {}  # by the code of a gate function, whether it computes one of `GATES`


def fp8_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Every FP8Experts in a model, itself included, that `fuse` fits or has already patched, by its name in the model.

    Its weights are float8_e4m3fn in blocks of 128 x 128 with float32 scales, its activation scales are dynamic, it has
    no bias, and a trace of its gate gives SiLU of one half times the other.
    """
    return {name: module for name, module in model.named_modules() if is_fused(module) or _fits(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether a module's calls come here, by `accelerate` or by the name in its config."""
    return _is_experts(module) and (_patch.is_installed(module) or _implementation(module) == NAME)


def fuse(module: nn.Module, name: str, by_request: bool) -> str:
    """Put `forward` in the place of the experts' own, or say why not."""
    device = next(module.parameters()).device
    if not by_request and reads_ends(device, torch.bfloat16):
        return f"products are {gemm(module)} on {device.type}: parts has to name it"
    _patch.install(module, MethodType(forward, module), name, by_request)
    return ""


def gemm(module: nn.Module) -> str:
    """What multiplies the experts' rows by their weights on the device where these are."""
    return experts_gemm_for(next(module.parameters()).device, torch.bfloat16) or "none on this device"


@_patch.stand_in
def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of experts with FP8 weights: one quantisation before each of their two products.

    - A token is quantised once, however many experts take it.
    - SiLU, product and quantisation are one kernel, over the rows that experts own, that rounds where separate ones do.
    - Both products are block-scaled GEMMs: one launch each where Triton runs, which a graph can hold, and else one
      expert after the other, for which the host reads how many rows each has.
    - Routing weights multiply in the model's dtype, and a token's results are summed up in float32, in the order of the
      config's implementation: by its experts' numbers as in the loop over experts, else by their ranks.

    In a call that records gradients, trains, is compiled, or is captured where the host has to read, the class's own
    `forward` runs, as it does for experts that are not as `fp8_experts` says any more.
    """
    return _run(module, args, kwargs, type(module).forward)


def experts_function(module: Any, *args: Any, **kwargs: Any) -> Any:
    """`forward` as Transformers calls it by name. What it does not cover runs as `grouped_mm`, the default there."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    grouped = ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"]
    if _patch.is_installed(module):  # whose `forward` has refused the call already
        return grouped(module, *args, **kwargs)
    return _run(module, args, kwargs, grouped)


def register() -> None:
    """Make `NAME` one of the experts implementations that Transformers knows for FP8 models."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, experts_function)


def why_not(module: nn.Module) -> str:
    """What of the experts themselves, as they are now, keeps them from the fused path; "" for nothing."""
    if not _is_own_class(type(module)):
        return f"they are of another class, {type(module).__name__}"
    if not _patch.own_class_forward(type(module)):
        return "their class has another forward"
    return odd_weights(module) or _odd_dispatch(module) or _odd_gate(module) or _odd_sizes(module)


def _run(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any], otherwise: Callable[..., Any]) -> Any:
    call = dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs)
    if len(args) + len(kwargs) != len(ARGUMENTS) or set(call) != set(ARGUMENTS):
        reason = f"it has other arguments than {', '.join(ARGUMENTS)}"
    else:
        reason = _why_not(module, *(call[name] for name in ARGUMENTS))
    _patch.count(module, reason)
    return otherwise(module, *args, **kwargs) if reason else _fused(module, *(call[name] for name in ARGUMENTS))


def _why_not(module: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> str:
    """Why a call runs the experts' own forward; "" if the fused path covers it."""
    if torch.compiler.is_compiling():
        return "it is compiled"
    if found := _patch.not_inference(module, x.device):
        return found
    if not experts_gemm_for(x.device, x.dtype):
        return f"no block-scaled GEMM for {x.dtype} on {x.device.type}"
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing() and reads_ends(x.device, x.dtype):
        return "it is captured in a graph, and the host has to know the rows of each expert"
    if any(type(tensor) is not torch.Tensor for tensor in (x, chosen, weights)):  # fake and sharded ones, say
        return "it has tensors of other classes than torch.Tensor"
    if x.ndim != 2 or chosen.ndim != 2 or chosen.shape != weights.shape or len(chosen) != len(x):
        return "it is not of tokens [T, hidden] with experts and weights [T, k]"
    if not chosen.numel():
        return "there are no tokens"
    return why_not(module)


def _fused(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts' result for tokens x [T, hidden], in its dtype."""
    routing = route(chosen, module.num_experts)
    tokens = block_quantized(x, scale_min=0.0)
    first = block_scaled_mm_by_expert(
        tokens, module.gate_up_proj, module.gate_up_proj_scale_inv, routing.ends, x.dtype, tokens=routing.tokens
    )
    rows = silu_mul_block_quantized(first, expert_ends=routing.ends, scale_min=0.0, materialize=True)
    second = block_scaled_mm_by_expert(rows, module.down_proj, module.down_proj_scale_inv, routing.ends, x.dtype)
    return sums_of_experts(second, weights, routing, by_number=_implementation(module) in BY_NUMBER)


def _fits(module: nn.Module) -> bool:
    """Whether a module is experts that `forward` can stand in for, as `fp8_experts` says."""
    return _is_experts(module) and not why_not(module) and _patch.own_forward(module, within_hooks=True)


class _Gate(nn.Module):
    """The gate of experts as a module of its own, to trace it."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> Any:
        return self.experts._apply_gate(x)


def _is_experts(module: nn.Module) -> bool:
    """Whether a module is FP8Experts, or of a class made from it: parametrised ones, say, which are then refused."""
    return any(map(_is_own_class, type(module).__mro__))


def _is_own_class(cls: type) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" == FP8_EXPERTS


def _implementation(module: Any) -> Any:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _odd_dispatch(module: Any) -> str:
    """Says that a model computes its experts in a way that is not one of Transformers' plain ones."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    name = _implementation(module)
    if name not in IMPLEMENTATIONS:
        return f"the config asks for the experts implementation {name}"
    function = ALL_FP8_EXPERTS_FUNCTIONS.get(name)
    if function is not None and not function.__module__.startswith(("transformers.", "polyfuse.")):
        return f"somebody has registered another experts implementation {name}"
    return "they have another linear" if "linear" in vars(module) else ""


def _odd_gate(module: Any) -> str:
    """Says that a gate is not SiLU of one half times the other.

    Its function is traced once, with all of the settings that it reads at None: any other value may be another gate.
    """
    gate = type(module)._apply_gate
    if "_apply_gate" in vars(module) or gate.__module__ != MODULE:
        return "they have another gate"
    for name in gate.__code__.co_names:
        if vars(module).get(name) is not None:
            return f"their gate has {name}={vars(module)[name]}"
    if found := oddity(module.act_fn):
        return f"act_fn {found}"
    if type(module.act_fn).__name__ not in SILU:
        return f"their activation is {type(module.act_fn).__name__}"
    if gate.__code__ not in _known_gates:
        _known_gates[gate.__code__] = formula(_Gate(module)) in GATES
    return "" if _known_gates[gate.__code__] else "their gate is not SiLU of one half times the other"


def _odd_sizes(module: Any) -> str:
    """Says that weights or scales are not what `block_scaled_mm` takes."""
    if not module.has_gate or module.has_bias or module.activation_scheme != "dynamic":
        return "they have no gate, a bias or static activation scales"
    if module.block_size is None or tuple(module.block_size) != (BLOCK, BLOCK):
        return f"their blocks are {module.block_size}"
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        if weight.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
            return f"{name} is {weight.dtype} with scales of {scale.dtype}"
        experts, *sizes = weight.shape
        blocks = (experts, *(size // BLOCK for size in sizes))
        if experts != module.num_experts or any(size % BLOCK for size in sizes) or tuple(scale.shape) != blocks:
            return f"{name} has shape {list(weight.shape)} with scales {list(scale.shape)}"
        if getattr(module, f"{name}_bias", None) is not None:
            return f"{name} has a bias"
    return ""


register()
