"""Whether modules are what their classes say and no more, so that what they compute may be computed elsewhere."""

import inspect
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from polyfuse.integrations.transformers._patch import own_class_forward, own_forward

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# Where the classes and functions come from whose results follow from their arguments and weights alone.
_CLASSES = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "transformers.modeling_layers")
_MODELESS = (nn.ModuleList, nn.Sequential, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.GELU, nn.SiLU)
_RECORDER = "transformers.utils.output_capturing"
_FUNCTIONS = ("torch.", "transformers.")


def oddity(module: Any, kind: type[nn.Module] | None = None) -> str:
    """What makes a call of the module more than its class's forward over its own weights; "" for a plain module.

    With `kind` its class must be just that: adapters, quantised, parametrised and sharded layers have others.
    """
    return odd_call(module, kind) or odd_weights(module)


def odd_call(module: Any, kind: type[nn.Module] | None = None) -> str:
    """`oddity` whatever the weights are."""
    if kind is not None and type(module) is not kind:
        return f"is a {class_name(type(module))}"
    if _hooks(module):
        return "has hooks"
    return "" if own_forward(module) else "has another forward"


def odd_weights(module: nn.Module) -> str:
    """What makes the module's own weights more than parameters of its own that are loaded; "" for plain ones."""
    for weight in module._parameters.values():
        if weight is not None and type(weight) is not nn.Parameter:
            return f"has a weight that is a {class_name(type(weight))}"
        if weight is not None and weight.is_meta:
            return "has weights that are not loaded"
    return ""


def model_oddity(model: nn.Module, bypassed: Mapping[str, str]) -> str:
    """What keeps a model from being computed by other code than its own, with the module's name; "" for nothing.

    `bypassed` maps patterns of module names to the end of their class's name: their calls are computed elsewhere. All
    other modules are called, in a graph for once, and must be known to do the same in every call.
    """
    if _has_any_global_hook():
        return "there are global module hooks"
    for name, module in model.named_modules():
        own = oddity(module) if name else ""  # hooks of the model itself run around its forward
        if found := own or _unknown(module, _wanted(name, bypassed)):
            return f"{name or type(model).__name__} {found}"
    return ""


def _hooks(module: nn.Module) -> bool:
    """Whether a module has hooks. Those that Transformers leaves behind do nothing while no outputs are collected."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != _RECORDER for hook in hooks)


def _wanted(name: str, bypassed: Mapping[str, str]) -> str:
    """The end of the class name that a module of this name must have; "" for any."""
    return next((wanted for pattern, wanted in bypassed.items() if _matches(name, pattern)), "")


def _matches(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)


def _unknown(module: nn.Module, wanted: str) -> str:
    """What is unknown of a module in a model: its class, its mode, its attention, or functions that it calls."""
    cls = type(module)
    if not cls.__module__.startswith(_CLASSES) or not cls.__name__.endswith(wanted):
        return f"is a {class_name(cls)}"
    if not own_class_forward(cls):
        return "has another forward"
    if module.training and cls not in _MODELESS:
        return "is in training mode"
    if any(type(buffer) is not torch.Tensor for buffer in module._buffers.values() if buffer is not None):
        return "has a buffer of another class than Tensor"
    if getattr(module, "max_norm", None) is not None:
        return "normalises its weight in its calls"
    config: Any = getattr(module, "config", None)
    if config is not None and (found := _attention_oddity(config)):
        return found
    return _foreign_function(cls)


def _attention_oddity(config: Any) -> str:
    """Names an attention function that is not one of Transformers' own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None)
    if name is None:
        return ""
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if name not in ATTENTION or (function is not None and not function.__module__.startswith(_FUNCTIONS)):
        return f"has an attention of its own: {name}"
    return ""


def _foreign_function(cls: type[nn.Module]) -> str:
    """Names a function that the class's forward calls by a global name and that somebody else has put there."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    names = vars(sys.modules[cls.__module__])
    for name in code.co_names if code else ():
        if isinstance(found := names.get(name), FunctionType) and not found.__module__.startswith(_FUNCTIONS):
            return f"calls a replaced {name}"
    return ""


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
