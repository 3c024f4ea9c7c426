"""Whether what an encoder gives for an item depends on the padding beside it: `reads_padding`."""

import torch

from polyfuse.runtime.encoder.buffers import Specs, Tensors, load
from polyfuse.runtime.encoder.forward import forward
from polyfuse.runtime.encoder.protocol import Capacity, GraphableEncoder

PADDINGS = (0.0, 1e4, float("nan"))


def reads_padding(encoder: GraphableEncoder, inputs: Tensors, specs: Specs, capacity: Capacity) -> str | None:
    """The name of an output whose rows of items change with the rows beside them; "" if there is none.

    The same items, half as many tokens as `capacity` has, are computed beside each of `PADDINGS` in `inputs`, buffers
    of that capacity, and what they give is compared to the bit. A module that scales or normalises by all rows is found
    so. None if a single item fills the buffers: then there is no padding to try.
    """
    half = capacity.tokens // 2 // encoder.token_multiple * encoder.token_multiple
    if not half:
        return None
    example = encoder.example(half)
    count = min(len(example.sizes), capacity.items, capacity.frames)
    used = sum(size.tokens for size in example.sizes[:count])
    first: Tensors = {}
    for padding in PADDINGS:
        load(inputs, specs, example, range(count))
        for name, buffer in inputs.items():
            if buffer.is_floating_point() and not specs[name].zero:
                rows = specs[name].rows.of(used, count)
                buffer[:rows].uniform_(-1, 1, generator=torch.Generator(buffer.device).manual_seed(0))
                buffer[rows:].fill_(padding)
        computed = forward(encoder, inputs, capacity)
        valid = {name: _bits(computed[name], spec.rows.of(used, count)) for name, spec in encoder.outputs.items()}
        first = first or valid
        for name, bits in valid.items():
            if not torch.equal(bits, first[name]):
                return name
    return ""


def _bits(values: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of the first rows as bytes, in which NaN equals itself."""
    return values[:rows].clone(memory_format=torch.contiguous_format).view(torch.uint8)
