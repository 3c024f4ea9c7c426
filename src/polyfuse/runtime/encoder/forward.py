"""An encoder's forward outside of graphs: on given buffers, or for a request in buffers of exactly its size."""

from collections.abc import Sequence

import torch

from polyfuse.runtime.encoder.buffers import Tensors, gather
from polyfuse.runtime.encoder.protocol import Capacity, EncoderRequest, GraphableEncoder


def forward(encoder: GraphableEncoder, inputs: Tensors, capacity: Capacity) -> Tensors:
    """The encoder's outputs for input buffers of exactly `capacity`, computed without gradients."""
    # One mode for all calls, whatever the caller's: compiled blocks are specialised on it.
    with torch.inference_mode(False), torch.no_grad():
        return dict(encoder.forward(inputs, capacity))


def exact_forward(encoder: GraphableEncoder, request: EncoderRequest, indices: Sequence[int] | None = None) -> Tensors:
    """The outputs of the named items (default: all), packed in that order, computed uncaptured and without padding."""
    items = range(len(request.sizes)) if indices is None else indices
    sizes = [request.sizes[i] for i in items]
    exact = Capacity(sum(size.tokens for size in sizes), len(sizes), sum(size.frames for size in sizes))
    return forward(encoder, gather(encoder.inputs, request, items, encoder.device), exact)
