"""Vision encoders in graphs: the manager, its protocol and buffers, and data parallel encoding."""

from polyfuse.runtime.encoder.capture import EagerReplay, GraphRuntime, register_graph_runtime
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.manager import EncoderGraphManager, EncoderStats
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, GraphableEncoder, ItemSize, Rows

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
    "register_graph_runtime",
]
