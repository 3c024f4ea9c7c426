"""Gradients that are claimed, and wrong."""

from typing import Any

from polyfuse.conformance.defects import Function, register
from polyfuse.conformance.defects._planted import as_returned, results

FLOAT32 = ("float32-sigmoid-offset_1.0", "float32-l2norm_True-g_exp_True", "mixed-bilinear-corners", "float32-auto")


def _backward(change: Any, *, of: int = 0) -> Any:
    """A defect: what flows back to the first argument given by position, or another one, is changed."""

    def make(right: Function) -> Function:
        def wrong(*args: Any, **keywords: Any) -> Any:
            import torch

            if not (torch.is_grad_enabled() and args[of].requires_grad):
                return right(*args, **keywords)
            given = list(args)
            given[of] = args[of].view_as(args[of])
            given[of].register_hook(change)
            return right(*given, **keywords)

        return wrong

    return make


def _last_row_dropped(grad: Any) -> Any:
    grad = grad.clone()
    grad[-1] = 0
    return grad


@register("gradients", "gated_rms_norm", "gdn_post_conv", "gdn_in_proj")
def no_gradient_of_the_results(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        return as_returned([x.detach() for x in results(right(*args, **keywords))])

    return wrong


@register("gradients", "gated_rms_norm", "gdn_conv_prep")
def no_gradient_of_the_weight(right: Function) -> Function:
    def wrong(*args: Any, **keywords: Any) -> Any:
        return right(*args[:-1], args[-1].detach(), **keywords)

    return wrong


@register("gradients", "gated_rms_norm", "gdn_post_conv", "pos_embed_interpolate", cases=FLOAT32)
def gradient_two_percent_too_large(right: Function) -> Function:
    return _backward(lambda grad: grad * 1.02)(right)


@register("gradients", "gated_rms_norm", "gdn_in_proj", cases=FLOAT32)
def gradient_of_the_last_row_dropped(right: Function) -> Function:
    return _backward(_last_row_dropped)(right)


@register("gradients", "gdn_post_conv")
def gradient_of_the_decay_of_the_wrong_sign(right: Function) -> Function:
    return _backward(lambda grad: -grad, of=3)(right)


@register("gradients", "gated_rms_norm", backend="jax", cases=("float32-sigmoid-offset_1.0",))
def no_gradient_of_the_gate(right: Function) -> Function:
    import jax

    def wrong(x: Any, gate: Any, weight: Any, **keywords: Any) -> Any:
        return right(x, jax.lax.stop_gradient(gate), weight, **keywords)

    return wrong
