"""Data-parallel encoding: the items of one request spread over the ranks of a torch.distributed group.

Every rank is given the same request, encodes its share of the items and gets the whole result. The shares follow
from the items' sizes alone, so the only communication of a request is one all-gather of bytes, a row of each rank:

    error: int64 | request: int64 | payload, padded to the largest rank's

`error` is 0, and the payload the outputs of the rank's items one after another, each at a multiple of 16 bytes; or
the rank failed, and the payload's first `error` bytes are the message. `request` is the CRC-32 of the items' sizes.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from heapq import heapreplace
from itertools import groupby
from typing import Any, Protocol
from zlib import crc32

import torch
import torch.distributed as dist

from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, GraphableEncoder, ItemSize
from polyfuse.spec import fail

_ALIGNMENT = 16
_HEADER = 16
_SMALLEST_PAYLOAD = 4096

# PyTorch 2.13 renamed the function and warns of the older name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Manager(Protocol):
    """The part of `EncoderGraphManager` that is used here."""

    encoder: GraphableEncoder

    def run(self, request: EncoderRequest, indices: Sequence[int] | None = None) -> dict[str, torch.Tensor]: ...


def item_cost(size: ItemSize) -> float:
    """The predicted time of an item, in units of one token's linear layers: `tokens * (1 + segment / 1650)`.

    `segment = tokens / frames` is the length over which a token attends. Attention takes as many operations as the
    linear layers at `2*hidden + intermediate` patches, 6608 in Qwen3-VL's tower, which are 1652 tokens. What each
    replay costs at least falls on all ranks alike. No measured time goes in, as it would differ between the ranks.
    """
    return size.tokens * (1 + size.tokens / (size.frames * 1650))


def assign_items(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The indices of the items of each rank, ascending: the costliest item first, each to the least loaded rank.

    Two ranks' loads differ by no more than the largest cost. Equal loads go by rank, and items of equal cost are dealt
    by index, the first of them to the first rank, so that neighbours stay together. Equal arguments give equal
    assignments; a rank may get nothing. Raises `SpecError` for a cost that is negative or not finite, and for less
    than one rank.
    """
    if ranks < 1:
        fail("assign_items", "ranks", "an integer >= 1", ranks)
    for i, cost in enumerate(costs):
        if not 0 <= cost < math.inf:
            fail("assign_items", f"costs[{i}]", "a finite number >= 0", cost)
    loads = [(0.0, rank) for rank in range(ranks)]
    takers: dict[float, list[int]] = {}  # by an item's cost, the ranks that take the items of that cost
    for cost in sorted(costs, reverse=True):
        load, rank = loads[0]
        takers.setdefault(cost, []).append(rank)
        heapreplace(loads, (load + cost, rank))
    dealt = {cost: iter(sorted(of_cost)) for cost, of_cost in takers.items()}
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for i, cost in enumerate(costs):
        assigned[next(dealt[cost])].append(i)
    return assigned


