"""`Subject`: a model under measurement, and what vision and text models have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from polyfuse.bench.timing import Clock
from polyfuse.integrations.transformers import accelerate, restore
from polyfuse.runtime.encoder.capture import graph_runtime


@dataclass(frozen=True)
class Architecture:
    """A model class of Transformers, with the settings of its configuration that are not the defaults.

    `real` are those of a released model, whose name is in `sizes` if results are to give it; `tiny` are those of one
    that tests run on a CPU.
    """

    class_name: str
    tiny: Mapping[str, Any]
    real: Mapping[str, Any] = field(default_factory=dict)
    sizes: str = ""


class Subject:
    """A model with seeded random weights on one device, that is accelerated and restored again.

    `name` is that of the model's module in Transformers. `settings` are further ones of its configuration. Weights are
    bfloat16 on an accelerator and float32 on a CPU; `captures` is whether the device has graphs, and `kinds` are those
    of the parts that are accelerated, None for those by default.
    """

    def __init__(
        self, name: str, device: str, tiny: bool, architecture: Architecture, settings: Mapping[str, Any]
    ) -> None:
        self.name, self.device, self.tiny = name, device, tiny
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.kinds: list[str] | None = None
        self.clock = Clock(device)
        self.captures = graph_runtime(torch.device(device)).captures
        self.sizes = "tiny" if tiny else architecture.sizes
        model_class = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), architecture.class_name)
        sizes = architecture.tiny if tiny else architecture.real
        self.config: Any = model_class.config_class(**{**sizes, **settings})
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Any = model_class._from_config(self.config, dtype=self.dtype).eval()

    @property
    def dtype_name(self) -> str:
        """The weights' dtype, without the name of the framework."""
        return str(self.dtype).removeprefix("torch.")

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """The model `untouched` or `accelerated`, then untouched again."""
        if name == "accelerated":
            accelerate(self.model, parts=self.kinds)
        try:
            yield
        finally:
            if name == "accelerated":
                restore(self.model)

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the model's dtype, the same for the same shape."""
        generator = torch.Generator(self.device).manual_seed(1)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
