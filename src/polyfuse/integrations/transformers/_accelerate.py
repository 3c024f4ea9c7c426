"""`accelerate` and `restore`: patch the parts of a loaded Transformers model that polyfuse fuses, and undo it."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from polyfuse.configs import encoder_config
from polyfuse.integrations.transformers import _fp8_mlp, _gated_delta_net
from polyfuse.integrations.transformers._fp8_mlp import fp8_mlps
from polyfuse.integrations.transformers._gated_delta_net import gated_delta_nets
from polyfuse.integrations.transformers._graphs import ENCODERS, AcceleratedForward
from polyfuse.integrations.transformers._pos_embed import InterpolatedEmbedding
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.spec import fail

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, graphs: Mapping[str, Any] | bool | None = None) -> Model:
    """Patch a loaded model in place and return it. What is patched already stays as it is.

    Every part in it that has an adapter, itself included:

    - Vision models: the towers of Qwen3-VL, Qwen3.5 (dense and MoE) and Qwen2.5-VL, SigLIP and CLIP. Inference then
      runs in graphs, one per token budget, that are captured at the first request. `graphs` holds settings of
      `EncoderConfig`; None uses graphs where the device has them, True everywhere (without graphs a replay is a call),
      False nowhere. A call that records gradients, trains, is being compiled, or asks for hidden states or attentions
      runs as before.
    - Qwen3-VL and Qwen3.5 towers take their position embeddings from `polyfuse.pos_embed_interpolate` in every call: at
      that op's accuracy, so not to the bit what Transformers computes from rounded coordinates. Outside of graphs the
      grid is not read back to the host, and an invalid one gives NaN. A call that passes `interp_indices` or
      `interp_weights` keeps them.
    - The Gated DeltaNet layers of Qwen3-Next and Qwen3.5 (dense and MoE): inference then runs on `polyfuse.gdn_in_proj`
      and `polyfuse.gdn_conv_prep`, with the model's own delta rule and cache, and no state passes from one packed
      sequence to another. They work from a second copy of their input projections' weights, which follows the weights
      themselves, but under torch.compile, and after a write through `.data`, only once this function is called again.
    - MLPs with FP8 weights: inference then quantises the activation in one kernel with SiLU and product, bit for bit as
      the model does.

    Parameters keep their names and stay the same objects. Raises `SpecError` if there is nothing to patch, or for bad
    settings.
    """
    vision, deltas, mlps = _vision_models(model), gated_delta_nets(model), fp8_mlps(model)
    if not (vision or deltas or mlps):
        expected = f"a vision model ({', '.join(ENCODERS)}), Gated DeltaNet layer or FP8 MLP in it"
        fail("accelerate", "model", expected, type(model).__name__)
    if isinstance(graphs, Mapping):
        encoder_config(**graphs)
    for tower in vision:
        if not _is_patched(tower):
            tower.forward = AcceleratedForward(tower, graphs)
            if hasattr(tower, "interpolation_mode"):
                tower.pos_embed = InterpolatedEmbedding(tower.pos_embed)
    for layer in deltas:
        _gated_delta_net.fuse(layer)
    for mlp in mlps:
        _fp8_mlp.fuse(mlp)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place, drop its graphs and return the model, its original modules back in their places.

    Raises `SpecError` if nothing in the model is patched.
    """
    patched: list[Any] = [module for module in model.modules() if _is_patched(module)]
    if not patched:
        fail("restore", "model", "a model patched by accelerate", f"an unpatched {type(model).__name__}")
    for module in patched:
        if _gated_delta_net.is_fused(module):
            _gated_delta_net.release(module)
        elif _fp8_mlp.is_fused(module):
            _fp8_mlp.release(module)
        else:
            if module.forward.existing:
                module.forward.existing.clear()
            del module.forward
            if isinstance(getattr(module, "pos_embed", None), InterpolatedEmbedding):
                module.pos_embed = module.pos_embed.release()
    return model


def encoder_manager(model: nn.Module) -> EncoderGraphManager:
    """The graph manager of the vision model in an accelerated model: its stats, `capture()` and `clear()`.

    Raises `SpecError` unless the model holds just one accelerated vision model, with graphs.
    """
    managers = [tower.forward.manager() for tower in _vision_models(model) if _is_patched(tower)]
    if len(managers) != 1 or managers[0] is None:
        fail("encoder_manager", "model", "one accelerated vision model that uses graphs", type(model).__name__)
    return managers[0]


def _vision_models(model: nn.Module) -> list[Any]:
    """The vision models in a model that have an adapter, itself included."""
    return [module for module in model.modules() if type(module).__name__ in ENCODERS]


def _is_patched(module: nn.Module) -> bool:
    """Whether `accelerate` has replaced the module's `forward`."""
    encodes = isinstance(vars(module).get("forward"), AcceleratedForward)
    return encodes or _gated_delta_net.is_fused(module) or _fp8_mlp.is_fused(module)
