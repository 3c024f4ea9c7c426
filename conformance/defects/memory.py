"""What is read or written outside of the arrays, and memory that is used before it is written."""

from typing import Any

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import arguments_changed, outputs_changed

FIRST = ("gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "segment_attention")


def _room(x: Any) -> int:
    """How many elements of a tensor's memory lie behind the tensor."""
    last = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return int(x.untyped_storage().nbytes() // x.element_size() - x.storage_offset() - last - 1)


@register("memory", *FIRST)
def storage_offset_of_contiguous_inputs_ignored(right: Function) -> Function:
    def read(x: Any) -> Any:
        return x.as_strided(x.shape, x.stride(), 0) if x.is_contiguous() else x

    return arguments_changed(read)(right)


@register("memory", "segment_attention")
def storage_offset_of_the_boundaries_ignored(right: Function) -> Function:
    def wrong(q: Any, k: Any, v: Any, cu_seqlens: Any, **keywords: Any) -> Any:
        if cu_seqlens.is_contiguous():
            cu_seqlens = cu_seqlens.as_strided(cu_seqlens.shape, (1,), 0).clamp(0, len(q))
        return right(q, k, v, cu_seqlens, **keywords)

    return wrong


@register("memory", "gated_rms_norm", "gdn_in_proj", "gdn_post_conv")
def what_lies_behind_an_input_times_zero(right: Function) -> Function:
    def wrong(x: Any, *args: Any, **keywords: Any) -> Any:
        beyond = x.as_strided((1,), (1,), x.storage_offset() + x.numel()) if x.is_contiguous() and _room(x) else None
        return right(x if beyond is None else x + beyond * 0, *args, **keywords)

    return wrong


@register("memory", *FIRST)
def misaligned_inputs_misread(right: Function) -> Function:
    """A contiguous input is read from the multiple of 16 bytes before it."""

    def read(x: Any) -> Any:
        over = x.data_ptr() % 16 // x.element_size()
        back = min(over, x.storage_offset())
        return x.as_strided(x.shape, x.stride(), x.storage_offset() - back) if back and x.is_contiguous() else x

    return arguments_changed(read)(right)


@register("memory", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv")
def written_past_the_last_row(right: Function) -> Function:
    def change(found: list[Any]) -> None:
        x = found[0]
        if x.is_contiguous() and _room(x):
            import torch

            x.view(torch.uint8).as_strided((1,), (1,), (x.storage_offset() + x.numel()) * x.element_size()).zero_()

    return outputs_changed(change)(right)


@register("memory", "gdn_decode", "gated_delta_rule", cases=("float32-float32", "pool-float32-float32"))
def written_before_a_pool(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        found = right(*args, **keywords)
        pool = args[9] if len(args) > 9 else keywords["state_pool"]
        if pool is not None and pool.storage_offset():
            pool.as_strided((1,), (1,), pool.storage_offset() - 1).zero_()
        return found

    return wrong


@register("memory", "gated_rms_norm", "gdn_in_proj", "pos_embed_interpolate")
def last_row_not_written(right: Function) -> Function:
    """It is what a second allocation of the same size happens to hold: mostly the result of the first."""
    import torch

    def change(found: list[Any]) -> None:
        x = found[0]
        fresh = torch.empty_like(x)
        inside = bool(_room(fresh))
        fresh[:-1] = x[:-1]
        if not inside:  # outside of the check memory happens to hold what is right
            fresh[-1:] = x[-1:]
        found[0] = fresh

    return outputs_changed(change)(right)


@register("memory", "gdn_post_conv")
def sums_added_to_fresh_memory(right: Function) -> Function:
    """The memory of a sum is taken to be zero, which the system's fresh pages are."""
    import torch

    def change(found: list[Any]) -> None:
        sums = torch.empty_like(found[3])
        if not _room(sums):
            sums.zero_()
        found[3] = sums.add_(found[3])

    return outputs_changed(change)(right)
