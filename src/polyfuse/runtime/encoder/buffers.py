"""Static buffers of packed rows: allocating and viewing them, and moving items' rows in and out."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch

from polyfuse.runtime.encoder.protocol import BufferSpec, Capacity, EncoderRequest, ItemSize, Rows
from polyfuse.spec import fail

Specs = Mapping[str, BufferSpec]
Tensors = dict[str, torch.Tensor]


def allocate(specs: Specs, tokens: int, items: int, device: torch.device) -> Tensors:
    """Make one uninitialised buffer `[rows, *shape]` for each spec, with the rows of so many tokens and items."""
    shapes = {name: (spec.rows.of(tokens, items), *spec.shape) for name, spec in specs.items()}
    return {name: torch.empty(shapes[name], dtype=spec.dtype, device=device) for name, spec in specs.items()}


def views(buffers: Tensors, specs: Specs, capacity: Capacity) -> Tensors:
    """View the first rows of each buffer, as many as the capacity has."""
    return {name: buffers[name][: spec.rows.of(capacity.tokens, capacity.items)] for name, spec in specs.items()}


def check_request(name: str, specs: Specs, request: EncoderRequest) -> None:
    """Check that a request has items, and every tensor of `specs` with just the rows that the items' sizes say.

    Raises `SpecError` in the name of the encoder `name` if not.
    """
    if not request.sizes:
        fail(name, "request", "at least one item", "none")
    for size in request.sizes:
        if size.tokens < 1 or size.frames < 1:
            fail(name, "request", "items of at least one token and one frame", tuple(size))
    if set(request.tensors) != set(specs):
        fail(name, "request", f"tensors {', '.join(specs)}", ", ".join(request.tensors) or "none")
    tokens = sum(size.tokens for size in request.sizes)
    for key, spec in specs.items():
        shape = (spec.rows.of(tokens, len(request.sizes)), *spec.shape)
        if tuple(request.tensors[key].shape) != shape:
            fail(name, key, f"shape {list(shape)} for these items", list(request.tensors[key].shape))


def load(buffers: Tensors, specs: Specs, request: EncoderRequest, items: Sequence[int]) -> None:
    """Copy the items' rows to the start of every buffer, packed, and zero the rest where the spec says so.

    The items are indices into the request, and their rows are converted to the buffer's dtype and device.
    """
    for name, spec in specs.items():
        source, used = request.tensors[name], 0
        for start, packed, rows in _moves(spec.rows, request.sizes, items):
            piece = source[start : start + rows]
            # From pageable memory the copy is staged at once; a pinned source could change before it is read.
            buffers[name][packed : packed + rows].copy_(piece, non_blocking=not piece.is_pinned())
            used = packed + rows
        if spec.zero:
            buffers[name][used:].zero_()


def gather(specs: Specs, request: EncoderRequest, items: Sequence[int], device: torch.device) -> Tensors:
    """The items' rows alone, one behind another, in the specs' dtypes on the device.

    They are the request's own tensors if the items are all of it in order and nothing has to be converted.
    """
    picked = {}
    for name, spec in specs.items():
        source = request.tensors[name]
        pieces = [source[start : start + rows] for start, _, rows in _moves(spec.rows, request.sizes, items)]
        picked[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(device, spec.dtype)
    return picked


def scatter(
    outputs: Mapping[str, torch.Tensor], results: Tensors, specs: Specs, sizes: Sequence[ItemSize], items: Sequence[int]
) -> None:
    """Copy packed rows of `items` to these items' places in `results`, which hold all items of these sizes."""
    for name, spec in specs.items():
        for start, packed, rows in _moves(spec.rows, sizes, items):
            results[name][start : start + rows].copy_(outputs[name][packed : packed + rows])


def _moves(rows: Rows, sizes: Sequence[ItemSize], items: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Every run of picked items that are neighbours, as (row among all items, row among the picked ones, rows)."""
    starts = [0, *accumulate(rows.of(size.tokens) for size in sizes)]
    packed = first = 0
    for position, item in enumerate(items):
        ends_run = position + 1 == len(items) or items[position + 1] != item + 1
        if ends_run:
            start = starts[items[first]]
            count = starts[item + 1] - start
            yield start, packed, count
            packed, first = packed + count, position + 1
