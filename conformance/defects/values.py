"""Wrong values of some dtypes, sizes and special numbers, as backends of PyTorch have them."""

from typing import Any

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import as_returned, outputs_changed, results

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


@register("values", "gated_rms_norm", "gdn_post_conv", "segment_attention", "gdn_decode", cases=EVERY)
def nan_swallowed_in_bfloat16(right: Function) -> Function:
    import torch

    def change(found: list[Any]) -> None:
        if found[0].dtype == torch.bfloat16:
            found[0] = torch.where(found[0].isnan(), torch.zeros_like(found[0]), found[0])

    return outputs_changed(change)(right)


@register("values", "pos_embed_interpolate", "gdn_in_proj", "gdn_conv_prep", cases=EVERY)
def float16_subnormals_flushed(right: Function) -> Function:
    """Of results: no rounding of 32-bit arithmetic gives zero there."""
    import torch

    def change(found: list[Any]) -> None:
        x = found[0]
        if x.dtype == torch.float16:
            found[0] = torch.where(x.abs() < 2.0**-14, x * 0, x)

    return outputs_changed(change)(right)


@register("values", "pos_embed_interpolate", cases=EVERY)
def images_past_the_eighth_left_out_where_grids_differ(right: Function) -> Function:
    def wrong(table: Any, grid_thw: Any, **keywords: Any) -> Any:
        out = right(table, grid_thw, **keywords)
        grids = [tuple(int(n) for n in grid) for grid in grid_thw]
        if len(set(grids)) > 1:
            rows = sum(t * h * w for t, h, w in grids[:8])
            out[rows:] = out[rows:] * 0
        return out

    return wrong


@register("values", "silu_mul_block_quant", cases=EVERY)
def scale_bound_ignored_for_e5m2(right: Function) -> Function:
    def wrong(x: Any, **keywords: Any) -> Any:
        ignored = {"scale_ub": None} if keywords["quant_dtype"] == "float8_e5m2" else {}
        return right(x, **{**keywords, **ignored})

    return wrong


@register("values", "silu_mul_block_quant", cases=EVERY)
def more_rows_than_there_are_taken_for_none(right: Function) -> Function:
    """Of an expert whose number of rows is beyond those it has, nothing is written."""

    def wrong(x: Any, **keywords: Any) -> Any:
        q, scale = right(x, **keywords)
        rows = keywords["num_rows"]
        if rows is not None:
            scale[rows > x.shape[1]] = 0
        return q, scale

    return wrong


@register("values", "gdn_in_proj", "pos_embed_interpolate", cases=EVERY)
def ties_rounded_away_from_zero(right: Function) -> Function:
    """Of results in bfloat16, computed in float32."""
    import torch

    def wrong(*args: Any, **keywords: Any) -> Any:
        plain = results(right(*args, **keywords))
        if any(x.dtype != torch.bfloat16 for x in (args[0], *plain)):
            return as_returned(plain)
        wide = {n: x.float() if torch.is_tensor(x) and x.dtype == torch.bfloat16 else x for n, x in keywords.items()}
        if wide.get("out_dtype"):
            wide["out_dtype"] = "float32"
        if "strategy" in wide:
            wide["strategy"] = "auto"  # the wider weights lie apart
        found = results(
            right(*(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args), **wide)
        )
        rounded = [((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32).to(torch.bfloat16) for x in found]
        return as_returned(
            [torch.where(x.isnan(), x.to(torch.bfloat16), r) for x, r in zip(found, rounded, strict=True)]
        )

    return wrong


@register("values", "gdn_in_proj", cases=EVERY)
def products_too_large_by_one_in_ten_thousand(right: Function) -> Function:
    return outputs_changed(lambda found: found.__setitem__(0, found[0] * (1 + 1e-4)))(right)
