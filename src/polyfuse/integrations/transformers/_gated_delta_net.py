"""The Gated DeltaNet layers of Qwen3-Next and Qwen3.5 on `gdn_in_proj` and `gdn_conv_prep`."""

import sys
from inspect import getclosurevars
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import nn

import polyfuse
from polyfuse.spec import fail

# By class name, so that no model's code is imported that is not used.
LAYERS = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")

# What Transformers 5.17 calls a layer with, beside the parameters of `forward`. Later versions rename `cache_params`.
KEYWORDS = {
    *("num_items_in_batch", "output_hidden_states", "output_attentions", "output_router_logits", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position"),
    *("is_causal", "seq_idx"),
}

_STACK = "polyfuse_in_proj"  # a buffer, so that it moves with the layer and torch.compile takes it for a weight
_SOURCES = "polyfuse_in_proj_sources"


def gated_delta_nets(model: nn.Module) -> list[nn.Module]:
    """Every Gated DeltaNet layer in a model, itself included, that `fuse` fits; none whose weights are not loaded."""
    found = [module for module in model.modules() if type(module).__name__ in LAYERS]
    return [layer for layer in found if not any(parameter.is_meta for parameter in layer.parameters())]


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for a module's own."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


def fuse(layer: Any) -> None:
    """Put `forward` in the place of a layer's own, and stack its weights anew."""
    # A method, because torch.compile compiles layers anew whose `forward` is an object of their own.
    layer.forward = MethodType(forward, layer)
    vars(layer).pop(_SOURCES, None)
    if all(_is_plain(projection) for projection in _projections(layer)):
        stack_projections(layer)


def release(layer: Any) -> None:
    """Undo `fuse`, and drop the second copy of the weights."""
    del layer.forward
    if _STACK in layer._buffers:
        delattr(layer, _STACK)
        delattr(layer, _SOURCES)


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """A Gated DeltaNet layer's forward pass `[batch, tokens, hidden]`: on the ops where it infers, else its own.

    A keyword that is none of `KEYWORDS` comes from another version of Transformers: the layer's own forward runs.
    Raises `SpecError` for packed sequences (`cu_seq_lens_q`) in several rows, or after the cached state of one.
    """
    known = kwargs.keys() <= KEYWORDS
    if not known or not _is_covered(module, hidden_states, cache_params, kwargs):
        cache = () if cache_params is None else (cache_params,)  # which another version gives by another name
        return type(module).forward(module, hidden_states, *cache, attention_mask=attention_mask, **kwargs)
    batch, tokens, _ = hidden_states.shape
    conv_state = recurrent_state = None
    if cache_params is not None and cache_params.has_previous_state(module.layer_idx):
        cached = cache_params.layers[module.layer_idx]
        conv_state, recurrent_state = cached.conv_states[0], cached.recurrent_states[0]
    packed = kwargs.pop("cu_seq_lens_q", None)
    if packed is not None:
        _check_packed(packed, batch, conv_state is not None)

    hidden_states = _names(module).apply_mask_to_padding_states(hidden_states, attention_mask)
    qkv, z, b, a = _project(module, hidden_states.flatten(0, 1))
    boundaries = packed
    if packed is None and batch > 1:
        boundaries = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=qkv.device)
    width = module.conv_kernel_size
    *inputs, _ = polyfuse.gdn_conv_prep(
        qkv,
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
    )
    if cache_params is not None:
        last = qkv.unflatten(0, (batch, tokens))[:, -width:].transpose(1, 2)  # all that the cache keeps
        cache_params.update_conv_state(last, module.layer_idx, conv_kernel_size=width)

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
        output_final_state=cache_params is not None,
        **kwargs,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(state, module.layer_idx)
    mixed = module.norm(mixed.flatten(0, 1), z.unflatten(-1, (-1, module.head_v_dim)))
    return module.out_proj(mixed.reshape(batch, tokens, -1))


def stack_projections(module: Any) -> None:
    """Put the rows of the input projections' weights into one buffer of the layer, as [q | k | v | z | b | a].

    A second copy, which no state dict holds. It is kept until a weight is replaced, moved, or written in a way that
    PyTorch counts, which a write through `.data` is not.
    """
    weights = [projection.weight for projection in _projections(module)]
    sources = [(w.data_ptr(), w.dtype, w.device, None if w.is_inference() else w._version) for w in weights]
    if sources == vars(module).get(_SOURCES):
        return
    if len(weights) == 2:  # of Qwen3-Next: rows in groups, one per key head
        qkvz, ba = (w.unflatten(0, (module.num_k_heads, -1)) for w in weights)
        values = module.value_dim // module.num_k_heads
        groups = (*qkvz.split([module.head_k_dim, module.head_k_dim, values, values], dim=1), *ba.chunk(2, dim=1))
        weights = [group.flatten(0, 1) for group in groups]
    with torch.inference_mode(False), torch.no_grad():
        module.register_buffer(_STACK, torch.cat(weights), persistent=False)
    setattr(module, _SOURCES, sources)


def stacked_weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights that a layer patched by `accelerate` gives to `polyfuse.gdn_in_proj`: [q | k | v | z] and [b | a].

    Views of one buffer, of shape [rows, hidden]. Raises `AttributeError` for a layer whose weights are not stacked.
    """
    stack, large = getattr(module, _STACK), module.conv_dim + module.value_dim
    return stack[:large], stack[large:]


def _is_covered(module: Any, hidden_states: torch.Tensor, cache_params: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is inference that the ops cover, with weights stacked for it."""
    if torch.is_grad_enabled() or module.training or torch.is_autocast_enabled(hidden_states.device.type):
        return False
    if module.activation not in ("silu", "swish") or not 2 <= module.conv_kernel_size <= 4:
        return False
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None:
        return False
    if cache_params is not None and cache_params.layers[module.layer_idx].record_past:
        return False
    if not all(_is_plain(projection) for projection in _projections(module)):
        return False
    if not torch.compiler.is_compiling():
        stack_projections(module)
    stack = getattr(module, _STACK, None)
    return stack is not None and stack.device == hidden_states.device  # offloaded weights are on the meta device


def _is_plain(projection: Any) -> bool:
    """Whether a projection is its weight and nothing else: no adapter, quantised weight, shard or hook."""
    linear = type(projection) is nn.Linear and type(projection.weight) is nn.Parameter and projection.bias is None
    return linear and not projection._forward_hooks and not projection._forward_pre_hooks


def _projections(module: Any) -> list[Any]:
    if hasattr(module, "in_proj_qkvz"):
        return [module.in_proj_qkvz, module.in_proj_ba]
    return [module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a]


def _project(module: Any, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """qkv, z, b and a of hidden states [rows, hidden], as columns of the two projections."""
    qkvz, ba = polyfuse.gdn_in_proj(rows, *stacked_weights(module))
    return *qkvz.split([module.conv_dim, module.value_dim], dim=-1), *ba.chunk(2, dim=-1)


def _names(module: Any) -> Any:
    """The Python module of a layer's class, whose functions its own forward calls."""
    return sys.modules[type(module).__module__]


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
    if packed is None or _reads_boundaries(type(module).__module__, name):
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
    return "cu_seqlens" in getclosurevars(rule).nonlocals.get("applicable_params", ())
