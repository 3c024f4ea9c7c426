"""The MLPs of Transformers' FP8 models on `silu_mul_block_quant` and a GEMM that takes quantised input."""

import threading
from functools import cache
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.functional import ScalingType, pad, scaled_mm

import polyfuse
from polyfuse._torch.projections import as_one_weight
from polyfuse.spec import FLOATS

# By class name, so that no model's code is imported that is not used.
FP8_LINEAR = "transformers.integrations.finegrained_fp8.FP8Linear"
SILU = ("SiLU", "SiLUActivation")


def _formulas() -> set[str]:
    """What an MLP's `forward` may compute, as `_formula` writes it: the factors of the product in either order."""
    halves = "chunk(gate_up_proj(x), 2, dim=-1)"
    two_projections = ("silu(gate_proj(x))", "up_proj(x)")
    one_for_both_halves = (f"silu(getitem({halves}, 0))", f"getitem({halves}, 1)")
    formulas = set()
    for activated_gate, up in (two_projections, one_for_both_halves):
        formulas.add(f"down_proj(mul({activated_gate}, {up}))")
        formulas.add(f"down_proj(mul({up}, {activated_gate}))")
    return formulas


FORMULAS = _formulas()

BLOCK = 128  # rows and columns of a weight, and columns of an activation, that share a scale
ALIGNED = 4  # cuBLASLt takes multiples of this many rows, and of this many blocks along K

Pair = tuple[torch.Tensor, torch.Tensor]

# Of each MLP, by where its weights were at its last use: those of gate and up as one. No copy or pickle takes it along.
_gate_up: WeakKeyDictionary[nn.Module, tuple[list[Any], Pair | None]] = WeakKeyDictionary()
_joining = threading.Lock()


def fp8_mlps(model: nn.Module) -> list[nn.Module]:
    """Every MLP in a model, itself included, that `fuse` fits or has already patched.

    Not the name of its class tells, but what its `forward` computes: traced, it is one of `FORMULAS`. Every projection
    is an FP8Linear with blocks of 128 x 128, float32 scales, dynamic activation scales and no bias. What has another
    `forward` put in its place, or has a child with one or with hooks, is left out.
    """
    return [module for module in model.modules() if is_fused(module) or _fits(module)]


def is_fused(module: nn.Module) -> bool:
    """Whether `forward` stands in for a module's own."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


def fuse(module: nn.Module) -> None:
    """Put `forward` in the place of an MLP's own. Copies of the module keep it, pickles have their own."""
    # A method, because torch.compile compiles modules anew whose `forward` is an object of their own.
    module.forward = MethodType(forward, module)


def release(module: Any) -> None:
    """Undo `fuse`. The weights of gate and up stay in one buffer."""
    del module.forward
    _gate_up.pop(module, None)


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of an MLP with FP8 weights: one kernel between its two GEMMs where it infers.

    - Gate and up are one call of the model's own FP8 linear function, with both weights as one. At the first use they
      are moved into one buffer, of which the parameters, still the same objects, are then views; likewise after they
      were replaced or moved.
    - SiLU, product and quantisation are one kernel that rounds where the separate ones do: its result is theirs, bit
      for bit, if theirs divides with correct rounding.
    - Down takes its input quantised, in `block_scaled_mm`: in bfloat16 on Hopper with CUDA 12.9 or later, and on a CPU.
      It sums in an order of its own, so the last bits may differ where the model's function is another GEMM.

    On other devices, under grad, in training and under `torch.compile` the class's own `forward` runs.
    """
    if len(args) == 1 and not kwargs and _infers(module, args[0]) and (gate_up := _weights(module, args[0])):
        return _fused(module, args[0], *gate_up)
    return type(module).forward(module, *args, **kwargs)


def block_scaled_mm(
    q: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`q` [M, K] times the transpose of `weight` [N, K], both float8_e4m3fn, as `dtype` [M, N].

    `scale` [M, K / 128], column-major, and `weight_scale` [N / 128, K / 128] are float32. Each block along K is a
    float32 sum of products, times the two scales, and the blocks are summed up in float32. On a CPU a block's sum is
    exact before it is rounded; elsewhere it is `scaled_mm`, with M a multiple of 4.
    """
    if q.device.type != "cpu":
        missing = -weight_scale.shape[1] % ALIGNED
        blocks = (pad(weight_scale, (0, missing)) if missing else weight_scale).t()
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        return scaled_mm(q, weight.t(), scale, recipes[0], blocks, recipes[1], output_dtype=dtype)
    columns = weight_scale.repeat_interleave(BLOCK, dim=0)  # [N, K / 128]
    total = scale.new_zeros(len(q), len(weight))
    for block, (part, weight_part) in enumerate(zip(q.split(BLOCK, dim=1), weight.split(BLOCK, dim=1), strict=True)):
        products = (part.double() @ weight_part.double().t()).float()  # float64 holds any sum of 128 exactly
        total += products * scale[:, block, None] * columns[:, block]
    return total.to(dtype)


