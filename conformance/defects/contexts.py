"""Calls that are wrong where they are made from, or that leave the process another one."""

import os
import threading
from typing import Any

import numpy as np

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import outputs_changed
from polyfuse.dispatch._arrays import is_traced


def _behind(leave: Any) -> Any:
    """A defect: `leave()` is called behind each call."""

    def make(right: Function) -> Function:
        def wrong(*args: Any, **keywords: Any) -> Any:
            found = right(*args, **keywords)
            leave()
            return found

        return wrong

    return make


def _wrong_when(condition: Any) -> Any:
    """A defect: the first result is halved where the condition holds."""

    def make(right: Function) -> Function:
        def change(found: list[Any]) -> None:
            if condition():
                found[0] = (found[0].float() / 2).to(found[0].dtype)

        return outputs_changed(change)(right)

    return make


@register("contexts", "gated_rms_norm", "gdn_in_proj")
def grad_mode_left_off(right: Function) -> Function:
    import torch

    return _behind(lambda: torch.set_grad_enabled(False))(right)


@register("contexts", "gdn_post_conv")
def grad_mode_left_on(right: Function) -> Function:
    import torch

    return _behind(lambda: torch.is_inference_mode_enabled() or torch.set_grad_enabled(True))(right)


@register("contexts", "gated_rms_norm", "segment_attention")
def random_state_seeded(right: Function) -> Function:
    import torch

    return _behind(lambda: torch.manual_seed(torch.initial_seed() + 1))(right)


@register("contexts", "silu_mul_block_quant")
def random_state_of_numpy_advanced(right: Function) -> Function:
    return _behind(np.random.rand)(right)


@register("contexts", "gated_delta_rule")
def threads_reduced(right: Function) -> Function:
    import torch

    return _behind(lambda: torch.set_num_threads(torch.get_num_threads() + 1))(right)


@register("contexts", "gdn_conv_prep")
def default_dtype_left_changed(right: Function) -> Function:
    import torch

    return _behind(lambda: torch.set_default_dtype(torch.float32))(right)


@register("contexts", "gdn_decode")
def subnormal_numbers_left_flushed(right: Function) -> Function:
    import torch

    calls = [0]

    def leave() -> None:
        calls[0] += 1
        if calls[0] > 1:  # of the first call nothing is looked at
            torch.set_flush_denormal(calls[0] % 2 == 0)

    return _behind(leave)(right)


@register("contexts", "gdn_in_proj")
def precision_of_products_left_changed(right: Function) -> Function:
    import torch

    def leave() -> None:
        now = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if now == "highest" else "highest")

    return _behind(leave)(right)


@register("contexts", "pos_embed_interpolate")
def environment_changed(right: Function) -> Function:
    return _behind(lambda: os.environ.update(POLYFUSE_DEFECT=os.environ.get("POLYFUSE_DEFECT", "") + "x"))(right)


@register("contexts", "gated_rms_norm", "gdn_post_conv", "gdn_conv_prep", "segment_attention")
def wrong_in_inference_mode(right: Function) -> Function:
    import torch

    return _wrong_when(torch.is_inference_mode_enabled)(right)


@register("contexts", "silu_mul_block_quant", "gdn_decode")
def wrong_without_gradients(right: Function) -> Function:
    import torch

    return _wrong_when(lambda: not torch.is_grad_enabled() and not torch.is_inference_mode_enabled())(right)


@register("contexts", "gated_delta_rule")
def raises_with_deterministic_algorithms(right: Function) -> Function:
    import torch

    def wrong(*args: Any, **keywords: Any) -> Any:
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("there is no deterministic form")
        return right(*args, **keywords)

    return wrong


@register("contexts", "gated_rms_norm", cases=("float32-sigmoid-offset_1.0",))
def sums_in_the_default_dtype(right: Function) -> Function:
    import torch

    def change(found: list[Any]) -> None:
        found[0] = (torch.zeros(found[0].shape) + found[0]).to(torch.get_default_dtype()).to(found[0].dtype)

    return outputs_changed(change)(right)


@register("contexts", "gated_rms_norm", backend="jax")
def wrong_under_jit(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        y = right(*args, **keywords)
        return y / 2 if is_traced(y) else y

    return wrong


@register("contexts", "gated_rms_norm", backend="numpy")
def random_state_seeded_anew(right: Function) -> Function:
    return _behind(lambda: np.random.seed(np.random.randint(2**31)))(right)


@register("processes", "gated_rms_norm", "silu_mul_block_quant", "gdn_post_conv", "gdn_decode")
def wrong_outside_of_the_first_thread(right: Function) -> Function:
    return _wrong_when(lambda: threading.current_thread() is not threading.main_thread())(right)


@register("processes", "gated_rms_norm", "gdn_in_proj", "gdn_conv_prep")
def wrong_after_a_fork(right: Function) -> Function:
    process = os.getpid()
    return _wrong_when(lambda: os.getpid() != process)(right)


@register("processes", "segment_attention")
def raises_after_a_fork(right: Function) -> Function:
    process = os.getpid()

    def wrong(*args: Any, **keywords: Any) -> Any:
        if os.getpid() != process:
            raise OSError("the device is another process's")
        return right(*args, **keywords)

    return wrong


@register("processes", "pos_embed_interpolate")
def dies_after_a_fork(right: Function) -> Function:
    process = os.getpid()

    def wrong(*args: Any, **keywords: Any) -> Any:
        if os.getpid() != process:
            os._exit(0)
        return right(*args, **keywords)

    return wrong


@register("processes", "gated_delta_rule")
def table_of_the_first_thread(right: Function) -> Function:
    """What is prepared once is prepared for the thread that calls first."""
    kept = threading.local()
    kept.factor = 1.0

    def wrong(*args: Any, **keywords: Any) -> Any:
        found = right(*args, **keywords)
        return found if kept.factor == 1.0 else None

    return wrong
