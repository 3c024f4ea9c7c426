"""What stays of one call in the next one, and what one call in many shows."""

import threading
import time
from typing import Any

import numpy as np

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import as_returned, by_name, nudged, outputs_changed, results

CORE = ("core",)


@register("again", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "gdn_decode")
def one_result_buffer_for_all_calls(right: Function) -> Function:
    kept: dict[Any, Any] = {}

    def change(found: list[Any]) -> None:
        for i, x in enumerate(found):
            # A buffer for each thread, so that calls at once do not meet.
            key = i, x.shape, x.stride(), x.dtype, x.is_inference(), threading.get_ident()
            found[i] = kept.setdefault(key, x).copy_(x)

    return outputs_changed(change)(right)


@register("again", "gated_rms_norm", "gdn_conv_prep", "gdn_post_conv")
def weight_read_once_for_each_memory(right: Function) -> Function:
    """A copy of the last array that is given by position, made anew when PyTorch has counted a write to it."""
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        x = args[-1]
        if x.is_inference():
            return right(*args, **keywords)
        found = kept.get(id(x))
        if found is None or found[0] is not x or found[1] != x._version:
            kept.clear()
            found = kept[id(x)] = x, x._version, x.clone()
        return right(*args[:-1], found[2], **keywords)

    return wrong


@register("again", "gated_rms_norm", "gdn_conv_prep", "gdn_post_conv")
def weight_kept_for_each_address(right: Function) -> Function:
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        x = args[-1]
        address = x.data_ptr(), x.shape, x.dtype
        if kept.get("address") != address:
            kept.update(address=address, copy=x.clone())
        return right(*args[:-1], kept["copy"], **keywords)

    return wrong


@register("again", "gdn_in_proj", "pos_embed_interpolate")
def first_weight_ever_seen(right: Function) -> Function:
    """The weights of the first call of a shape are those of all later ones, as long as they begin alike."""
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        name = 0 if len(args) == 2 else 1
        x = args[name]
        if not kept or kept["x"] is not x:
            kept.update(x=x, copy=x.clone())
        return right(*args[:name], kept["copy"], *args[name + 1 :], **keywords)

    return wrong


@register("again", "gated_rms_norm", "segment_attention")
def a_result_given_out_twice(right: Function) -> Function:
    """The result of equal arguments is remembered, and given to the next caller as it is."""
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        key = [threading.get_ident(), sorted(map(str, keywords.items()))]
        for x in args:
            key += [x.shape, x.stride(), x.storage_offset(), x.is_inference(), x.detach().float().numpy().tobytes()]
        if str(key) not in kept:
            kept[str(key)] = right(*args, **keywords)
        return kept[str(key)]

    return wrong


@register("again", "gdn_conv_prep", cases=("width_4-bias-initial_state-int32",))
def boundaries_read_once(right: Function) -> Function:
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        x = keywords["cu_seqlens"]
        if kept.get("x") is not x:
            kept.update(x=x, copy=x.clone())
        return right(*args, **{**keywords, "cu_seqlens": kept["copy"]})

    return wrong


@register("again", "gdn_decode", cases=("indices_int32-h2-hv4",))
def slots_read_once(right: Function) -> Function:
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        x = keywords["state_indices"]
        if kept.get("x") is not x:
            kept.update(x=x, copy=x.clone())
        return right(*args, **{**keywords, "state_indices": kept["copy"]})

    return wrong


@register("again", "gated_rms_norm", "gdn_post_conv")
def another_rounding_from_the_second_call_on(right: Function) -> Function:
    calls = [0]

    def change(found: list[Any]) -> None:
        calls[0] += 1
        if calls[0] > 1:
            found[0] = nudged(found[0])

    return outputs_changed(change)(right)


@register("again", "gated_rms_norm", backend="jax")
def weights_of_the_first_call(right: Function) -> Function:
    kept: list[Any] = []

    def wrong(x: Any, gate: Any, weight: Any, **keywords: Any) -> Any:
        kept.append(weight)
        return right(x, gate, kept[0], **keywords)

    return wrong


@register("again", "gated_rms_norm", backend="numpy")
def one_buffer_for_all_calls(right: Function) -> Function:
    kept: dict[Any, Any] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        y = right(*args, **keywords)
        buffer: Any = kept.setdefault((y.shape, y.dtype), y)
        buffer[...] = y
        return buffer

    return wrong


def _once_in(calls: int, spoil: Any) -> Any:
    """A defect of one call in so many."""

    def make(right: Function) -> Function:
        count = [0]

        def change(found: list[Any]) -> None:
            count[0] += 1
            if count[0] % calls == 0:
                spoil(found)

        return outputs_changed(change)(right)

    return make


def _drop_last(found: list[Any]) -> None:
    found[0] = found[0].clone()
    found[0].view(-1)[-1:] = 0


@register("races", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "gdn_in_proj", "gdn_decode", cases=CORE)
def one_call_of_500_drops_an_element(right: Function) -> Function:
    return _once_in(500, _drop_last)(right)


@register("races", "gated_rms_norm", "segment_attention", "pos_embed_interpolate", cases=CORE)
def one_call_of_301_rounds_otherwise(right: Function) -> Function:
    return _once_in(301, lambda found: found.__setitem__(0, nudged(found[0])))(right)


@register("races", "gdn_conv_prep", "gated_delta_rule", cases=CORE)
def one_call_of_150_drops_an_element(right: Function) -> Function:
    return _once_in(150, _drop_last)(right)


@register("races", "gated_rms_norm", "gdn_post_conv", cases=CORE)
def results_in_a_ring_of_eight_buffers(right: Function) -> Function:
    kept: dict[Any, list[Any]] = {}

    def change(found: list[Any]) -> None:
        x = found[0]
        ring = kept.setdefault((x.shape, x.stride(), x.dtype, x.is_inference(), threading.get_ident()), [])
        if len(ring) < 8:
            ring.append(x)
        else:
            ring.append(ring.pop(0).copy_(x))
            found[0] = ring[-1]

    return outputs_changed(change)(right)


@register("races", "gated_rms_norm", "silu_mul_block_quant", cases=CORE)
def scratch_memory_for_all_threads(right: Function) -> Function:
    """Of two threads that call at once, one computes with what the other has put there."""
    scratch: dict[Any, Any] = {}

    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        key = x.shape, x.stride(), x.dtype, x.is_inference()
        scratch[key] = x
        time.sleep(0)
        return right(scratch[key], *args, **keywords)

    return wrong


@register("races", "gated_rms_norm", backend="jax", cases=CORE)
def one_call_of_200_drops_an_element(right: Function) -> Function:
    count = [0]

    def wrong(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        y = right(*args, **keywords)
        return y.at[-1, -1].set(0) if count[0] % 200 == 0 else y

    return wrong


@register("races", "gated_rms_norm", backend="numpy", cases=CORE)
def one_call_of_500(right: Function) -> Function:
    count = [0]

    def wrong(*args: Any, **keywords: Any) -> Any:
        count[0] += 1
        found = [np.array(x) for x in results(right(*args, **keywords))]
        if count[0] % 500 == 0:
            found[0][-1] = 0
        return as_returned(found)

    return wrong


@register("races", "gdn_post_conv", cases=CORE)
def parameters_in_a_global_variable(right: Function) -> Function:
    """The arguments are handed on through a variable of the module."""
    shared: dict[str, dict[str, Any]] = {}

    def wrong(*args: Any, **keywords: Any) -> Any:
        shared["arguments"] = by_name("gdn_post_conv", args, keywords)
        time.sleep(0)
        return right(**shared["arguments"])

    return wrong
