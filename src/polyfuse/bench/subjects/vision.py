"""Vision models, and the arguments of their calls: what `bench encoder` and `soak encoder` run."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyfuse.bench.subjects.base import Architecture, Subject
from polyfuse.integrations.transformers import make_encoder
from polyfuse.runtime.encoder.forward import exact_forward
from polyfuse.runtime.encoder.protocol import GraphableEncoder

Request = Sequence[Sequence[int]]  # grids: frames, patch rows and patch columns of each item

_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
_TINY = {"hidden_size": 64, "intermediate_size": 128}
_TINY_TOWER = _TINY | {"num_heads": 4, "out_hidden_size": 64}
_TINY_VIT = _TINY | {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
MODELS: Mapping[str, Architecture] = {
    "qwen3_vl": Architecture("Qwen3VLVisionModel", _TINY_TOWER),
    "qwen3_5": Architecture("Qwen3_5VisionModel", _TINY_TOWER),
    "qwen2_5_vl": Architecture("Qwen2_5_VisionTransformerPretrainedModel", _TINY_TOWER, {"hidden_size": 1280}),
    "siglip": Architecture("SiglipVisionModel", _TINY_VIT, _SO400M | {"image_size": 384, "patch_size": 14}),
}


class VisionModel(Subject):
    """A vision model, its adapters, and the arguments of its calls.

    `name` is one of `MODELS`, `depth` its number of layers (default: the real number, 2 if `tiny`). A `fixed` model has
    one resolution: every item is an image, whatever its grid.
    """

    def __init__(self, name: str, device: str, tiny: bool = False, depth: int | None = None) -> None:
        self.fixed = name == "siglip"
        if tiny:
            depth = depth or 2
        super().__init__(name, device, tiny, MODELS[name], self._of_depth(name, depth) if depth else {})
        self.depth: int = self.config.num_hidden_layers if self.fixed else self.config.depth
        self.patch_size: int = self.config.patch_size
        self.merge: int = getattr(self.config, "spatial_merge_size", 1)
        self._pixels = torch.empty(0)

    def _of_depth(self, name: str, depth: int) -> dict[str, Any]:
        """The settings of a model of this many layers."""
        special = {"qwen3_vl": {"deepstack_visual_indexes": [0]}, "qwen2_5_vl": {"fullatt_block_indexes": [depth - 1]}}
        return {"num_hidden_layers" if self.fixed else "depth": depth} | special.get(name, {})

    def encoder(self, compiled: bool | None = None) -> GraphableEncoder:
        """A new adapter; its blocks are compiled where graphs are captured, unless told otherwise."""
        return make_encoder(self.model, self.captures if compiled is None else compiled)

    def rows(self, request: Request) -> int:
        """Rows of pixels of a request: patches, or images."""
        return len(request) if self.fixed else sum(t * h * w for t, h, w in request)

    def tokens(self, request: Request) -> int:
        """Output tokens of a request."""
        if self.fixed:
            return len(request) * (self.config.image_size // self.patch_size) ** 2
        return self.rows(request) // self.merge**2

    def reserve(self, rows: int) -> None:
        """Make that many rows of random pixels, on the device."""
        (shape,) = (spec.shape for spec in self.encoder(False).inputs.values() if spec.dtype.is_floating_point)
        self._pixels = self.random(rows, *shape)

    def arguments(self, request: Request, start: int = 0) -> tuple[torch.Tensor, ...]:
        """The arguments of a call for a request.

        They are the reserved pixels from row `start` on and, unless the model is `fixed`, the grid on the host.
        """
        pixels = self._pixels[start : start + self.rows(request)]
        return (pixels,) if self.fixed else (pixels, torch.tensor(request))

    def untouched(self, *arguments: torch.Tensor) -> Any:
        """What the model itself returns for a call's arguments."""
        with torch.inference_mode():
            return self.model(*(tensor.to(self.device) for tensor in arguments))


def uncaptured(encoder: GraphableEncoder, *arguments: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The outputs for a call's arguments, uncaptured and in buffers of exactly its size."""
    return exact_forward(encoder, encoder.request(*arguments))
