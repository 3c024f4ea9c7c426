"""The Gated DeltaNet layers of Qwen3-Next and Qwen3.5: between their projections all is done by ops."""

import sys
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

import polyfuse
from polyfuse._torch.projections import stack_weights
from polyfuse.integrations.transformers import _patch
from polyfuse.integrations.transformers._gated_delta_net_checks import (
    is_interleaved,
    known_class,
    plain_norm,
    projections,
    why_not,
    why_not_call,
)
from polyfuse.spec import fail

Model = TypeVar("Model", bound=nn.Module)

States = tuple[torch.Tensor, torch.Tensor]  # of conv and recurrence, one for each sequence


def gated_delta_nets(model: nn.Module) -> dict[str, Any]:
    """Every Gated DeltaNet layer in a model, itself included, by its name in it."""
    return {name: module for name, module in model.named_modules() if known_class(module)}


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for a layer's own."""
    return known_class(module) is not None and _patch.is_installed(module)


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

    The ops read the layer's weights where they are, and update the states of a cache in place. The layer's own forward
    runs for a keyword that none of the tested versions of Transformers has, and for weights that are not plain ones:
    adapters, quantised, sharded or offloaded ones, and modules with hooks. Raises `SpecError` for packed sequences
    (`cu_seq_lens_q`) in several rows, or of another number than those that the cache holds the states of.
    """
    cache = kwargs.pop("cache", cache_params)
    reason = why_not_call(module, hidden_states, cache, kwargs)
    _patch.count(module, reason)
    if not reason:
        return _fused(module, hidden_states, cache, attention_mask, kwargs.get("cu_seq_lens_q"))
    second = () if cache is None else (cache,)  # whatever this version calls it
    return type(module).forward(module, hidden_states, *second, attention_mask=attention_mask, **kwargs)


def _fused(
    module: Any, hidden_states: torch.Tensor, cache: Any, mask: torch.Tensor | None, packed: torch.Tensor | None
) -> torch.Tensor:
    batch, tokens, _ = hidden_states.shape
    if packed is not None and batch > 1:
        fail("gated_delta_net", "hidden_states", "packed sequences (cu_seq_lens_q) in one row", f"{batch} rows")
    sequences = batch if packed is None else len(packed) - 1
    index = module.layer_idx
    held = None if cache is None else cache.layers[index].conv_states[0]  # after a reset too
    if held is not None and len(held) != sequences:
        fail("gated_delta_net", "hidden_states", f"{len(held)} sequences, as the cache holds", sequences)
    states = _states(cache, index) if cache is not None and cache.has_previous_state(index) else None

    if mask is not None:
        hidden_states = _names(module).apply_mask_to_padding_states(hidden_states, mask)
    rows = hidden_states.flatten(0, 1)
    if tokens == 1 and packed is None and states is not None and plain_norm(module, ("silu",)):
        mixed = _decode(module, rows, states)
    else:
        if packed is None and batch > 1:
            packed = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=rows.device)
        if cache is not None and states is None:
            states = _new_states(module, cache, sequences, rows)
        mixed = _prefill(module, rows, states, packed)
    return module.out_proj(mixed.reshape(batch, tokens, -1))


def _decode(module: Any, rows: torch.Tensor, states: States) -> torch.Tensor:
    """One token of each sequence [sequences, hidden], up to the output projection: [sequences, HV * V]."""
    x, z, b, a = _project(module, rows)
    return polyfuse.gdn_decode(
        x,
        z,
        a,
        b,
        module.conv1d.weight.squeeze(1),
        module.A_log,
        module.dt_bias,
        module.norm.weight,
        *states,
        conv_bias=module.conv1d.bias,
        norm_eps=module.norm.variance_epsilon,
        **_heads(module),
    )


def _prefill(module: Any, rows: torch.Tensor, states: States | None, packed: torch.Tensor | None) -> torch.Tensor:
    """All rows of one sequence or several packed ones [rows, hidden], up to the output projection: rows * HV * V."""
    x, z, b, a = _project(module, rows)
    conv_state, recurrent_state = (None, None) if states is None else states
    *inputs, _ = polyfuse.gdn_conv_prep(
        x,
        module.conv1d.weight.squeeze(1),
        a,
        b,
        module.A_log,
        module.dt_bias,
        bias=module.conv1d.bias,
        cu_seqlens=packed,
        state_pool=conv_state,
        **_heads(module),
    )
    mixed, _ = polyfuse.gated_delta_rule(*inputs, cu_seqlens=packed, state_pool=recurrent_state)
    gate, norm = _gate(module, x, z), module.norm
    if not plain_norm(module):
        return norm(mixed.flatten(0, 1), gate.reshape(-1, module.head_v_dim))  # two dimensions, as the layer's own call
    mixed = mixed.view(gate.shape)
    return polyfuse.gated_rms_norm(mixed, gate, norm.weight, eps=norm.variance_epsilon, activation=norm.activation)


def _project(module: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The input projections of hidden states [rows, hidden], by `polyfuse.gdn_in_proj` from the layer's own weights.

    As the other ops take them: x and z, or all of Qwen3-Next's first projection and None; b and a, [rows, HV] or
    [rows, H, HV / H].
    """
    qkvz, ba = polyfuse.gdn_in_proj(rows, **projection_weights(module))
    if is_interleaved(module):
        b, a = ba.unflatten(-1, (module.num_k_heads, -1)).chunk(2, dim=-1)
        return qkvz, None, b, a
    x, z = qkvz.split_with_sizes([module.conv_dim, module.value_dim], dim=-1)
    b, a = ba.chunk(2, dim=-1)
    return x, z, b, a


def _gate(module: Any, x: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
    """z by heads: [rows, HV, V], or [rows, H, HV / H, V] where it is in x."""
    if z is not None:
        return z.unflatten(-1, (-1, module.head_v_dim))
    values = module.value_dim // module.num_k_heads
    return x.unflatten(-1, (module.num_k_heads, -1))[..., -values:].unflatten(-1, (-1, module.head_v_dim))


def _heads(module: Any) -> dict[str, Any]:
    """The sizes of a layer's heads, and how they lie in its first projection."""
    return {
        "num_k_heads": module.num_k_heads,
        "head_k_dim": module.head_k_dim,
        "head_v_dim": module.head_v_dim,
        "interleaved": is_interleaved(module),
    }


def _states(cache: Any, layer_idx: int) -> States:
    """The conv states and the recurrent states that a cache holds of a layer."""
    layer = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


def _new_states(module: Any, cache: Any, sequences: int, rows: torch.Tensor) -> States:
    """The states of so many sequences, all zero, in a cache that has none of the layer."""
    width, index = module.conv_kernel_size, module.layer_idx
    conv_states = rows.new_zeros(sequences, len(module.conv1d.weight), width)
    cache.update_conv_state(conv_states, index, conv_kernel_size=width)
    sizes = module.num_v_heads, module.head_k_dim, module.head_v_dim
    cache.update_recurrent_state(rows.new_zeros(sequences, *sizes, dtype=torch.float32), index)
    return _states(cache, index)


def projection_weights(module: Any) -> dict[str, Any]:
    """The weights of a layer's input projections as `polyfuse.gdn_in_proj` takes them, by argument."""
    names = ("w_qkvz", "w_ba") if is_interleaved(module) else ("w_qkvz", "w_z", "w_ba", "w_a")
    return {name: projection.weight for name, projection in zip(names, projections(module), strict=True)}


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


def _names(module: Any) -> Any:
    """The Python module of a layer's class, whose functions its own forward calls."""
    return sys.modules[(known_class(module) or type(module)).__module__]
