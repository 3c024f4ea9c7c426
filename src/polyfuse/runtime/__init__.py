"""What makes the kernels pay in real models: parallel streams, encoders in graphs, and quantised activations."""

from polyfuse.spec import not_installed

if missing := not_installed(__name__, "torch"):
    raise missing

from polyfuse._torch.projections import choose as choose_projection_strategy
from polyfuse._torch.projections import stack_weights
from polyfuse._torch.streams import StreamModule, execute_in_parallel, register_stream_module
from polyfuse.runtime.encoder.capture import EagerReplay, GraphRuntime, register_graph_runtime
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, GraphableEncoder, ItemSize, Rows
from polyfuse.runtime.encoder.stats import EncoderStats
from polyfuse.runtime.encoder.watch import Watch
from polyfuse.runtime.packing.planner import plan_packing, suggest_budgets
from polyfuse.runtime.quantized.activation import (
    QuantizedActivation,
    QuantizedFormat,
    block_quantized,
    rms_norm_block_quantized,
    silu_mul_block_quantized,
)
from polyfuse.runtime.quantized.experts import block_scaled_mm_by_expert
from polyfuse.runtime.quantized.gemm import block_scaled_mm

__all__ = [
    "BufferSpec",
    "Capacity",
    "DataParallelEncoder",
    "EagerReplay",
    "EncoderGraphManager",
    "EncoderRequest",
    "EncoderStats",
    "GraphRuntime",
    "GraphableEncoder",
    "ItemSize",
    "QuantizedActivation",
    "QuantizedFormat",
    "Rows",
    "StreamModule",
    "Watch",
    "block_quantized",
    "block_scaled_mm",
    "block_scaled_mm_by_expert",
    "choose_projection_strategy",
    "execute_in_parallel",
    "plan_packing",
    "register_graph_runtime",
    "register_stream_module",
    "rms_norm_block_quantized",
    "silu_mul_block_quantized",
    "stack_weights",
    "suggest_budgets",
]
