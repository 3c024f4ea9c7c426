"""Compares what the ops launch with what Triton would launch, for calls that differ in one argument.

To be run in a process of its own, which does not interpret kernels.

Nothing is compiled and nothing runs: a driver for a Hopper GPU stands in, and a compiled kernel is an empty object.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import triton.compiler  # before polyfuse, which chooses the interpreter where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class Compiled:
    """What one compilation gives."""

    function = packed_metadata = None

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def launch_metadata(self, *arguments: Any) -> None: ...

    def run(self, *arguments: Any) -> None: ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


triton.compiler.compile = Compiled
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)

import torch  # noqa: E402

from polyfuse._torch.projections import Projection  # noqa: E402
from polyfuse.triton_impl import _launch  # noqa: E402
from polyfuse.triton_impl.block_quant import block_quant  # noqa: E402
from polyfuse.triton_impl.gated_delta_rule import gated_delta_rule  # noqa: E402
from polyfuse.triton_impl.gated_rms_norm import gated_rms_norm  # noqa: E402
from polyfuse.triton_impl.gdn_conv_prep import gdn_conv_prep  # noqa: E402
from polyfuse.triton_impl.gdn_decode import gdn_decode  # noqa: E402
from polyfuse.triton_impl.gdn_in_proj import fused  # noqa: E402
from polyfuse.triton_impl.gdn_post_conv import gdn_post_conv  # noqa: E402
from polyfuse.triton_impl.pos_embed_interpolate import pos_embed_interpolate  # noqa: E402
from polyfuse.triton_impl.rms_norm_block_quant import rms_norm_block_quant  # noqa: E402
from polyfuse.triton_impl.segment_attention import segment_attention  # noqa: E402
from polyfuse.triton_impl.silu_mul_block_quant import silu_mul_block_quant  # noqa: E402

Way = Callable[[torch.Tensor], torch.Tensor]

seen: list[tuple[str, int]] = []  # how each launch was made, and which compiled kernel it reached
launch = _launch.Launch.__call__


def compared(self: _launch.Launch, grid: tuple[int, int, int], *arguments: Any) -> None:
    how = "jit" if self.compiled is None else "compiled"
    launch(self, grid, *arguments)
    expected = self.kernel.run(*arguments, grid=grid, warmup=True, **self.options)
    if self.compiled is not expected:
        described = [getattr(x, "shape", x) for x in arguments]
        raise SystemExit(f"{self.op}: {how}: another kernel than Triton's for {described}")
    seen.append((how, id(expected)))


_launch.ONLY_DTYPE_AND_ALIGNMENT = True
_launch.STARTED_DIRECTLY = False
_launch.current_device_index = lambda: None  # type: ignore[assignment]
_launch._on_device = lambda op, device: nullcontext()
_launch.Launch.__call__ = compared  # type: ignore[method-assign]


def vary(op: Callable[..., Any], call: dict[str, Any], ways: dict[str, Sequence[Way]], **values: list[Any]) -> None:
    """Call `op` with each argument in each of some ways or values, and then all of that again.

    Prints the op, the number of kernels and that of calls.
    """
    calls = [call, *(call | {name: way(call[name])} for name, some in ways.items() for way in some)]
    calls += [call | {name: value} for name, some in values.items() for value in some]
    seen.clear()
    for arguments in [*calls, *calls]:
        op(**arguments)
    again = [how for how, _ in seen[len(seen) // 2 :]]
    if set(again) != {"compiled"}:
        raise SystemExit(f"{op.__name__}: the same calls again were made by {again}")
    print(op.__name__, len({kernel for _, kernel in seen}), len(calls))


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def shifted(x: torch.Tensor) -> torch.Tensor:
    """It begins at no multiple of 16 bytes."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Its elements are apart."""
    return torch.zeros(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)[..., ::3]


