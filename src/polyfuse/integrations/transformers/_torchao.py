"""What torchao's MX and NVFP4 weights ask of an activation, and that activation as the tensor which their GEMM takes.

torchao quantises the activation in the call of a linear layer, unless it is given one that is quantised already: then
it multiplies that, as it would its own. So the GEMM is torchao's in any case. The class of a weight is told by its
name, so that torchao is not imported for models that do not use it.
"""

from typing import Any

import torch
from torch import nn

from polyfuse.integrations.transformers._plain import class_name, odd_call
from polyfuse.runtime.quantized.activation import QuantizedActivation, QuantizedFormat
from polyfuse.spec.block_quant import FLOAT4

MX = "torchao.prototype.mx_formats.mx_tensor.MXTensor"
NVFP4 = "torchao.prototype.mx_formats.nvfp4_tensor.NVFP4Tensor"
# What the constructor of each takes, in its order: other versions of torchao may have others.
_FIELDS = {
    MX: "qdata scale elem_dtype block_size orig_dtype kernel_preference act_quant_kwargs is_swizzled_scales",
    NVFP4: "qdata scale block_size orig_dtype per_tensor_scale act_per_tensor_scale is_swizzled_scales "
    "use_triton_kernel act_quant_kwargs",
}
_MX_DTYPES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float4_e2m1fn_x2: FLOAT4}
_NVFP4_FORMAT = QuantizedFormat(16, FLOAT4, "e4m3", "swizzled_128x4")
LARGEST = 6.0 * 448.0  # a number of NVFP4, without its factor of the whole tensor
BLACKWELL = (10, 0)  # the least compute capability with scaled GEMMs of these formats


def is_torchao(weight: Any) -> bool:
    """Whether a weight is one of torchao's MX or NVFP4 tensors."""
    return class_name(type(weight)) in _FIELDS


def is_nvfp4(weight: Any) -> bool:
    return class_name(type(weight)) == NVFP4


def gemm_of(weight: Any) -> str:
    """What torchao multiplies by this weight on the device where it is; "" if that device has no such GEMM."""
    if not is_nvfp4(weight) and _preference(weight) == "EMULATED":
        return "torchao's emulated GEMM"
    device = weight.device
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < BLACKWELL:
        return ""
    return "torchao's scaled GEMM"


def odd_linear(linear: Any) -> str:
    """What keeps a linear layer from taking an activation quantised as `format_of` its weight says; "" for nothing."""
    if found := odd_call(linear, nn.Linear):
        return found
    if linear.bias is not None:
        return "has a bias"
    weight = linear.weight
    if not is_torchao(weight):
        return f"has a weight that is a {class_name(type(weight))}"
    if _fields(type(weight)) != set(_FIELDS[class_name(type(weight))].split()):
        return "is of another version of torchao than that tested"
    if type(weight.qdata) is not torch.Tensor or weight.ndim != 2:
        return "has a sharded weight, or several"
    if weight.act_quant_kwargs is None:
        return "has its weight alone quantised"
    if weight.orig_dtype != torch.bfloat16:
        return f"is for activations of {weight.orig_dtype}"
    return _odd_nvfp4(weight) if is_nvfp4(weight) else _odd_mx(weight)


def format_of(weight: Any) -> QuantizedFormat:
    """How a weight wants its activation quantised."""
    if is_nvfp4(weight):
        return _NVFP4_FORMAT
    return QuantizedFormat(32, _MX_DTYPES[weight.elem_dtype], "ue8m0", "swizzled_128x4")


def has_scale_of_all(weight: Any) -> bool:
    """Whether the scales of an activation depend on the largest number in all of it."""
    return is_nvfp4(weight) and weight.act_quant_kwargs.use_dynamic_per_tensor_scale


def global_scale(weight: Any, x: torch.Tensor) -> torch.Tensor | None:
    """NVFP4's factor of all of an activation x: the weight's, or that of the largest number in x, or none."""
    if has_scale_of_all(weight):
        return x.abs().amax().float() / LARGEST
    return weight.act_per_tensor_scale if is_nvfp4(weight) else None


def product(activation: QuantizedActivation, weight: Any) -> torch.Tensor:
    """An activation [M, K] in the weight's format times the transpose of the weight [N, K], by torchao."""
    scales = activation.scales.view(len(activation.scales) // 4, -1)  # as torchao shapes the same bytes
    if is_nvfp4(weight):
        fields = (16, weight.orig_dtype, activation.global_scale, None, True, weight.use_triton_kernel, None)
    else:
        scales = scales.view(torch.float8_e8m0fnu)
        fields = (weight.elem_dtype, 32, weight.orig_dtype, weight.kernel_preference, None, True)
    return nn.functional.linear(type(weight)(activation.values, scales, *fields), weight)


def _fields(cls: Any) -> set[str]:
    names = ("tensor_data_names", "tensor_attribute_names")
    optional = ("optional_tensor_data_names", "optional_tensor_attribute_names")
    return {field for name in (*names, *optional) for field in getattr(cls, name, ())}


def _preference(weight: Any) -> str:
    """The name of the GEMM that an MX weight asks for; "" for none."""
    return getattr(getattr(weight, "kernel_preference", None), "name", "")


def _odd_mx(weight: Any) -> str:
    asked = weight.act_quant_kwargs
    if weight.block_size != 32 or asked.block_size != 32:
        return f"has blocks of {asked.block_size}"
    if weight.elem_dtype not in _MX_DTYPES or asked.elem_dtype != weight.elem_dtype:
        return f"is for activations of {asked.elem_dtype}"
    if asked.scaling_mode.name != "RCEIL":
        return f"has scales of mode {asked.scaling_mode.name}, and only RCEIL is that of the op"
    if asked.kernel_preference != weight.kernel_preference or _preference(weight) not in ("AUTO", "EMULATED"):
        return f"prefers the GEMM {_preference(weight)}"
    return ""


def _odd_nvfp4(weight: Any) -> str:
    if weight.block_size != 16 or weight.act_quant_kwargs.block_size != 16:
        return f"has blocks of {weight.act_quant_kwargs.block_size}"
    scale = weight.act_per_tensor_scale
    if not has_scale_of_all(weight) and scale is not None and (scale.dtype != torch.float32 or scale.ndim):
        return f"has a scale of its activations that is {scale.dtype} {list(scale.shape)}"
    return ""
