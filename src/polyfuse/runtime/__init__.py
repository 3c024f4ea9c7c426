"""What makes the kernels pay in real models: parallel streams, and encoders in graphs."""

from polyfuse._projections import stack_weights
from polyfuse._streams import StreamModule, execute_in_parallel, register_stream_module
from polyfuse.runtime.capture import EagerReplay, GraphRuntime, register_graph_runtime
from polyfuse.runtime.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder import EncoderGraphManager, EncoderStats
from polyfuse.runtime.planner import plan_packing, suggest_budgets
from polyfuse.runtime.protocol import BufferSpec, Capacity, EncoderRequest, GraphableEncoder, ItemSize, Rows

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
    "Rows",
    "StreamModule",
    "execute_in_parallel",
    "plan_packing",
    "register_graph_runtime",
    "register_stream_module",
    "stack_weights",
    "suggest_budgets",
]