def turned(x: torch.Tensor) -> torch.Tensor:
    """Its last dimension but one is contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


vector: tuple[Way, ...] = (torch.Tensor.float, torch.Tensor.half, shifted, spread)
matrix: tuple[Way, ...] = (*vector, turned)
layouts: tuple[Way, ...] = (shifted, spread, turned)

count = torch.zeros(4, dtype=torch.int32)
vary(
    silu_mul_block_quant,
    {"x": zeros(4, 6, 512)},
    {"x": matrix},
    num_rows=[count, shifted(count), spread(count)],
    group_size=[64],
    quant_dtype=["int8"],
    scale_format=["ue8m0_packed"],
    scale_layout=["col_major_tma"],
    scale_ub=[1.0],
    scale_min=[0.5],
    limit=[0.5, 7.0],
    materialize=[True],
    reciprocal=[True],
)
vary(
    silu_mul_block_quant,
    {"x": zeros(4, 6, 256), "up": zeros(4, 6, 256)},
    {"x": layouts, "up": layouts},
    num_rows=[count],
    group_size=[64],
)
vary(
    silu_mul_block_quant,
    {"x": zeros(6, 512), "row_weight": zeros(6)},
    {"row_weight": vector},
    group_size=[64],
    alpha=[0.5, 1.7],
    up_offset=[1.0, 2.0],
    interleaved=[True],
    expert_ends=[count, shifted(count)],
)
vary(
    block_quant,
    {"x": zeros(6, 256), "expert_ends": count},
    {"x": matrix, "expert_ends": (shifted, spread)},
    expert_ends=[None],
    group_size=[64],
    quant_dtype=["int8"],
    scale_format=["ue8m0_packed"],
    scale_ub=[1.0],
    reciprocal=[True],
)
vary(
    rms_norm_block_quant,
    {"x": zeros(6, 256), "weight": zeros(256), "residual": zeros(6, 256)},
    {"x": layouts, "weight": vector, "residual": layouts},
    residual=[None],
    group_size=[64],
    eps=[0.5],
    weight_offset=[1.0],
    scale_ub=[1.0],
    expert_ends=[count, shifted(count)],
)
heads = {"num_k_heads": 2, "head_k_dim": 16, "head_v_dim": 16}
gates = {"a": zeros(7, 4), "b": zeros(7, 4), "A_log": zeros(4), "dt_bias": zeros(4)}
gate_ways = {"a": matrix, "b": matrix, "A_log": vector, "dt_bias": vector}
flags: dict[str, list[Any]] = {"l2norm": [False], "l2norm_eps": [1.0], "output_g_exp": [True]}
flags["a"] = [zeros(7, 2, 2), turned(zeros(7, 2, 2)), zeros(7, 2, 4)[..., 2:]]
vary(gdn_post_conv, {"conv_out": zeros(7, 128), **gates, **heads}, {"conv_out": matrix, **gate_ways}, **flags)
vary(
    gdn_conv_prep,
    {
        "x": zeros(7, 128),
        "weight": zeros(128, 4),
        **gates,
        **heads,
        "bias": zeros(128),
        "initial_state": zeros(2, 128, 3),
        "cu_seqlens": torch.tensor([0, 3, 7]),
    },
    {
        "x": matrix,
        "weight": matrix,
        **gate_ways,
        "bias": vector,
        "initial_state": matrix,
        "cu_seqlens": (torch.Tensor.int, shifted, spread),
    },
    bias=[None],
    initial_state=[None],
    output_final_state=[True],
    **flags,
)
slots = torch.arange(7)
vary(
    gdn_decode,
    {
        "x": zeros(7, 128),
        "z": zeros(7, 64),
        **gates,
        **heads,
        "conv_weight": zeros(128, 4),
        "norm_weight": zeros(16),
        "conv_state": zeros(9, 128, 4),
        "recurrent_state": zeros(9, 4, 16, 16).float(),
        "conv_bias": zeros(128),
        "state_indices": slots,
    },
    {
        "x": matrix,
        "z": matrix,
        **gate_ways,
        "conv_weight": matrix,
        "norm_weight": vector,
        "conv_state": matrix,
        "recurrent_state": layouts,
        "conv_bias": vector,
        "state_indices": (torch.Tensor.int, shifted, spread),
    },
    conv_bias=[None],
    state_indices=[None],
    scale=[0.5],
    norm_eps=[0.5],
)
heads_apart: tuple[Way, ...] = (turned, lambda x: zeros(7, 4, 3, 16)[:, 1:, 1:])
vary(
    gated_rms_norm,
    {"x": zeros(7, 3, 2, 16), "gate": zeros(7, 3, 2, 16), "weight": zeros(16)},
    {"x": (*vector, *heads_apart), "gate": (*vector, *heads_apart), "weight": vector},
    eps=[0.5],
    activation=["sigmoid"],
    weight_offset=[1.0],
)
vary(
    gated_delta_rule,
    {
        "q": zeros(70, 2, 16),
        "k": zeros(70, 2, 16),
        "v": zeros(70, 4, 16),
        "g": zeros(70, 4).float(),
        "beta": zeros(70, 4).float(),
        "initial_state": zeros(2, 4, 16, 16).float(),
        "cu_seqlens": torch.tensor([0, 3, 70]),
    },
    {
        **dict.fromkeys(("q", "k", "v", "g", "beta", "initial_state"), layouts),
        "cu_seqlens": (torch.Tensor.int, shifted, spread),
    },
    initial_state=[None],
    cu_seqlens=[None],
    output_final_state=[True],
    scale=[0.5],
)
vary(
    segment_attention,
    {"q": zeros(40, 2, 24), "k": zeros(40, 2, 24), "v": zeros(40, 2, 24), "cu_seqlens": torch.tensor([0, 3, 40])},
    {**dict.fromkeys(("q", "k", "v"), layouts), "cu_seqlens": (torch.Tensor.int, shifted, spread)},
    scale=[0.5],
)
vary(
    pos_embed_interpolate,
    {
        "table": zeros(36, 64),
        "grid_thw": torch.tensor([[1, 4, 4], [2, 2, 2]]),
        "base": zeros(24, 64),
        "out_rows": 24,
    },
    {"table": matrix, "base": matrix, "grid_thw": (torch.Tensor.int, *layouts)},
    grid_thw=[((1, 6, 4),), ((1, 2, 2), (1, 4, 4)), ((1, 4, 4), (1, 2, 2)), ((1, 1, 1),) * 17],
    base=[None],
    out_dtype=["float32"],
    mode=["bicubic"],
    merge_size=[1],
    align_corners=[False],
    table_height=[6, 4],
)


def in_proj(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    wz: torch.Tensor | None,
    wa: torch.Tensor | None,
    b1: torch.Tensor | None,
    b2: torch.Tensor | None,
) -> None:
    fused(x, Projection(w1, wz, b1), Projection(w2, wa, b2))


weights = {"w1": zeros(64, 48), "w2": zeros(8, 48), "wz": zeros(32, 48), "wa": zeros(8, 48)}
vary(
    in_proj,
    {"x": zeros(5, 48), **weights, "b1": zeros(96), "b2": zeros(16)},
    {"x": layouts, **dict.fromkeys(weights, layouts), "b1": (shifted, spread), "b2": (shifted, spread)},
    x=[zeros(1, 48), zeros(16, 48), zeros(70, 48)],
    w1=[zeros(32, 48), zeros(33, 48)],
    wz=[None, zeros(33, 48)],
    wa=[None],
    b1=[None],
    b2=[None],
)
