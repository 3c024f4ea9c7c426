"""Results of another kind, in another layout, or in memory that is not theirs; and inputs that are written."""

from typing import Any

import numpy as np

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import arguments_changed, by_name, outputs_changed, results

COL_MAJOR = ("float8_e4m3fn-float32-col_major",)


@register("results", "gdn_post_conv")
def v_as_a_view_of_its_input(right: Function) -> Function:
    def wrong(conv_out: Any, *args: Any, **keywords: Any) -> Any:
        q, k, v, g, beta = right(conv_out, *args, **keywords)
        return q, k, conv_out[:, -v[0].numel() :].unflatten(1, v.shape[1:]), g, beta

    return wrong


@register("results", "silu_mul_block_quant")
def row_major_scales_by_columns(right: Function) -> Function:
    return outputs_changed(lambda found: found.__setitem__(1, found[1].t().contiguous().t()))(right)


@register("results", "silu_mul_block_quant", cases=COL_MAJOR)
def column_major_scales_by_rows(right: Function) -> Function:
    return outputs_changed(lambda found: found.__setitem__(1, found[1].contiguous()))(right)


@register("results", "segment_attention", "gdn_in_proj", "gdn_decode")
def first_result_by_columns(right: Function) -> Function:
    """The dimensions of the first result in reverse order in memory."""

    def change(found: list[Any]) -> None:
        x = found[0]
        order = tuple(reversed(range(x.dim())))
        found[0] = x.permute(order).contiguous().permute(order)

    return outputs_changed(change)(right)


@register("results", "gated_rms_norm", cases=("float32-sigmoid-offset_1.0",))
def numpy_arrays(right: Function) -> Function:
    return lambda *args, **keywords: right(*args, **keywords).numpy()


@register("results", "gated_rms_norm", "pos_embed_interpolate")
def a_tuple_of_one(right: Function) -> Function:
    return lambda *args, **keywords: (right(*args, **keywords),)


@register("results", "gated_rms_norm", "gdn_post_conv")
def a_result_that_requires_a_gradient(right: Function) -> Function:
    return outputs_changed(lambda found: found[0].requires_grad_())(right)


@register("results", "gated_rms_norm")
def a_parameter(right: Function) -> Function:
    import torch

    return lambda *args, **keywords: torch.nn.Parameter(right(*args, **keywords), requires_grad=False)


@register("results", "gated_rms_norm", "silu_mul_block_quant")
def tensors_of_inference_mode(right: Function) -> Function:
    import torch

    return torch.inference_mode()(right)


@register("results", "gdn_post_conv", "gdn_conv_prep")
def q_and_k_in_one_buffer(right: Function) -> Function:
    """Halves of a buffer, both contiguous."""
    import torch

    def change(found: list[Any]) -> None:
        found[0], found[1] = torch.stack(found[:2])

    return outputs_changed(change)(right)


@register("results", "gdn_conv_prep", cases=("rows_67-initial_state",))
def final_state_is_the_initial_one(right: Function) -> Function:
    """Its memory is used again, for the right values: the caller's state is gone."""

    def wrong(*args: Any, **keywords: Any) -> Any:
        *found, state = right(*args, **keywords)
        return *found, keywords["initial_state"].copy_(state)

    return wrong


@register("results", "gated_rms_norm", backend="jax")
def numpy_arrays_of(right: Function) -> Function:
    return lambda *args, **keywords: np.asarray(right(*args, **keywords))


@register("results", "gdn_post_conv", backend="numpy")
def by_columns(right: Function) -> Function:
    return lambda *args, **keywords: tuple(np.asfortranarray(x) for x in results(right(*args, **keywords)))


