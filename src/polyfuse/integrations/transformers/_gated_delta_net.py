"""The Gated DeltaNet layers of Qwen3-Next and Qwen3.5 on `gdn_in_proj` and `gdn_conv_prep`."""

import inspect
import sys
from functools import lru_cache
from inspect import getclosurevars
from itertools import pairwise
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

import polyfuse
from polyfuse._torch.projections import stack_weights
from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._plain import oddity
from polyfuse.spec import FLOATS, fail

Model = TypeVar("Model", bound=nn.Module)

# By class name, so that no model's code is imported that is not used.
LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")

# What Transformers 5.17 and 5.24 call a layer with, beside hidden states, cache and attention mask. Another version may
# mean something else by another name.
KEYWORDS = {
    *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position"),
    *("is_causal", "seq_idx"),
}
SIGNATURES = (
    ("self", "hidden_states", "cache_params", "attention_mask", "kwargs"),
    ("self", "hidden_states", "cache", "attention_mask", "kwargs"),  # since Transformers 5.24
)


def gated_delta_nets(model: nn.Module) -> dict[str, Any]:
    """Every Gated DeltaNet layer in a model, itself included, by its name in it."""
    return {name: module for name, module in model.named_modules() if _class(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for a layer's own."""
    return _class(module) is not None and _patch.is_installed(module)


def fuse(layer: Any, name: str, by_request: bool) -> str:
    """Put `forward` in the place of a layer's own, or say why not."""
    if not _patch.own_forward(layer, within_hooks=True):
        return "has another forward"
    # A method, because torch.compile compiles layers anew whose `forward` is an object of their own.
    _patch.install(layer, MethodType(forward, layer), name, by_request)
    return ""


@_patch.stand_in
def forward(
    module: Any,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A Gated DeltaNet layer's forward pass `[batch, tokens, hidden]`: on the ops where it infers, else its own.

    The ops read the layer's weights where they are. The layer's own forward runs for a keyword that is none of
    `KEYWORDS`, which comes from another version of Transformers, and for weights that are not plain ones: adapters,
    quantised, sharded or offloaded ones, and modules with hooks. Raises `SpecError` for packed sequences
    (`cu_seq_lens_q`) in several rows, or after the cached state of one.
    """
    cache = kwargs.pop("cache", cache_params)
    reason = _why_not(module, hidden_states, cache, kwargs)
    _patch.count(module, reason)
    if not reason:
        return _fused(module, hidden_states, cache, attention_mask, kwargs)
    second = () if cache is None else (cache,)  # whatever this version calls it
    return type(module).forward(module, hidden_states, *second, attention_mask=attention_mask, **kwargs)


def _fused(module: Any, hidden_states: torch.Tensor, cache: Any, mask: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    batch, tokens, _ = hidden_states.shape
    conv_state, recurrent_state = _states(cache, module.layer_idx)
    packed = kwargs.pop("cu_seq_lens_q", None)
    if packed is not None:
        _check_packed(packed, batch, conv_state is not None)

    hidden_states = _names(module).apply_mask_to_padding_states(hidden_states, mask)
    projected, z, b, a = project(module, hidden_states.flatten(0, 1))
    boundaries = packed
    if packed is None and batch > 1:
        boundaries = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=projected.device)
    width = module.conv_kernel_size
    *inputs, _ = polyfuse.gdn_conv_prep(
        projected,
        module.conv1d.weight.squeeze(1),
        a,
        b,
        module.A_log,
        module.dt_bias,
        bias=module.conv1d.bias,
        initial_state=None if conv_state is None else conv_state[..., 1 - width :],
        cu_seqlens=boundaries,
        num_k_heads=module.num_k_heads,
        head_k_dim=module.head_k_dim,
        head_v_dim=module.head_v_dim,
        interleaved=_is_interleaved(module),
    )
    if cache is not None:
        last = projected.unflatten(0, (batch, tokens))[:, -width:]  # all that the cache keeps
        cache.update_conv_state(_channels(module, last).transpose(1, 2), module.layer_idx, conv_kernel_size=width)

    query, key, value, g, beta = (x.unflatten(0, (batch, tokens)) for x in inputs)
    if module.num_v_heads > module.num_k_heads:
        query, key = (x.repeat_interleave(module.num_v_heads // module.num_k_heads, dim=2) for x in (query, key))
    decodes = recurrent_state is not None and tokens == 1
    mixed, state = _delta_rule(
        module,
        "torch_recurrent_gated_delta_rule" if decodes else "torch_chunk_gated_delta_rule",
        (query, key, value, g, beta),
        packed,
        initial_state=recurrent_state,
        output_final_state=cache is not None,
        **kwargs,
    )
    if cache is not None:
        cache.update_recurrent_state(state, module.layer_idx)
    mixed = module.norm(mixed.reshape(z.shape), z)
    return module.out_proj(mixed.reshape(batch, tokens, -1))


def project(module: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The input projections of hidden states [rows, hidden], by `polyfuse.gdn_in_proj` from the layer's own weights.

    What `gdn_conv_prep` takes as its x: [q | k | v], or all of Qwen3-Next's first projection, interleaved. z
    [rows, ..., V], whose heads are one dimension or two; b and a, [rows, HV] or [rows, H, HV / H].
    """
    qkvz, ba = polyfuse.gdn_in_proj(rows, **projection_weights(module))
    if not _is_interleaved(module):
        qkv, z = qkvz.split([module.conv_dim, module.value_dim], dim=-1)
        return qkv, z.unflatten(-1, (-1, module.head_v_dim)), *ba.chunk(2, dim=-1)
    heads = (module.num_k_heads, -1)
    values = module.value_dim // module.num_k_heads
    z = qkvz.unflatten(-1, heads)[..., -values:].unflatten(-1, (-1, module.head_v_dim))
    return qkvz, z, *ba.unflatten(-1, heads).chunk(2, dim=-1)


def projection_weights(module: Any) -> dict[str, Any]:
    """The weights of a layer's input projections as `polyfuse.gdn_in_proj` takes them, by argument."""
    names = ("w_qkvz", "w_ba") if _is_interleaved(module) else ("w_qkvz", "w_z", "w_ba", "w_a")
    return {name: projection.weight for name, projection in zip(names, _projections(module), strict=True)}


def stack_projections(model: Model) -> Model:
    """Move the input projections of every Gated DeltaNet layer into one buffer a layer; returns the model.

    The parameters stay the same objects, and are views of the buffer from then on: `gdn_in_proj` finds that they lie
    behind one another and runs them as one GEMM, which is faster for 33 to 8192 rows. Whatever writes to a parameter is
    seen; what replaces its memory (`.to`, `assign=True`, `.data = ...`) undoes it for that layer, which then runs them
    one by one. For serving: sharding and some ways of saving refuse parameters that share memory.

    Raises `SpecError`, before anything is moved, if there is no such layer, or one that the ops do not cover.
    """
    layers = gated_delta_nets(model)
    if not layers:
        fail("stack_projections", "model", "a Gated DeltaNet layer in it", type(model).__name__)
    for name, layer in layers.items():
        if why := why_not(layer):
            fail("stack_projections", name or "model", "a layer with plain weights", why)
    for layer in layers.values():
        weights = projection_weights(layer).values()
        for weight, view in zip(weights, stack_weights(*weights), strict=True):
            weight.data = view
    return model


def why_not(module: Any) -> str:
    """What of a layer itself, as it is now, keeps it from the ops; "" for nothing."""
    cls = _class(module)
    if cls is None or not _has_known_forward(cls.__module__, cls.__name__):
        return "its forward has another signature"
    if not _patch.own_class_forward(type(module)):
        return "its class has another forward"
    if module.activation not in ("silu", "swish") or not 2 <= module.conv_kernel_size <= 4:
        return "its conv is one that the op has not"
    if any(type(weight) is not nn.Parameter or weight.is_meta for weight in (module.A_log, module.dt_bias)):
        return "has weights that are not plain parameters"
    for child in (module.conv1d, *_projections(module)):
        kind = nn.Conv1d if child is module.conv1d else nn.Linear
        if found := oddity(child, kind):
            return f"a {kind.__name__} of it {found}"
    if any(projection.bias is not None for projection in _projections(module)):
        return "its projections have biases"
    return ""


def _why_not(module: Any, hidden_states: torch.Tensor, cache: Any, kwargs: dict[str, Any]) -> str:
    """Why a call runs the layer's own forward; "" if the ops cover it."""
    if found := _patch.not_inference(module, hidden_states.device):
        return found
    if not kwargs.keys() <= KEYWORDS:
        return f"unknown keywords: {', '.join(sorted(kwargs.keys() - KEYWORDS))}"
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None:
        return "seq_idx without cu_seq_lens_q"
    if found := why_not(module):
        return found
    if cache is not None and _records_past(cache, module.layer_idx):
        return "the cache records its past"
    if str(hidden_states.dtype).removeprefix("torch.") not in FLOATS:
        return f"hidden states are {hidden_states.dtype}"
    return ""


def _states(cache: Any, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The conv state and the recurrent state that a cache holds of a layer, if it does."""
    if cache is None:
        return None, None
    if hasattr(cache, "get_conv_state"):  # since Transformers 5.24
        return cache.get_conv_state(layer_idx, state_idx=0), cache.get_recurrent_state(layer_idx, state_idx=0)
    if not cache.has_previous_state(layer_idx):
        return None, None
    return cache.layers[layer_idx].conv_states[0], cache.layers[layer_idx].recurrent_states[0]


def _records_past(cache: Any, layer_idx: int) -> bool:
    if hasattr(cache, "is_recording_past"):  # since Transformers 5.24
        return bool(cache.is_recording_past(layer_idx))
    return bool(cache.layers[layer_idx].record_past)


def _channels(module: Any, projected: torch.Tensor) -> torch.Tensor:
    """The channels [q | k | v] of the first projection [..., columns]: a copy where they are interleaved."""
    if not _is_interleaved(module):
        return projected
    key, value = module.head_k_dim, module.value_dim // module.num_k_heads
    groups = projected.unflatten(-1, (module.num_k_heads, -1)).split([key, key, value, value], dim=-1)
    return torch.cat([group.flatten(-2) for group in groups[:3]], dim=-1)


def _is_interleaved(module: Any) -> bool:
    return hasattr(module, "in_proj_qkvz")


def _projections(module: Any) -> list[Any]:
    if _is_interleaved(module):
        return [module.in_proj_qkvz, module.in_proj_ba]
    return [module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a]


def _class(module: nn.Module) -> type | None:
    """The class of a layer that the ops know: its own, or the one that FSDP made a subclass of. None for others."""
    cls = type(module)
    if cls.__module__.startswith("torch.distributed."):
        cls = next((base for base in cls.__mro__ if base.__name__ in LAYERS), cls)
    return cls if cls.__name__ in LAYERS else None


def _module_name(module: Any) -> str:
    return (_class(module) or type(module)).__module__


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_known_forward(module: str, name: str) -> bool:
    """Whether a layer's class takes the arguments of `SIGNATURES`."""
    return _parameters(module, name) in SIGNATURES


@lru_cache
def _parameters(module: str, name: str) -> tuple[str, ...]:
    """The names of the parameters of a class's forward."""
    return tuple(inspect.signature(getattr(sys.modules[module], name).forward).parameters)


def _names(module: Any) -> Any:
    """The Python module of a layer's class, whose functions its own forward calls."""
    return sys.modules[_module_name(module)]


def _check_packed(packed: torch.Tensor, batch: int, continues: bool) -> None:
    if batch > 1:
        fail("gated_delta_net", "hidden_states", "packed sequences (cu_seq_lens_q) in one row", f"{batch} rows")
    if continues and len(packed) > 2:
        expected = "one sequence, as a cached state is continued"
        fail("gated_delta_net", "cu_seq_lens_q", expected, f"{len(packed) - 1} sequences")


def _delta_rule(
    module: Any, name: str, inputs: tuple[torch.Tensor, ...], packed: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layer's own delta rule, without its l2norm: output `[batch, tokens, HV, V]` and the final state.

    Transformers' PyTorch fallback carries its state from one packed sequence into the next: it is called for each by
    itself, with boundaries that are read on the host for it.
    """
    rule = getattr(_names(module), name)
    options["use_qk_l2norm_in_kernel"] = False
    if packed is None or _reads_boundaries(_module_name(module), name):
        query, key, value, g, beta = inputs
        return rule(query, key, value, g=g, beta=beta, cu_seqlens=packed, **options)
    outputs: list[torch.Tensor] = []
    state = None
    for start, end in pairwise([*packed.tolist(), inputs[0].shape[1]]):  # rows past the last sequence are padding
        if start < end:
            query, key, value, g, beta = (x[:, start:end] for x in inputs)
            output, state = rule(query, key, value, g=g, beta=beta, **options)
            outputs.append(output)
    return torch.cat(outputs, dim=1), state


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _reads_boundaries(module: str, name: str) -> bool:
    """Whether a delta rule is a kernel that takes `cu_seqlens`, by what Transformers' wrapper hands on to it."""
    rule: Any = getattr(sys.modules[module], name)
    if isinstance(rule, nn.Module):  # what the kernels package makes of a function
        own: Any = type(rule).forward
        if getattr(rule.forward, "__func__", own) is not own:
            return True
        rule = getclosurevars(own).nonlocals["func"]
    names = getclosurevars(rule).nonlocals
    if "is_new_implementation" in names:  # since Transformers 5.24, where the fallback refuses boundaries
        return bool(names["is_new_implementation"])
    return "cu_seqlens" in names.get("applicable_params", ())
