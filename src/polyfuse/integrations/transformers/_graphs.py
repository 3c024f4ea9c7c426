"""A vision model's `forward` in graphs: what `accelerate` puts in its place, and which adapter fits which model."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from polyfuse.configs import encoder_config
from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._fixed_vit import FixedResolutionEncoder
from polyfuse.integrations.transformers._packed import PackedTower
from polyfuse.integrations.transformers._pos_embed import request_embeddings
from polyfuse.integrations.transformers._qwen2_5_vl import WindowedQwenEncoder
from polyfuse.integrations.transformers._qwen_vl import QwenVisionEncoder
from polyfuse.runtime.encoder.capture import graph_runtime
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.watch import Watch
from polyfuse.spec import FLOATS, Unsupported, dtype_name, fail

Encoder = QwenVisionEncoder | WindowedQwenEncoder | FixedResolutionEncoder

# By class name, so that no model's code is imported that is not used.
ENCODERS: Mapping[str, type[Encoder]] = {
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


def make_encoder(model: nn.Module, compile_blocks: bool = False) -> Encoder:
    """The adapter of a Transformers vision model. Raises `SpecError` for a model that has none."""
    adapter = _adapter(model)
    if adapter is None:
        fail("make_encoder", "model", f"one of {', '.join(ENCODERS)}", type(model).__name__)
    return adapter(model, compile_blocks)


def vision_models(model: nn.Module) -> dict[str, Any]:
    """The vision models in a model that have an adapter, itself included, by name. Subclasses of them count."""
    return {name: module for name, module in model.named_modules() if _adapter(module)}


def fuse(model: nn.Module, settings: Mapping[str, Any] | bool | None, name: str, by_request: bool) -> str:
    """Put an `AcceleratedForward` in the place of a vision model's forward, or say why not."""
    if not _patch.own_forward(model, within_hooks=True):
        return "has another forward"
    _patch.install(model, AcceleratedForward(model, settings), name, by_request)
    return ""


def forward_of(model: nn.Module) -> "AcceleratedForward | None":
    """The `AcceleratedForward` in a vision model, if it has one."""
    for placed in (vars(model).get("forward"), vars(model).get("_old_forward")):
        if isinstance(placed, AcceleratedForward):
            return placed
    return None


def why_not(model: nn.Module) -> str:
    """What of an accelerated vision model, as it is now, keeps it from graphs; "" for nothing."""
    forward = forward_of(model)
    if forward is None:
        return "its forward is inside of another"
    return forward.why_no_manager() or make_encoder(model).oddity()


@_patch.stand_in
class AcceleratedForward:
    """Stands in for a vision model's `forward`: in graphs when it infers from plain arguments, else as before.

    `settings` are `EncoderConfig`'s; None uses graphs where the device has them, False nowhere. Copies and pickles of
    the model get a manager of their own, with nothing captured yet.
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any] | bool | None) -> None:
        self.model, self.settings = model, settings
        self.existing: EncoderGraphManager | None = None  # once used
        self._made_for: tuple[Any, ...] = ()  # device and dtype
        self._watch: Watch | None = None  # of calls without graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _patch.is_off(self.model):
            return type(self.model).forward(self.model, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._own(args, kwargs)
        reason = self._not_plain(kwargs)
        manager = None if reason else self.manager()
        if manager is None:
            _patch.count(self.model, reason or self.why_no_manager())
            return self._own(args, kwargs)
        try:
            result = manager.execute(*args, **{name: value for name, value in kwargs.items() if name in INPUTS})
        except Unsupported as error:
            _patch.count(self.model, str(error).partition(": ")[2])
            return self._own(args, kwargs)
        _patch.count(self.model, "")
        return result

    def _own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the model's own forward, of which a plain tower's position embeddings are the op's."""
        if torch.compiler.is_compiling() or not self._oddity():
            kwargs = request_embeddings(self.model, args, kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _oddity(self) -> str:
        """What makes the model more than its class, as it is now."""
        watch = self._watch
        if watch is None:
            watch = self._watch = Watch(self.model, make_encoder(self.model).oddity)
        elif watch.change():
            watch.renew()
        return watch.oddity

    def _not_plain(self, kwargs: Mapping[str, Any]) -> str:
        """Why a call wants more than inference and the outputs that the adapters compute; "" if it does not."""
        config: Any = self.model.config
        if found := _patch.not_inference(self.model, _device(self.model)):
            return found
        if config.output_hidden_states or config.output_attentions:
            return "the config asks for hidden states or attentions"
        if kwargs.get("return_dict", config.return_dict) is False:
            return "a tuple is asked for"
        for name, value in kwargs.items():
            if name not in (*INPUTS, "return_dict") and value is not None and value is not False:
                return f"the call has {name}"
        return ""

    def why_no_manager(self) -> str:
        """Why graphs are not used, whatever the call; "" if they are."""
        device, dtype = _device(self.model), _dtype(self.model)
        if self.settings is False:
            return "graphs are switched off"
        if self.settings is None and not graph_runtime(device).captures:
            return f"no graphs on {device.type}"
        packed = issubclass(_adapter(self.model) or PackedTower, PackedTower)  # whose forward calls the ops
        return f"the ops take no {dtype_name(dtype)}" if packed and dtype_name(dtype) not in FLOATS else ""

    def manager(self) -> EncoderGraphManager | None:
        """Give the manager for the model's device and dtype, made at the first use; None if it is not to use graphs."""
        made_for = _device(self.model), _dtype(self.model)
        with _making:
            if made_for != self._made_for:
                self.drop()
                self.existing, self._made_for = self._make(), made_for
            return self.existing

    def drop(self) -> None:
        """Drop the graphs; the next call makes new ones."""
        if self.existing:
            self.existing.clear()
        self.existing, self._made_for = None, ()

    def _make(self) -> EncoderGraphManager | None:
        if self.why_no_manager():
            return None
        settings = self.settings if isinstance(self.settings, Mapping) else {}
        runtime = graph_runtime(_device(self.model))
        compiled = encoder_config(**settings).compile_blocks
        encoder = make_encoder(self.model, runtime.captures if compiled is None else compiled)
        return EncoderGraphManager(encoder, runtime=runtime, watch=Watch(self.model, encoder.oddity), **settings)

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.settings)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _adapter(model: nn.Module) -> type[Encoder] | None:
    return next((ENCODERS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in ENCODERS), None)