class DataParallelEncoder:
    """Runs each request's items on all ranks of a group, with one all-gather.

    `manager` is this rank's `EncoderGraphManager`, of the same encoder and weights on every rank. `group` (default:
    all ranks) is any torch.distributed group with a backend for the encoder's device. All its ranks must construct
    the encoder together, and call `execute` together with equal arguments, from one thread. One rank runs locally.

    The all-gather runs in a group of its own with a timeout of `timeout_s` seconds, so `group` keeps its own. (The
    ranks of a `group` smaller than the world must be in equally many groups: PyTorch names the new one by that.)
    Graphs captured in a request count: call `manager.capture()` on every rank first. When a rank dies or is
    `timeout_s` late, `execute` raises PyTorch's `RuntimeError` on the others, and this encoder is of no more use.
    With gloo `group` is; with NCCL PyTorch ends the process a minute later (see TORCH_NCCL_ASYNC_ERROR_HANDLING).

    Raises `SpecError` if torch.distributed is not initialised, if this process is not in `group`, or if `timeout_s`
    is not a positive number.
    """

    def __init__(self, manager: _Manager, group: dist.ProcessGroup | None = None, timeout_s: float = 60.0) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            fail("DataParallelEncoder", "group", "torch.distributed to be initialised", group, "init_process_group()")
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            fail("DataParallelEncoder", "group", "a group of this process", "one without it")
        if not 0 < timeout_s < math.inf:
            fail("DataParallelEncoder", "timeout_s", "a finite number of seconds > 0", timeout_s)
        self._manager = manager
        self._timeout = timedelta(seconds=timeout_s)
        members = dist.get_process_group_ranks(group)
        self._ranks = len(members)
        if self._ranks > 1:
            self._group = dist.new_group(
                members,
                timeout=self._timeout,
                backend=dist.get_backend_config(group),
                use_local_synchronization=self._ranks < dist.get_world_size(),
            )

    @torch.no_grad()
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for a call, on every rank: `encoder.result` of all items' outputs in order.

        Runs without gradients, and waits for the device.

        Raises what `encoder.request` raises, before any communication: on every rank, as all have the same input (a
        rank whose input alone is bad is one that is late for the others). Raises `RuntimeError` on every rank if
        encoding fails on some, naming them and their errors, from the rank's own error where there is one; also if
        the items' sizes are not equal on all ranks. After all these the next request can be run.
        """
        encoder = self._manager.encoder
        request = encoder.request(*args, **kwargs)
        outputs = self._manager.run(request) if self._ranks == 1 else self._run(request)
        return encoder.result(outputs, request)

    def _run(self, request: EncoderRequest) -> dict[str, torch.Tensor]:
        """Encode this rank's items, gather those of all ranks, and put them in order."""
        encoder = self._manager.encoder
        assigned = assign_items([item_cost(size) for size in request.sizes], self._ranks)
        spans = [_spans(encoder.outputs, [request.sizes[i] for i in items]) for items in assigned]
        used = max(span.stop for of_rank in spans for span in of_rank.values())
        row_bytes = _HEADER + _aligned(max(_SMALLEST_PAYLOAD, used))
        gathered = torch.empty(self._ranks, row_bytes, dtype=torch.uint8, device=encoder.device)
        row = torch.empty_like(gathered[0])
        header, payload = row[:_HEADER].view(torch.int64), row[_HEADER:]
        header[0], header[1] = 0, crc32(repr(request.sizes).encode())
        error = None
        try:
            if assigned[self._rank]:
                outputs = self._manager.run(request, assigned[self._rank])
                for name, spec in encoder.outputs.items():
                    _rows(payload, spans[self._rank][name], spec).copy_(outputs[name])
        except Exception as caught:
            error = caught
            text = f"{type(error).__name__}: {error}".encode()[: payload.numel()]
            payload[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            header[0] = len(text)
        self._wait(_all_gather(gathered.view(-1), row, group=self._group, async_op=True))
        _raise_failures(gathered, self._rank, error)
        merged = {}
        for name, spec in encoder.outputs.items():
            packed = [_rows(gathered[rank, _HEADER:], spans[rank][name], spec) for rank in range(self._ranks)]
            merged[name] = _in_order(packed, spec, request.sizes, assigned)
        return merged

    def _wait(self, work: dist.Work) -> None:
        """Wait for the all-gather on the host, for NCCL too, whose own wait looks only every millisecond."""
        end = time.monotonic() + self._timeout.total_seconds()
        while not work.is_completed() and time.monotonic() < end:
            time.sleep(2e-5)
        work.wait(self._timeout)


def _in_order(
    packed: Sequence[torch.Tensor], spec: BufferSpec, sizes: Sequence[ItemSize], assigned: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The rows of all items in order, from those of each rank's items one after another."""
    owners = {item: rank for rank, items in enumerate(assigned) for item in items}
    used = [0] * len(packed)
    pieces = []
    for rank, neighbours in groupby(range(len(owners)), owners.__getitem__):
        start = used[rank]
        used[rank] += _count(spec, [sizes[item] for item in neighbours])
        pieces.append(packed[rank][start : used[rank]])
    return torch.cat(pieces)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _count(spec: BufferSpec, sizes: Sequence[ItemSize]) -> int:
    return spec.rows.of(sum(size.tokens for size in sizes), len(sizes))


def _spans(outputs: Mapping[str, BufferSpec], sizes: Sequence[ItemSize]) -> dict[str, slice]:
    """Which bytes of a payload each output takes, for items of these sizes."""
    spans, start = {}, 0
    for name, spec in outputs.items():
        spans[name] = slice(start, start + _count(spec, sizes) * math.prod(spec.shape) * spec.dtype.itemsize)
        start = _aligned(spans[name].stop)
    return spans


def _rows(payload: torch.Tensor, span: slice, spec: BufferSpec) -> torch.Tensor:
    """View these bytes of a payload as the output `[rows, *shape]` that they hold."""
    return payload[span].view(spec.dtype).view(-1, *spec.shape)


def _raise_failures(gathered: torch.Tensor, own: int, error: Exception | None) -> None:
    """Raise `RuntimeError` if a rank failed, from this rank's own error, or if requests differ between the ranks."""
    headers = gathered[:, :_HEADER].view(torch.int64).tolist()
    failures = []
    for rank, (size, _) in enumerate(headers):
        if size:
            text = bytes(gathered[rank, _HEADER : _HEADER + size].tolist()).decode(errors="replace")
            failures.append(f"on rank {rank}: {text}")
    if failures:
        raise RuntimeError(f"data parallel encoding failed {'; '.join(failures)}") from error
    others = [rank for rank, (_, request) in enumerate(headers) if request != headers[own][1]]
    if others:
        raise RuntimeError(f"data parallel encoding: expected equal requests, got other sizes on ranks {others}")
