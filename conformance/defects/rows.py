"""Rows whose results depend on what lies beside them, all within the op's error bound."""

from typing import Any

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import outputs_changed


def _last_bit(x: Any, rows: Any) -> Any:
    """The float32 or 16-bit tensor with the last bit of each element of these rows changed."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    changed = x.clone(memory_format=torch.preserve_format)
    changed.view(bits)[rows] ^= 1
    return changed


def _changed_if(condition: Any, rows: Any = slice(None), result: int = 0) -> Any:
    """A defect: the last bits of some rows of a result differ if `condition(number of rows)` holds."""

    def make(right: Function) -> Function:
        def change(found: list[Any]) -> None:
            if condition(len(found[result])):
                found[result] = _last_bit(found[result], rows)

        return outputs_changed(change)(right)

    return make


F32 = ("float32-sigmoid-offset_1.0",)


@register("alone", "gated_rms_norm", cases=F32)
def another_order_from_32_rows_on(right: Function) -> Function:
    return _changed_if(lambda count: count >= 32)(right)


@register("alone", "gated_rms_norm", cases=F32)
def another_order_from_1024_rows_on(right: Function) -> Function:
    return _changed_if(lambda count: count >= 1024)(right)


@register("alone", "silu_mul_block_quant")
def another_order_of_scales_from_100_rows_on(right: Function) -> Function:
    return _changed_if(lambda count: count >= 100, result=1)(right)


@register("alone", "gdn_post_conv", cases=("float32-l2norm_True-g_exp_True",))
def another_order_from_33_rows_on(right: Function) -> Function:
    return _changed_if(lambda count: count > 32)(right)


@register("alone", "gdn_decode", cases=("float32-float32",))
def another_order_of_large_batches(right: Function) -> Function:
    return _changed_if(lambda count: count >= 16)(right)


@register("alone", "gdn_decode", cases=("float32-float32",))
def another_kernel_for_one_sequence(right: Function) -> Function:
    return _changed_if(lambda count: count == 1)(right)


@register("alone", "gated_rms_norm", "gdn_decode", cases=(*F32, "float32-float32"))
def odd_rows_rounded_otherwise(right: Function) -> Function:
    return _changed_if(lambda count: True, slice(1, None, 2))(right)


@register("alone", "gdn_post_conv")
def odd_rows_of_g_rounded_otherwise(right: Function) -> Function:
    return _changed_if(lambda count: True, slice(1, None, 2), result=3)(right)


@register("alone", "gated_rms_norm", cases=F32)
def rows_past_a_multiple_of_4_rounded_otherwise(right: Function) -> Function:
    def change(found: list[Any]) -> None:
        found[0] = _last_bit(found[0], slice(len(found[0]) // 4 * 4, None))

    return outputs_changed(change)(right)


@register("alone", "gdn_conv_prep", cases=("bfloat16-l2norm_True-g_exp_False",))
def another_order_of_many_rows(right: Function) -> Function:
    return _changed_if(lambda count: count >= 64)(right)


@register("alone", "gdn_conv_prep", cases=("width_4-bias-initial_state-int32",))
def rows_of_the_first_sequence_rounded_otherwise(right: Function) -> Function:
    return _changed_if(lambda count: True, slice(0, 2), result=3)(right)


@register("alone", "gated_delta_rule", cases=("bfloat16-packed-int32-initial_state",))
def another_order_of_short_calls(right: Function) -> Function:
    return _changed_if(lambda count: count < 70)(right)


@register("alone", "pos_embed_interpolate", cases=("mixed-bilinear-corners",))
def one_image_rounded_otherwise(right: Function) -> Function:
    def wrong(table: Any, grid_thw: Any, **keywords: Any) -> Any:
        out = right(table, grid_thw, **keywords)
        return _last_bit(out, slice(0, 1)) if len(grid_thw) == 1 else out

    return wrong


@register("alone", "gdn_in_proj", cases=("float32-auto",))
def rows_past_the_thousandth_left_out(right: Function) -> Function:
    def change(found: list[Any]) -> None:
        found[0] = found[0].clone()
        found[0][1000:] = 0

    return outputs_changed(change)(right)


@register("alone", "segment_attention", cases=("float32-segments",))
def segments_past_the_hundredth_left_out(right: Function) -> Function:
    def wrong(q: Any, k: Any, v: Any, cu_seqlens: Any, **keywords: Any) -> Any:
        out = right(q, k, v, cu_seqlens, **keywords)
        if len(cu_seqlens) > 100:
            out = out.clone()
            out[int(cu_seqlens[100]) :] = 0
        return out

    return wrong


@register("repeats", "gated_rms_norm", "gdn_post_conv", "silu_mul_block_quant", repeat=300)
def rows_past_1100_left_out(right: Function) -> Function:
    def change(found: list[Any]) -> None:
        found[0] = found[0].clone()
        found[0][1100:] = 0

    return outputs_changed(change)(right)
