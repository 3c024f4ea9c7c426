"""Vision models with random weights, and the arguments of their calls: what `bench encoder` and `soak encoder` run."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from polyfuse.integrations.transformers import make_encoder
from polyfuse.runtime.encoder.capture import graph_runtime
from polyfuse.runtime.encoder.forward import exact_forward
from polyfuse.runtime.encoder.protocol import GraphableEncoder

Request = Sequence[Sequence[int]]  # grids: frames, patch rows and patch columns of each item

_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_TINY = {"hidden_size": 64, "intermediate_size": 128}
_TINY_TOWER = _TINY | {"num_heads": 4, "out_hidden_size": 64}
_TINY_VIT = _TINY | {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
# Class, settings of the real model where they are not the defaults, and of a tiny one.
MODELS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": ("Qwen3VLVisionModel", {}, _TINY_TOWER),
    "qwen3_5": ("Qwen3_5VisionModel", {}, _TINY_TOWER),
    "qwen2_5_vl": ("Qwen2_5_VisionTransformerPretrainedModel", {"hidden_size": 1280}, _TINY_TOWER),
    "siglip": ("SiglipVisionModel", _SO400M | {"image_size": 384, "patch_size": 14}, _TINY_VIT),
}


class Subject:
    """A vision model with seeded random weights, its adapters, and the arguments of its calls.

    `name` is one of `MODELS`, `depth` its number of layers (default: the real number, 2 if `tiny`). bfloat16 on an
    accelerator, float32 on a CPU. A `fixed` model has one resolution: every item is an image, whatever its grid.
    """

    def __init__(self, name: str, device: str, tiny: bool = False, depth: int | None = None) -> None:
        class_name, real, small = MODELS[name]
        self.name, self.device, self.tiny, self.fixed = name, device, tiny, name == "siglip"
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.captures = graph_runtime(torch.device(device)).captures
        model_class = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), class_name)
        layers = self._layers(depth or 2) if depth or tiny else {}
        config = model_class.config_class(**(small if tiny else real) | layers)
        torch.manual_seed(0)
        self.model: Any = model_class._from_config(config, dtype=self.dtype).eval().to(device)
        self.depth: int = config.num_hidden_layers if self.fixed else config.depth
        self.patch_size: int = config.patch_size
        self.merge: int = getattr(config, "spatial_merge_size", 1)
        self._pixels = torch.empty(0)

    def _layers(self, depth: int) -> dict[str, Any]:
        special = {"qwen3_vl": {"deepstack_visual_indexes": [0]}, "qwen2_5_vl": {"fullatt_block_indexes": [depth - 1]}}
        return {"num_hidden_layers" if self.fixed else "depth": depth} | special.get(self.name, {})

    def encoder(self, compiled: bool | None = None) -> GraphableEncoder:
        """A new adapter; its blocks are compiled where graphs are captured, unless told otherwise."""
        return make_encoder(self.model, self.captures if compiled is None else compiled)

    def rows(self, request: Request) -> int:
        """Rows of pixels of a request: patches, or images."""
        return len(request) if self.fixed else sum(t * h * w for t, h, w in request)

    def tokens(self, request: Request) -> int:
        """Output tokens of a request."""
        if self.fixed:
            return len(request) * (self.model.config.image_size // self.patch_size) ** 2
        return self.rows(request) // self.merge**2

    def reserve(self, rows: int) -> None:
        """Make that many rows of random pixels, on the device."""
        (shape,) = (x.shape for x in self.encoder(False).inputs.values() if x.dtype.is_floating_point)
        generator = torch.Generator(self.device).manual_seed(1)
        self._pixels = torch.randn(rows, *shape, dtype=self.dtype, device=self.device, generator=generator)

    def arguments(self, request: Request, start: int = 0) -> tuple[torch.Tensor, ...]:
        """Of a call: the reserved pixels from row `start` on and, unless the model is `fixed`, the grid on the host."""
        pixels = self._pixels[start : start + self.rows(request)]
        return (pixels,) if self.fixed else (pixels, torch.tensor(request))

    def wait(self) -> None:
        """For the device."""
        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)


def uncaptured(encoder: GraphableEncoder, *arguments: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The outputs for a call, uncaptured and in buffers of exactly its size."""
    return exact_forward(encoder, encoder.request(*arguments))
