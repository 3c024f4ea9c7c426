"""What a graph took for granted when a model was captured, and whether it still holds: `Watch`."""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_PLAIN = (nn.Parameter, torch.Tensor)
_INTERNAL = vars(nn.Module()).keys()  # PyTorch's own dicts, which are compared by what is in them or not at all


class Watch:
    """The modules of a model, their hooks, attributes and weights, as they are when this is made or renewed.

    It keeps the storages of all parameters and buffers alive, so that a graph that reads them never reads freed memory,
    and no other tensor can turn up at one of their addresses.

    `oddity` says what keeps an encoder from computing what the model itself would, "" for nothing; it is asked when the
    watch is made and renewed, and its answer kept under the same name.
    """

    def __init__(self, model: nn.Module, oddity: Callable[[], str] = str) -> None:
        self._model, self._ask = model, oddity
        self.renew()

    def renew(self) -> None:
        """Take the model as it is now."""
        self.oddity: str = self._ask()
        self._modules = list(self._model.modules())
        self._classes = list(map(type, self._modules))
        hooks = [every for m in self._modules for every in (m._forward_hooks, m._forward_pre_hooks)]
        hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        children = [module._modules for module in self._modules]
        tensors = [held for m in self._modules for held in (m._parameters, m._buffers)]
        self._empty = [held for held in (*hooks, *children, *tensors) if not held]
        self._hooks = [(held, list(held.values())) for held in hooks if held]
        self._parents = [held for held in children if held]
        self._holders = [held for held in tensors if held]
        self._children = list(_values(self._parents))
        self._tensors = list(_values(self._holders))
        self._places = list(map(_place, self._tensors))
        self._storages = [t.untyped_storage() for t in self._tensors if type(t) in _PLAIN]
        configs = {id(config): config for m in self._modules if hasattr(config := vars(m).get("config"), "__dict__")}
        self._attributes = [(vars(x), _copied(vars(x))) for x in (*self._modules, *configs.values())]

    def structure(self) -> str:
        """What has changed of modules, their classes and hooks; "" for nothing. Takes microseconds."""
        if any(self._empty) or any(list(held.values()) != before for held, before in self._hooks):
            return "hooks, modules or weights were added, or hooks removed"
        if list(_values(self._parents)) != self._children or list(map(type, self._modules)) != self._classes:
            return "modules were replaced"
        return ""

    def contents(self) -> str:
        """What has changed of weights and attributes; "" for nothing. Takes 0.1 to 0.3 ms for hundreds of modules."""
        if list(map(_place, _values(self._holders))) != self._places:
            return "weights were moved or replaced"
        if not all(_same(now, before) for now, before in self._attributes):
            return "settings were changed"
        return ""


def _values(held: list[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, held))


def _place(tensor: torch.Tensor | None) -> Any:
    """Where a tensor's values are and how they are read. Of other classes of tensors only the object is known."""
    if type(tensor) not in _PLAIN or tensor is None:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as they are, but lists, dicts and sets as copies, as they change in place."""
    return {
        name: value.copy() if isinstance(value, (list, dict, set)) and name not in _INTERNAL else value
        for name, value in attributes.items()
    }


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    try:
        return now == before
    except Exception:  # values that cannot be compared: tensors and arrays, and not the same objects
        return False
