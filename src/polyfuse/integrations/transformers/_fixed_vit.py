"""The vision models of SigLIP and CLIP, whose images all have one size, as a `GraphableEncoder`."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from polyfuse.integrations.transformers._packed import check_pixels, compiled
from polyfuse.integrations.transformers._plain import model_oddity
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, ItemSize, Rows
from polyfuse.spec import fail


class FixedResolutionEncoder:
    """A Transformers `SiglipVisionModel` or `CLIPVisionModel`, which it uses and does not change.

    An item is an image of the config's size, its tokens the rows of its `last_hidden_state`. Buffers count in images.
    With `compile_blocks` the layers are compiled by Inductor: once for one image, once for any larger number.
    """

    # Whose calls `forward` computes itself: names of modules, and how their classes' names must end.
    bypassed: ClassVar[Mapping[str, str]] = {
        "embeddings": "VisionEmbeddings",
        "embeddings.patch_embedding": "Conv2d",
        "encoder": "Encoder",
        "encoder.layers": "ModuleList",
        "encoder.layers.*": "EncoderLayer",
    }

    def __init__(self, model: Any, compile_blocks: bool = False) -> None:
        self.model = model
        self.name = type(model).__name__
        self.token_multiple: int = model.embeddings.num_positions
        self._layer: Callable[..., torch.Tensor] = _layer
        if compile_blocks:
            self._layer = compiled(_layer)

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def inputs(self) -> Mapping[str, BufferSpec]:
        return {"pixel_values": BufferSpec(Rows(per_item=1), self._image, self._weight.dtype)}

    @property
    def outputs(self) -> Mapping[str, BufferSpec]:
        width, dtype = self.model.config.hidden_size, self._weight.dtype
        hidden = BufferSpec(Rows(per_item=1), (self.token_multiple, width), dtype)
        pooled = BufferSpec(Rows(per_item=1), (width,), dtype)
        # Of the two only SigLIP's head can be absent.
        if not getattr(self.model, "use_head", True):
            return {"last_hidden_state": hidden}
        return {"last_hidden_state": hidden, "pooler_output": pooled}

    @property
    def _weight(self) -> torch.Tensor:
        """The kernel of the patch embedding, whose dtype and device are the model's."""
        return self.model.embeddings.patch_embedding.weight

    @property
    def _image(self) -> tuple[int, int, int]:
        """Channels, rows and columns of every image."""
        side = self.model.config.image_size
        return self.model.config.num_channels, side, side

    def oddity(self) -> str:
        """What keeps `forward` from computing what the model itself would, as it is now; "" for nothing."""
        return model_oddity(self.model, self.bypassed)

    def request(self, pixel_values: Any) -> EncoderRequest:
        """Check `pixel_values` `[images, channels, side, side]`, floating point; any such dtype is converted.

        They may be on the host, and then only what is computed is moved.

        Raises `SpecError` for another shape, device or dtype, and for no images.
        """
        image = list(self._image)
        if not isinstance(pixel_values, torch.Tensor) or list(pixel_values.shape[1:]) != image:
            got = list(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            fail(self.name, "pixel_values", f"a tensor [images, {', '.join(map(str, image))}]", got)
        if not len(pixel_values):
            fail(self.name, "pixel_values", "at least one image", "none")
        check_pixels(self.name, "pixel_values", pixel_values, self.device)
        return self._request(pixel_values)

    def example(self, tokens: int) -> EncoderRequest:
        """Images of zeros."""
        images = tokens // self.token_multiple
        return self._request(torch.zeros(images, *self._image, dtype=self._weight.dtype, device=self.device))

    def _request(self, images: torch.Tensor) -> EncoderRequest:
        """Describe images that are known to be right."""
        return EncoderRequest((ItemSize(self.token_multiple),) * len(images), {"pixel_values": images})

    def forward(self, inputs: Mapping[str, torch.Tensor], capacity: Capacity) -> Mapping[str, torch.Tensor]:
        """The model's outputs for each image of the buffer, as the model computes them."""
        model = self.model
        # SigLIP embeds into transposed memory, and every compiled layer would go on with it, slower.
        hidden = model.embeddings(inputs["pixel_values"]).contiguous()
        has_class_token = hasattr(model, "pre_layrnorm")  # CLIP, in Transformers' spelling
        if has_class_token:
            hidden = model.pre_layrnorm(hidden)
        for layer in model.encoder.layers:
            hidden = self._layer(layer, hidden)
        if has_class_token:
            return {"last_hidden_state": hidden, "pooler_output": model.post_layernorm(hidden[:, 0])}
        hidden = model.post_layernorm(hidden)
        if not model.use_head:
            return {"last_hidden_state": hidden}
        return {"last_hidden_state": hidden, "pooler_output": model.head(hidden)}

    def result(self, outputs: Mapping[str, Any], request: EncoderRequest) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(**outputs)


def _layer(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return layer(hidden, None)
