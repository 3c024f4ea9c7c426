"""`accelerate` and `restore`: patch the parts of a loaded Transformers model that polyfuse fuses, and undo it."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from polyfuse.configs import encoder_config
from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._graphs import AcceleratedForward, forward_of
from polyfuse.integrations.transformers._parts import KINDS, find, fuse
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.spec import fail

Model = TypeVar("Model", bound=nn.Module)

NAMED = 8  # classes of a model that a message names


def accelerate(
    model: Model, graphs: Mapping[str, Any] | bool | None = None, *, parts: Iterable[str] | None = None
) -> Model:
    """Patch a loaded model in place and return it. What is patched already stays as it is.

    An accelerated model computes what the model itself would with the weights, adapters, hooks, settings and calls that
    it has at that moment; what the fused code does not cover runs the model's own. `report(model)` says what runs how.
    `parts` names the kinds to patch, of which each must be found; None patches all of these:

    - "vision": the towers of Qwen3-VL, Qwen3.5 (dense and MoE) and Qwen2.5-VL, SigLIP and CLIP. Inference then runs in
      graphs, one per token budget, that are captured at the first request. `graphs` holds settings of `EncoderConfig`;
      None uses graphs where the device has them, True everywhere (without graphs a replay is a call), False nowhere. A
      call that records gradients, trains, is under autocast, is being compiled, or asks for hidden states or attentions
      runs as before, and so does a tower with hooks, adapters, quantised or offloaded weights, replaced modules or an
      attention function of its own. Where something has changed since the capture, the request is computed anew.
    - Qwen3-VL and Qwen3.5 towers take their position embeddings from `polyfuse.pos_embed_interpolate`, in calls outside
      of graphs too if no module of the tower is patched or changed: at that op's accuracy, so not to the bit what
      Transformers computes from rounded coordinates. Outside of graphs the grid is not read back to the host, and an
      invalid one gives NaN. A call that passes `interp_indices` or `interp_weights` keeps them.
    - "gated_delta_net": the layers of Qwen3-Next and Qwen3.5 (dense and MoE). Inference then runs on ops from the input
      projections to the output projection, the delta rule included. They read the weights where they are, and update
      the states of the model's own cache in place, one for each packed sequence too, between which no state passes.
    - "fp8_mlp": MLPs with FP8 weights. Inference then quantises the activation in one kernel with SiLU and product, bit
      for bit as the model does.
    - "fp8_experts": the experts of MoE layers with FP8 weights. Inference then quantises each token once, and the rest
      as in an MLP; all experts are multiplied in one launch. Where that has to be one expert after the other, as
      without Triton, `parts` has to name this kind, and no graph can hold it.
    - "torchao_mlp": MLPs with torchao's MXFP8 or MXFP4 weights, and NVFP4 ones if `parts` names this kind. Inference
      then quantises their input once, and the activation in one kernel with SiLU and product, for torchao's own GEMMs.

    No parameter is copied or moved. A part whose first call runs as before logs a line, a warning if `parts` named it.
    Raises `SpecError` if there is nothing to patch, with what was found, or for bad settings.
    """
    if isinstance(graphs, Mapping):
        encoder_config(**graphs)
    elif not (graphs is None or isinstance(graphs, bool)):
        fail("accelerate", "graphs", "a mapping of settings, True, False or None", graphs)
    wanted = _wanted(parts)
    found = [part for part in find(model) if part[0] in wanted]
    missing = [kind for kind in wanted if kind not in {part[0] for part in found}]
    if not found or (parts is not None and missing):
        expected = _any(missing) if parts is None else ", ".join(KINDS[kind].doc for kind in missing)
        fail("accelerate", "model", f"{expected} in it", _seen(model))
    refused = {}
    for kind, name, module in found:
        if _patch.is_installed(module):
            continue
        name_of_part = name or type(model).__name__
        if why := fuse(kind, module, name, graphs, parts is not None):
            refused[name_of_part] = why
            _patch.refuse(module, why)
        _patch.log.debug("accelerate: %s, %s: %s", name_of_part, kind, f"not patched: {why}" if why else "patched")
    if len(refused) == len(found):
        got = "; ".join(f"{name} {why}" for name, why in refused.items())
        fail("accelerate", "model", "a part that can be patched", got)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place, drop its graphs and return the model, every forward as it was found.

    A forward of ours that somebody has wrapped since stays inside of that wrapper, and hands every call on. Raises
    `SpecError` if nothing in the model is patched.
    """
    patched = [module for module in model.modules() if _patch.is_installed(module)]
    if not patched:
        fail("restore", "model", "a model patched by accelerate", f"an unpatched {type(model).__name__}")
    for module in patched:
        if (forward := forward_of(module)) is not None:
            forward.drop()
        _patch.remove(module)
    return model


def invalidate(model: Model) -> Model:
    """Drop the graphs of every accelerated vision model in a model; the next request captures anew. Returns the model.

    For changes that nothing in modules, attributes, hooks and weights shows: a global that a module's code reads.
    """
    for forward in _forwards(model):
        forward.drop()
    return model


def encoder_manager(model: nn.Module) -> EncoderGraphManager:
    """The graph manager of the vision model in an accelerated model: its stats, `capture()` and `clear()`.

    Raises `SpecError` unless the model holds just one accelerated vision model, with graphs.
    """
    managers = [forward.manager() for forward in _forwards(model)]
    if len(managers) != 1 or managers[0] is None:
        hint = "accelerate(model, graphs=True), if its device has none" if managers == [None] else ""
        fail("encoder_manager", "model", "one accelerated vision model that uses graphs", type(model).__name__, hint)
    return managers[0]


def _forwards(model: nn.Module) -> list[AcceleratedForward]:
    return [forward for module in model.modules() if (forward := forward_of(module)) is not None]


def _wanted(parts: Iterable[str] | None) -> list[str]:
    """The kinds of parts that are asked for."""
    if parts is None:
        return list(KINDS)
    if isinstance(parts, str) or not isinstance(parts, Iterable):
        fail("accelerate", "parts", f"a list of {', '.join(KINDS)}", parts)
    wanted = list(parts)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown or not wanted:
        fail("accelerate", "parts", f"a list of {', '.join(KINDS)}", unknown)
    return wanted


def _any(kinds: list[str]) -> str:
    docs = [KINDS[kind].doc for kind in kinds]
    return f"{', '.join(docs[:-1])} or {docs[-1]}"


def _seen(model: nn.Module) -> str:
    """The class of a model and those of the modules in it, but PyTorch's own."""
    classes = dict.fromkeys(type(m).__name__ for m in model.modules() if not type(m).__module__.startswith("torch.nn."))
    names = [name for name in classes if name != type(model).__name__]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    inside = f" of {', '.join(names[:NAMED])}{more}" if names else ""
    return f"{type(model).__name__}{inside}"
