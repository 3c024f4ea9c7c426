"""A vision model's `forward` in graphs: what `accelerate` puts in its place, and which adapter fits which model."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from polyfuse.configs import encoder_config
from polyfuse.integrations.transformers._fixed_vit import FixedResolutionEncoder
from polyfuse.integrations.transformers._packed import PackedTower
from polyfuse.integrations.transformers._pos_embed import request_embeddings
from polyfuse.integrations.transformers._qwen2_5_vl import WindowedQwenEncoder
from polyfuse.integrations.transformers._qwen_vl import QwenVisionEncoder
from polyfuse.runtime.encoder.capture import graph_runtime
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import GraphableEncoder
from polyfuse.spec import FLOATS, dtype_name, fail

# By class name, so that no model's code is imported that is not used.
ENCODERS: Mapping[str, Callable[[Any, bool], GraphableEncoder]] = {
    "Qwen3VLVisionModel": QwenVisionEncoder,
    "Qwen3VLMoeVisionModel": QwenVisionEncoder,
    "Qwen3_5VisionModel": QwenVisionEncoder,
    "Qwen3_5MoeVisionModel": QwenVisionEncoder,
    "Qwen2_5_VisionTransformerPretrainedModel": WindowedQwenEncoder,
    "SiglipVisionModel": FixedResolutionEncoder,
    "CLIPVisionModel": FixedResolutionEncoder,
}

_making = threading.Lock()

INPUTS = ("hidden_states", "grid_thw", "pixel_values")


def make_encoder(model: nn.Module, compile_blocks: bool = False) -> GraphableEncoder:
    """The adapter of a Transformers vision model. Raises `SpecError` for a model that has none."""
    adapter = ENCODERS.get(type(model).__name__)
    if adapter is None:
        fail("make_encoder", "model", f"one of {', '.join(ENCODERS)}", type(model).__name__)
    return adapter(model, compile_blocks)


class AcceleratedForward:
    """Stands in for a vision model's `forward`: in graphs when it infers from plain arguments, else as before.

    `settings` are `EncoderConfig`'s; None uses graphs where the device has them, False nowhere. Copies and pickles of
    the model get a manager of their own, with nothing captured yet.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any] | bool | None) -> None:
        self.model, self.settings = model, settings
        self.existing: EncoderGraphManager | None = None  # once used
        self._weights: tuple[Any, ...] = ()  # where they were then

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self._is_plain(kwargs) and (manager := self.manager()):
            given = {name: value for name, value in kwargs.items() if name in INPUTS}
            return manager.execute(*args, **given)
        kwargs = request_embeddings(self.model, args, kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _is_plain(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the call wants nothing but the outputs that the adapters compute."""
        config: Any = self.model.config
        if torch.is_grad_enabled() or self.model.training or config.output_hidden_states or config.output_attentions:
            return False
        if kwargs.get("return_dict", config.return_dict) is False:
            return False
        extra = (value for name, value in kwargs.items() if name not in (*INPUTS, "return_dict"))
        return all(value is None or value is False for value in extra)

    def manager(self) -> EncoderGraphManager | None:
        """Give the manager of the model as it is now, made at the first use; None if it is not to use graphs.

        A graph reads the weights where they were when it was captured: a model that was moved, or loaded into other
        tensors, gets a new one. Its first parameter tells; who exchanges a single other one calls `clear()`.
        """
        weight = next(self.model.parameters())
        found = weight.data_ptr(), weight.dtype, weight.device
        with _making:
            if found != self._weights:
                self._weights = found
                if self.existing:
                    self.existing.clear()
                self.existing = self._make(weight.device)
            return self.existing

    def _make(self, device: torch.device) -> EncoderGraphManager | None:
        runtime = graph_runtime(device)
        if self.settings is False or (self.settings is None and not runtime.captures):
            return None
        settings = self.settings if isinstance(self.settings, Mapping) else {}
        compiled = encoder_config(**settings).compile_blocks
        encoder = make_encoder(self.model, runtime.captures if compiled is None else compiled)
        if isinstance(encoder, PackedTower) and dtype_name(encoder.dtype) not in FLOATS:
            return None  # the ops that packed towers are computed with take no other
        return EncoderGraphManager(encoder, runtime=runtime, **settings)

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.settings)
