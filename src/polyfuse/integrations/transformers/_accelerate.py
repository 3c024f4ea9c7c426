"""`accelerate` and `restore`: patch the vision models inside a loaded Transformers model in place, and undo it."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from polyfuse.configs import encoder_config
from polyfuse.integrations.transformers._graphs import ENCODERS, AcceleratedForward
from polyfuse.integrations.transformers._pos_embed import InterpolatedEmbedding
from polyfuse.runtime.encoder import EncoderGraphManager
from polyfuse.spec import fail

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, graphs: Mapping[str, Any] | bool | None = None) -> Model:
    """Patch a loaded model in place and return it. What is patched already stays as it is.

    Every vision model in it that has an adapter, itself included: the towers of Qwen3-VL, Qwen3.5 (dense and MoE) and
    Qwen2.5-VL, SigLIP and CLIP.

    - Inference then runs in graphs, one per token budget, that are captured at the first request. `graphs` holds
      settings of `EncoderConfig`; None uses graphs where the device has them, True everywhere (without graphs a replay
      is a call), False nowhere. A call that records gradients, trains, is being compiled, or asks for hidden states or
      attentions runs as before.
    - Qwen3-VL and Qwen3.5 towers take their position embeddings from `polyfuse.pos_embed_interpolate` in every call: at
      that op's accuracy, so not to the bit what Transformers computes from rounded coordinates. Outside of graphs the
      grid is not read back to the host, and an invalid one gives NaN. A call that passes `interp_indices` or
      `interp_weights` keeps them.

    Parameters keep their names and stay the same objects. Raises `SpecError` if there is no such model, or for bad
    settings.
    """
    models = _vision_models(model, "accelerate")
    if isinstance(graphs, Mapping):
        encoder_config(**graphs)
    for vision in models:
        if _forward(vision) is None:
            vision.forward = AcceleratedForward(vision, graphs)
            if hasattr(vision, "interpolation_mode"):
                vision.pos_embed = InterpolatedEmbedding(vision.pos_embed)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place, drop its graphs and return the model, its original modules back in their places.

    Raises `SpecError` if nothing in the model is patched.
    """
    patched = [vision for vision in _vision_models(model, "restore") if _forward(vision)]
    if not patched:
        fail("restore", "model", "a model patched by accelerate", f"an unpatched {type(model).__name__}")
    for vision in patched:
        if manager := _forward(vision).existing:
            manager.clear()
        del vision.forward
        if isinstance(getattr(vision, "pos_embed", None), InterpolatedEmbedding):
            vision.pos_embed = vision.pos_embed.release()
    return model


def encoder_manager(model: nn.Module) -> EncoderGraphManager:
    """The graph manager of the vision model in an accelerated model: its stats, `capture()` and `clear()`.

    Raises `SpecError` unless the model holds just one accelerated vision model, with graphs.
    """
    managers = [_forward(vision).manager() for vision in _vision_models(model, "encoder_manager") if _forward(vision)]
    if len(managers) != 1 or managers[0] is None:
        fail("encoder_manager", "model", "one accelerated vision model that uses graphs", type(model).__name__)
    return managers[0]


def _vision_models(model: nn.Module, function: str) -> list[Any]:
    found = [module for module in model.modules() if type(module).__name__ in ENCODERS]
    if not found:
        fail(function, "model", f"a vision model of type {', '.join(ENCODERS)} in it", type(model).__name__)
    return found


def _forward(vision: Any) -> Any:
    forward = vars(vision).get("forward")
    return forward if isinstance(forward, AcceleratedForward) else None