def _infers(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call is inference that the fused path covers, on a device that has its GEMM."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training or not x.numel():
        return False
    return _has_gemm(x.device, x.dtype) and not _is_observed(module)


def _weights(module: nn.Module, x: torch.Tensor) -> Pair | None:
    """The weight and scales of gate and up as one, or None if the projections cannot be fused as they are now."""
    linears = _projections(module)
    places = _places(linears)
    found, gate_up = _gate_up.get(module, ([], None))
    if places == found:
        return gate_up
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # a copy of the weights would be empty until the graph runs
    with _joining:
        gate_up = _joined(linears)
        _gate_up[module] = _places(linears), gate_up
    return gate_up


def _fused(module: nn.Module, x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """The MLP's result for x [..., K], in its dtype, with the weight and scales of gate and up as one."""
    from transformers.integrations import finegrained_fp8

    first, *_, down = _projections(module)
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count % ALIGNED:
        rows = pad(rows, (0, 0, 0, -count % ALIGNED))
    gate_up = finegrained_fp8.fp8_linear(
        rows, weight, weight_scale, block_size=first.block_size, allow_deepgemm=not first._deepgemm_disabled
    )
    q, scale = polyfuse.silu_mul_block_quant(
        gate_up, group_size=BLOCK, scale_layout="col_major", scale_min=0.0, materialize=True
    )
    out = block_scaled_mm(q, scale, down.weight, down.weight_scale_inv, x.dtype)
    return out[:count].view(*x.shape[:-1], -1)


def _has_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `block_scaled_mm` gives results of this dtype there."""
    if device.type == "cpu":
        return str(dtype).removeprefix("torch.") in FLOATS
    return device.type == "cuda" and dtype == torch.bfloat16 and _has_scaled_mm(device)


@cache
def _has_scaled_mm(device: torch.device) -> bool:
    """Whether PyTorch multiplies 1 x 128 by 128 x 128 blocks there."""
    version = tuple(map(int, (torch.version.cuda or "0").split(".")[:2]))  # none on ROCm
    return version >= (12, 9) and torch.cuda.get_device_capability(device)[0] == 9


def _fits(module: nn.Module) -> bool:
    """Whether a module is an MLP that `forward` can stand in for, as `fp8_mlps` says."""
    linears = _projections(module)
    if not linears or _is_observed(module):
        return False
    if getattr(module.forward, "__func__", None) is not type(module).forward:  # an unpickled module holds its own
        return False
    return all(map(_is_block_fp8, linears)) and _formula(module) in FORMULAS


def _projections(module: nn.Module) -> list[Any]:
    """Gate, up and down, or both halves and down; nothing if there are no such children."""
    children = module._modules
    first = ["gate_up_proj"] if "gate_up_proj" in children else ["gate_proj", "up_proj"]
    names = [*first, "down_proj"]
    return [children[name] for name in names] if all(name in children for name in names) else []


def _is_block_fp8(linear: Any) -> bool:
    """Whether a projection is an FP8Linear with blocks, scales and sizes that `block_scaled_mm` takes."""
    if f"{type(linear).__module__}.{type(linear).__qualname__}" != FP8_LINEAR:
        return False
    return (
        linear.block_size is not None
        and tuple(linear.block_size) == (BLOCK, BLOCK)
        and linear.activation_scheme == "dynamic"
        and linear.bias is None
        and linear.weight.dtype == torch.float8_e4m3fn
        and linear.weight_scale_inv.dtype == torch.float32
        and not any(size % BLOCK for size in linear.weight.shape)
    )


def _is_observed(module: nn.Module) -> bool:
    """Whether a child would miss a call: it has hooks, or another `forward` put in its place."""
    return any(c._forward_hooks or c._forward_pre_hooks or "forward" in vars(c) for c in module.children())


def _places(linears: list[Any]) -> list[Any]:
    """What tells whether projections or their weights were replaced or moved."""
    return [(linear, *(p.data_ptr() for p in linear._parameters.values() if p is not None)) for linear in linears]


def _joined(linears: list[Any]) -> Pair | None:
    """The weights and scales of all projections but the last as one; None if they are not such as can be joined."""
    *first, _ = linears
    if not all(map(_is_block_fp8, linears)) or first[0].weight.is_inference():
        return None
    return _as_one([linear.weight for linear in first]), _as_one([linear.weight_scale_inv for linear in first])


def _as_one(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of which the parts are views, moved into a new one if they are not yet."""
    whole = parts[0].detach() if len(parts) == 1 else as_one_weight(*parts)
    if whole is None:
        with torch.inference_mode(False), torch.no_grad():
            whole = torch.cat(parts)
            for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = view
    return whole


class _Tracer(fx.Tracer):
    """Traces a module's own `forward` alone, its children as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _formula(module: nn.Module) -> str | None:
    """What a `forward(x)` computes, with SiLU as `silu` and other children by name.

    None if it branches, or takes other arguments.
    """
    try:
        graph = _Tracer().trace(module)
    except (TraceError, TypeError):
        return None
    (output,) = graph.find_nodes(op="output")
    return _written(output.args[0], module) if len(graph.find_nodes(op="placeholder")) == 1 else None


def _written(node: Any, module: nn.Module) -> str:
    """The expression that a node of a traced `forward` computes."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op == "placeholder":
        return "x"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if node.op == "call_module" and type(module.get_submodule(name)).__name__ in SILU:
        name = "silu"
    arguments = [_written(value, module) for value in node.args]
    arguments += [f"{key}={_written(value, module)}" for key, value in node.kwargs.items()]
    return f"{name}({', '.join(arguments)})"
