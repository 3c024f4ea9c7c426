"""Vision encoders in graphs: the manager, its protocol and buffers, and data parallel encoding."""

from polyfuse.runtime.encoder.capture import EagerReplay, GraphRuntime, register_graph_runtime
from polyfuse.runtime.encoder.data_parallel import DataParallelEncoder
from polyfuse.runtime.encoder.forward import exact_forward
from polyfuse.runtime.encoder.manager import EncoderGraphManager
from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, GraphableEncoder, ItemSize, Rows
from polyfuse.runtime.encoder.stats import EncoderStats

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
    "exact_forward",
    "register_graph_runtime",
]
