"""How a forward of ours is put into a module and taken out again, whoever else patches that module, and what it counts.

A module's `forward` is replaced on the instance. Accelerate's hooks do the same and keep what they found as
`_old_forward`; where they came first, ours takes that place, so that it runs inside of them. Whoever wraps ours later
keeps a reference that cannot be taken back: there ours is switched off, and hands every call on.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from polyfuse.dispatch._select import log as log  # at the level of POLYFUSE_LOG

Forward = TypeVar("Forward", bound=Callable[..., Any])

_OFF = "polyfuse_off"  # an attribute of a module whose wrapped forward of ours is to do nothing
_REPLICATE = "_replicate_for_data_parallel"


@dataclass
class Calls:
    """What became of a patched module's calls: how many ran fused, and how many as before, by reason."""

    name: str
    by_request: bool = False  # the user named this kind of part
    forward: Any = None  # what was put in place of the module's own, as `stand_in` marked it
    fused: int = 0
    unfused: Counter[str] = field(default_factory=Counter)


_functions: list[Callable[..., Any]] = []
_calls: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def stand_in(function: Forward) -> Forward:
    """Mark a function, or the class of a callable, as a forward of ours."""
    _functions.append(function)
    return function


def is_ours(forward: object) -> bool:
    """Whether something found in the place of a `forward` is one that `stand_in` marked."""
    return any(_marked(forward) is function for function in _functions)


def own_forward(module: nn.Module, within_hooks: bool = False) -> bool:
    """Whether nobody has replaced a module's forward, on the instance or on its class. Ours does not count.

    Of Accelerate's hooks only those count that do something: that move weights, or inputs to another device. With
    `within_hooks` none does, only what they call.
    """
    placed = vars(module).get(_slot(module) if within_hooks or _has_idle_hook(module) else "forward")
    # Removing Accelerate's hooks leaves the class's forward behind, bound, on the instance.
    if placed is not None and not is_ours(placed) and getattr(placed, "__func__", None) is not type(module).forward:
        return False
    return own_class_forward(type(module))


def own_class_forward(cls: type[nn.Module]) -> bool:
    """Whether nobody has replaced the forward of a class, or of the base that it has it from."""
    definer = next(base for base in cls.__mro__ if "forward" in vars(base))
    return bool(vars(definer)["forward"].__module__ == definer.__module__)


def is_installed(module: nn.Module, forward: object = None) -> bool:
    """Whether a forward of ours takes the module's calls, itself or inside of somebody's wrapper.

    With `forward` it must be this one.
    """
    if is_off(module):
        return False
    for placed in (vars(module).get("forward"), vars(module).get("_old_forward")):
        if is_ours(placed):
            return forward in (None, _marked(placed))
    known = _calls.get(module)
    if known is None or own_forward(module, within_hooks=True):
        return False
    return forward in (None, known.forward)


def is_off(module: nn.Module) -> bool:
    """Whether a forward of ours that somebody has wrapped is to hand on every call."""
    return getattr(module, _OFF, False) is True


def refuse(module: nn.Module, why: str) -> None:
    """Keep the reason why a module has not been patched."""
    _refused[module] = why


def refusal(module: nn.Module) -> str:
    """Why a module was not patched when that was last asked for; "" if it was, or never was asked for."""
    return _refused.get(module, "")


def not_inference(module: nn.Module, device: torch.device) -> str:
    """Why a call of a patched module is no plain inference on the device; "" if it is."""
    if is_off(module):
        return "restored"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if module.training:
        return "the module is in training mode"
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return ""


def install(module: nn.Module, forward: Callable[..., Any], name: str, by_request: bool) -> None:
    """Put a forward of ours in the place of the module's own."""
    vars(module).pop(_OFF, None)
    setattr(module, _slot(module), forward)
    # A replica shares the instance's attributes, and ours would run it on the original's weights.
    setattr(module, _REPLICATE, MethodType(_replicate_for_data_parallel, module))
    _calls[module] = Calls(name, by_request, _marked(forward))
    _refused.pop(module, None)


def remove(module: nn.Module) -> None:
    """Undo `install`."""
    if is_ours(vars(module).get("forward")):
        del module.forward
    elif is_ours(vars(module).get("_old_forward")):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
    else:
        setattr(module, _OFF, True)
    vars(module).pop(_REPLICATE, None)
    _calls.pop(module, None)


def calls(module: nn.Module) -> Calls:
    """The counts of a module so far; those of a copy, and of one that was patched without `install`, begin at 0."""
    return _calls.get(module) or Calls(type(module).__name__)


def count(module: nn.Module, reason: str) -> None:
    """Count a call: a fused one if there is no reason against it. Nothing is counted under torch.compile."""
    if torch.compiler.is_compiling():
        return
    found = _calls.get(module)
    if found is None:
        found = _calls[module] = Calls(type(module).__name__)
    if not reason:
        if not found.fused:
            log.debug("%s: first fused call", found.name)
        found.fused += 1
        return
    if not found.fused and not found.unfused:
        level = logging.WARNING if found.by_request else logging.INFO
        log.log(level, "%s: not fused: %s", found.name, reason)
    found.unfused[reason] += 1


def _has_idle_hook(module: nn.Module) -> bool:
    """Whether Accelerate's hook only sees to it that inputs are on the device where the module's weights are."""
    hook: Any = vars(module).get("_hf_hook")
    if f"{type(hook).__module__}.{type(hook).__name__}" != "accelerate.hooks.AlignDevicesHook" or hook.offload:
        return False
    place = hook.execution_device
    if place is None:
        return True
    device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return all(weight.device == device for weight in module.parameters())


def _marked(forward: object) -> object:
    """What `stand_in` would have marked of a forward: a method's function, or the class of a callable."""
    return getattr(forward, "__func__", type(forward))


def _slot(module: nn.Module) -> str:
    return "_old_forward" if {"_hf_hook", "_old_forward"} <= vars(module).keys() else "forward"


def _replicate_for_data_parallel(module: Any) -> nn.Module:
    """A module's replica for nn.DataParallel, with its class's own forward. A pickle finds it by this name."""
    replica: nn.Module = getattr(type(module), _REPLICATE)(module)
    remove(replica)
    return replica
