"""What makes the kernels pay in real models: parallel streams, and encoders in graphs."""

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
    "Watch",
    "choose_projection_strategy",
    "execute_in_parallel",
    "plan_packing",
    "register_graph_runtime",
    "register_stream_module",
    "stack_weights",
    "suggest_budgets",
]
