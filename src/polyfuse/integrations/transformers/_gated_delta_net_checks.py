"""Whether the ops cover a Gated DeltaNet layer and a call of it, as they are now."""

import inspect
import sys
from functools import lru_cache
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._plain import oddity
from polyfuse.spec import FLOATS

# By class name, so that no model's code is imported that is not used.
LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
NORMS = ("Qwen3NextRMSNormGated", "Qwen3_5RMSNormGated", "Qwen3_5MoeRMSNormGated")

# What Transformers 5.17 and 5.24 call a layer with, beside hidden states, cache and attention mask. Another version may
# mean something else by another name.
KEYWORDS = {
    *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position"),
    *("is_causal", "seq_idx"),
}
SIGNATURES = (
    ("self", "hidden_states", "cache_params", "attention_mask", "kwargs"),
    ("self", "hidden_states", "cache", "attention_mask", "kwargs"),  # since Transformers 5.24
)
# What a layer's own forward calls by name. The kernels package may have put a kernel into one of them: it computes the
# same. A function of somebody else may not.
FUNCTIONS = (
    *("causal_conv1d_fn", "causal_conv1d_update"),
    *("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
)


def known_class(module: nn.Module) -> type | None:
    """The class of a layer that the ops know: its own, or the one that FSDP made a subclass of. None for others."""
    cls = type(module)
    if cls.__module__.startswith("torch.distributed."):
        cls = next((base for base in cls.__mro__ if base.__name__ in LAYERS), cls)
    return cls if cls.__name__ in LAYERS else None


def is_interleaved(module: Any) -> bool:
    """Whether the columns of a layer's first projection are those of key heads, as Qwen3-Next has them."""
    return "in_proj_qkvz" in module._modules  # hasattr raises and catches an error, in every decode step


def projections(module: Any) -> list[Any]:
    """A layer's input projections."""
    names = ("qkvz", "ba") if is_interleaved(module) else ("qkv", "z", "b", "a")
    return [module._modules[f"in_proj_{name}"] for name in names]


def plain_norm(module: Any, activations: tuple[str, ...] = ("silu", "sigmoid")) -> bool:
    """Whether a layer's gated norm is Transformers' own with one of these gates, and nothing around it."""
    norm = module.norm
    if type(norm).__name__ not in NORMS or oddity(norm):
        return False
    return norm.activation in activations and norm.variance_epsilon > 0


def why_not(module: Any) -> str:
    """What of a layer itself, as it is now, keeps it from the ops; "" for nothing.

    It is looked at closely where it has changed since it was last found to be plain.
    """
    if torch.compiler.is_compiling():  # what is remembered of one layer would be guarded, and compile each anew
        return _why_not(module)
    looks = _looks(module)
    if looks is not None and _plain.get(module) == looks:
        return ""
    found = _why_not(module)
    if not found:
        _plain[module] = looks
    return found


def _looks(module: Any) -> tuple[Any, ...] | None:
    """All that `_why_not` looks at, as objects that are cheap to compare; None where there are hooks to look at."""
    children, parameters = module._modules, module._parameters
    names = vars(sys.modules[(known_class(module) or type(module)).__module__])
    looks = [type(module), type(module).forward, module.activation, module.conv_kernel_size]
    looks += [names.get(name) for name in FUNCTIONS]
    for name in _WEIGHTS:
        weight = parameters.get(name)
        looks += (type(weight), weight is None or weight.is_meta)
    for name in _CHILDREN:
        child = children.get(name)
        if child is None:
            looks.append(None)
            continue
        own, weights = vars(child), child._parameters
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "_hf_hook" in own or "_old_forward" in own:
            return None
        weight, bias = weights.get("weight"), weights.get("bias")
        looks += (
            type(child),
            type(child).forward,
            own.get("forward"),
            type(weight),
            type(bias),
            weight is None or weight.is_meta,
        )
    return tuple(looks)


_DTYPES = frozenset(getattr(torch, name) for name in FLOATS)
_WEIGHTS = "A_log", "dt_bias"
_CHILDREN = "conv1d", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"
_plain: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _why_not(module: Any) -> str:
    """What `why_not` says, from all parts of a layer."""
    cls = known_class(module)
    if cls is None or not _has_known_forward(cls.__module__, cls.__name__):
        return "its forward has another signature"
    if not _patch.own_class_forward(type(module)):
        return "its class has another forward"
    if module.activation not in ("silu", "swish") or not 2 <= module.conv_kernel_size <= 4:
        return "its conv is one that the op has not"
    if any(type(weight) is not nn.Parameter or weight.is_meta for weight in (module.A_log, module.dt_bias)):
        return "has weights that are not plain parameters"
    for child in (module.conv1d, *projections(module)):
        kind = nn.Conv1d if child is module.conv1d else nn.Linear
        if found := oddity(child, kind):
            return f"a {kind.__name__} of it {found}"
    if any(projection.bias is not None for projection in projections(module)):
        return "its projections have biases"
    names = vars(sys.modules[cls.__module__])
    for name in FUNCTIONS:
        if _is_foreign(names.get(name)):
            return f"calls a replaced {name}"
    return ""


def _is_foreign(function: Any) -> bool:
    """Whether something in the place of one of `FUNCTIONS` is neither Transformers' own nor put there by kernels."""
    if isinstance(function, FunctionType):
        return not function.__globals__["__name__"].startswith("transformers.")
    return function is not None and not type(function).__module__.startswith("kernels.")


def why_not_call(module: Any, hidden_states: torch.Tensor, cache: Any, kwargs: dict[str, Any]) -> str:
    """Why a call runs the layer's own forward; "" if the ops cover it."""
    if found := _patch.not_inference(module, hidden_states.device):
        return found
    if not kwargs.keys() <= KEYWORDS:
        return f"unknown keywords: {', '.join(sorted(kwargs.keys() - KEYWORDS))}"
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None:
        return "seq_idx without cu_seq_lens_q"
    if found := why_not(module):
        return found
    if cache is not None and _records_past(cache, module.layer_idx):
        return "the cache records its past"
    if hidden_states.dtype not in _DTYPES:
        return f"hidden states are {hidden_states.dtype}"
    return ""


def _records_past(cache: Any, layer_idx: int) -> bool:
    if hasattr(cache, "is_recording_past"):  # since Transformers 5.24
        return bool(cache.is_recording_past(layer_idx))
    return bool(cache.layers[layer_idx].record_past)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_known_forward(module: str, name: str) -> bool:
    """Whether a layer's class takes the arguments of `SIGNATURES`."""
    return _parameters(module, name) in SIGNATURES


@lru_cache
def _parameters(module: str, name: str) -> tuple[str, ...]:
    """The names of the parameters of a class's forward."""
    return tuple(inspect.signature(getattr(sys.modules[module], name).forward).parameters)
