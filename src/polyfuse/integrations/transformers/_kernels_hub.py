"""The layers that polyfuse accelerates, for the `kernelize` of Hugging Face's `kernels` package: local, no hub."""

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from polyfuse.integrations.transformers._gated_delta_net import forward

# Under these names Transformers asks for a kernel; it has none for Qwen3-Next, whose class is the name here.
_LAYERS = ("Qwen3_5GatedDeltaNet", "Qwen3NextGatedDeltaNet")
_DEVICES = ("cpu", "cuda", "mps", "rocm", "xpu")


class GatedDeltaNet(nn.Module):
    """What `kernelize` takes a Gated DeltaNet layer's `forward` from; it has no state of its own."""

    can_torch_compile = True

    forward = forward


@dataclass(frozen=True)
class LocalRepository:
    """A repository, as `kernels` wants one, that holds a single layer of this package."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """Give the class whose `forward` serves the layer."""
        return GatedDeltaNet


def kernel_mapping() -> dict[str, dict[str, dict[Any, LocalRepository]]]:
    """The mapping for `kernels.use_kernel_mapping`: from layer name to device, mode and repository.

    It serves inference, compiled or not. Layers of Qwen3.5, dense and MoE, take it as they are. Those of Qwen3-Next
    have to be given their name first, with `kernels.replace_kernel_forward_from_hub(Qwen3NextGatedDeltaNet,
    "Qwen3NextGatedDeltaNet")`. Raises `ImportError` without the `kernels` package.
    """
    if "kernels" not in sys.modules and find_spec("kernels") is None:
        raise ModuleNotFoundError("kernel_mapping: kernels is not installed: pip install kernels", name="kernels")
    mode = import_module("kernels").Mode
    repositories = {name: {mode.INFERENCE | mode.TORCH_COMPILE: LocalRepository(name)} for name in _LAYERS}
    return {name: dict.fromkeys(_DEVICES, repository) for name, repository in repositories.items()}
