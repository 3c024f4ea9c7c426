"""Wrong values of some dtypes, sizes and special numbers, as backends of PyTorch have them."""

from typing import Any

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import outputs_changed

EVERY = ("*",)


@register("values", "gated_rms_norm", "gdn_post_conv", "gdn_in_proj", cases=EVERY)
def nan_swallowed(right: Function) -> Function:
    return outputs_changed(lambda found: found.__setitem__(0, found[0].nan_to_num(0.0)))(right)


@register("values", "gdn_post_conv", cases=EVERY)
def minus_zero_lost(right: Function) -> Function:
    return outputs_changed(lambda found: found.__setitem__(2, found[2] + 0.0))(right)


@register("values", "gated_rms_norm", cases=EVERY)
def float16_overflow_clamped(right: Function) -> Function:
    import torch

    def change(found: list[Any]) -> None:
        if found[0].dtype == torch.float16:
            found[0] = found[0].clamp(-1.0, 1.0)

    return outputs_changed(change)(right)


@register("values", "gated_rms_norm", "segment_attention", "gdn_decode", cases=EVERY)
def truncated_in_place_of_rounded(right: Function) -> Function:
    import torch

    def change(found: list[Any]) -> None:
        if found[0].dtype == torch.float32:
            found[0] = (found[0].view(torch.int32) & -0x1000).view(torch.float32)

    return outputs_changed(change)(right)


@register("values", "gdn_decode", "gdn_conv_prep", cases=EVERY)
def an_element_of_the_last_result_dropped(right: Function) -> Function:
    def change(found: list[Any]) -> None:
        found[-1] = found[-1].clone()
        found[-1].view(-1)[-1:] = 0.5

    return outputs_changed(change)(right)


@register("values", "silu_mul_block_quant", cases=EVERY)
def scales_in_reverse(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        q, scale = right(*args, **keywords)
        return q, scale.flip(-1)

    return wrong


@register("values", "gated_rms_norm", "gdn_post_conv", repeat=2)
def last_element_of_a_large_call_dropped(right: Function) -> Function:
    """Of a case that repeats its rows: each repetition is as wrong as the first."""

    def change(found: list[Any]) -> None:
        rows = len(found[0]) // (2 if len(found[0]) % 2 == 0 else 1)
        found[0] = found[0].clone()
        found[0][rows - 1 :: rows] = 0

    return outputs_changed(change)(right)