@register("results", "gated_rms_norm", backend="numpy")
def read_only(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        y = right(*args, **keywords)
        y.flags.writeable = False
        return y

    return wrong


@register("inputs", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "segment_attention")
def first_input_written_and_restored(right: Function) -> Function:
    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        x.neg_()
        x.neg_()
        return right(x, *args, **keywords)

    return wrong


@register("inputs", "gated_rms_norm", "gdn_in_proj", "gdn_decode")
def last_row_of_an_input_written_behind(right: Function) -> Function:
    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        found = right(x, *args, **keywords)
        x.data[-1:].mul_(2)
        return found

    return wrong


@register("inputs", "gated_rms_norm")
def one_is_added_to_the_weight(right: Function) -> Function:
    def wrong(x: Any, gate: Any, weight: Any, **keywords: Any) -> Any:
        y = right(x, gate, weight, **keywords)
        weight.data[-1] = -weight.data[-1]
        return y

    return wrong


@register("inputs", "segment_attention")
def last_boundary_moved_to_the_end(right: Function) -> Function:
    def wrong(q: Any, k: Any, v: Any, cu_seqlens: Any, **keywords: Any) -> Any:
        out = right(q, k, v, cu_seqlens, **keywords)
        cu_seqlens.data[-1] = len(q)
        return out

    return wrong


@register("inputs", "gdn_decode", cases=("indices_int32-h2-hv4",))
def missing_slots_renumbered_in_the_indices(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        out = right(*args, **keywords)
        keywords["state_indices"].data.clamp_(min=0)
        return out

    return wrong


@register("inputs", "gated_rms_norm")
def an_input_that_needs_a_gradient_afterwards(right: Function) -> Function:
    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        y = right(x, *args, **keywords)
        x.requires_grad_()
        return y

    return wrong


@register("inputs", "gated_rms_norm", "gdn_post_conv")
def an_input_of_another_shape_afterwards(right: Function) -> Function:
    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        y = right(x, *args, **keywords)
        x.unsqueeze_(0)
        return y

    return wrong


@register("inputs", "gdn_post_conv", backend="numpy")
def decay_rates_exponentiated_in_place(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        found = right(*args, **keywords)
        rates = by_name("gdn_post_conv", args, keywords)["A_log"]
        rates[...] = np.exp(rates)
        return found

    return wrong


@register("strides", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "segment_attention", "gdn_in_proj")
def row_stride_ignored(right: Function) -> Function:
    """Rows are taken to lie right behind one another if their elements do."""

    def read(x: Any) -> Any:
        strided = x.dim() > 1 and x.stride(-1) == 1 and not x.is_contiguous() and all(x.stride())
        return x.as_strided(x.shape, x.new_empty(x.shape).stride()) if strided else x

    return arguments_changed(read)(right)


@register("strides", "gated_rms_norm", "gdn_conv_prep")
def last_stride_ignored(right: Function) -> Function:
    def read(x: Any) -> Any:
        apart = x.dim() > 1 and x.stride(-1) > 1 and x.shape[-1] > 1
        return x.as_strided(x.shape, (*x.stride()[:-1], 1)) if apart else x

    return arguments_changed(read)(right)


@register("strides", "gated_rms_norm", "pos_embed_interpolate", "gdn_in_proj")
def expanded_rows_misread(right: Function) -> Function:
    def read(x: Any) -> Any:
        return x.roll(1, -1) if x.dim() > 1 and x.stride(0) == 0 and len(x) > 1 else x

    return arguments_changed(read)(right)


@register("strides", "gated_rms_norm")
def gate_read_with_the_strides_of_x(right: Function) -> Function:
    def wrong(x: Any, gate: Any, weight: Any, **keywords: Any) -> Any:
        last = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
        fits = gate.storage_offset() + last < gate.untyped_storage().nbytes() // gate.element_size()
        return right(x, gate.as_strided(gate.shape, x.stride()) if fits else gate, weight, **keywords)

    return wrong


@register("strides", "segment_attention")
def stride_of_the_boundaries_ignored(right: Function) -> Function:
    def wrong(q: Any, k: Any, v: Any, cu_seqlens: Any, **keywords: Any) -> Any:
        return right(q, k, v, cu_seqlens.as_strided(cu_seqlens.shape, (1,)).clamp(0, len(q)), **keywords)

    return wrong


@register("strides", "gdn_decode")
def strided_pool_updated_in_a_copy(right: Function) -> Function:
    """A state that is not contiguous is made so, and the copy is what is updated."""

    def wrong(*args: Any, **keywords: Any) -> Any:
        given = list(args)
        given[8:10] = [state.contiguous() for state in args[8:10]]
        return right(*given, **keywords)

    return wrong


@register("strides", "gdn_post_conv", backend="numpy")
def rows_in_the_order_of_memory(right: Function) -> Function:
    def wrong(conv_out: Any, *args: Any, **keywords: Any) -> Any:
        return right(conv_out.ravel(order="K").reshape(conv_out.shape), *args, **keywords)

    return wrong
