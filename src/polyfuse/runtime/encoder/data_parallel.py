"""Data-parallel encoding: the items of one request spread over the ranks of a torch.distributed group.

Every rank is given the same request, encodes its share of the items and gets the whole result. The shares follow
from the items' sizes alone, so a request takes two all-gathers of bytes, a row of each rank. The first is of a
`header`, whose size never changes, and shows whether all ranks agree. Only if they do, the second is made:

    error: int64 | payload, padded to the largest rank's

`error` is 0, and the payload the outputs of the rank's items one after another, each at a multiple of 16 bytes; or
the rank failed, and the payload's first `error` bytes are the message.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from heapq import heapreplace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from polyfuse.runtime.encoder.header import check_headers, error_text, failed_header, failure, header
from polyfuse.runtime.encoder.protocol import BufferSpec, EncoderRequest, GraphableEncoder, ItemSize
from polyfuse.spec import fail

_ALIGNMENT = 16
_STATUS = 16
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


class _Share(NamedTuple):
    """What a rank has before it communicates: the request, each rank's items, and memory for the second all-gather.

    `spans` are the bytes of each output in each rank's payload, `row` is this rank's row and `gathered` those of all.
    """

    request: EncoderRequest
    assigned: list[list[int]]
    spans: list[dict[str, slice]]
    row: torch.Tensor
    gathered: torch.Tensor


class DataParallelEncoder:
    """Runs each request's items on all ranks of a group, with two all-gathers.

    `manager` is this rank's `EncoderGraphManager`, of the same encoder and weights on every rank. `group` (default:
    all ranks) is any torch.distributed group with a backend for the encoder's device. All its ranks must construct
    the encoder together, and call `execute` together with equal arguments, from one thread. One rank runs locally.

    The first all-gather, of 1288 bytes a rank, tells the ranks of a call that differs or cannot be run, so that none
    waits for it. It adds its latency to every request, with a copy to the device and one back for NCCL: the encoding
    starts when the host has read it.

    The all-gathers run in a group of its own with a timeout of `timeout_s` seconds, so `group` keeps its own. (The
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
        self._members = dist.get_process_group_ranks(group)
        self._ranks = len(self._members)
        if self._ranks > 1:
            self._group = dist.new_group(
                self._members,
                timeout=self._timeout,
                backend=dist.get_backend_config(group),
                use_local_synchronization=self._ranks < dist.get_world_size(),
            )

    @torch.no_grad()
    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for a call, on every rank: `encoder.result` of all items' outputs in order.

        The pixels may be on the host: each rank moves the rows of its own items alone. Runs without gradients, and
        waits for the device.

        Raises the same type of error on every rank, and the next request can be run after it. If `encoder.request`
        raises that type on all ranks, as it does for input that is bad and equal, each raises its own. Else it is
        `RuntimeError`, which names the ranks: if `encoder.request` or the encoding fails on some, with their errors,
        from the rank's own where there is one; and if the ranks differ in the items' sizes or their order, or in the
        encoder's name, inputs, outputs (their dtypes are the encoder's) or `token_multiple`. It cannot be seen whether
        the ranks have different pixels of equal sizes, or different weights: each item's result is then that of the
        rank that ran it.
        """
        encoder = self._manager.encoder
        if self._ranks == 1:
            request = encoder.request(*args, **kwargs)
            return encoder.result(self._manager.run(request), request)
        found: _Share | Exception
        try:
            found = self._share(encoder.request(*args, **kwargs))
            own = header(encoder, found.request)
        except Exception as caught:
            found, own = caught, failed_header(caught)
        headers = torch.empty(self._ranks, len(own), dtype=torch.uint8, device=encoder.device)
        self._gather(headers, torch.frombuffer(bytearray(own), dtype=torch.uint8).to(encoder.device))
        error = found if isinstance(found, Exception) else None
        check_headers([bytes(row.numpy()) for row in headers.cpu()], self._members, error)
        if isinstance(found, Exception):  # all ranks have one, of one type
            raise found
        return encoder.result(self._run(found), found.request)

    def _share(self, request: EncoderRequest) -> _Share:
        """Prepare all that can fail on this rank alone, memory too, for then the other ranks can be told."""
        outputs = self._manager.encoder.outputs
        assigned = assign_items([item_cost(size) for size in request.sizes], self._ranks)
        spans = [_spans(outputs, [request.sizes[i] for i in items]) for items in assigned]
        used = max(span.stop for of_rank in spans for span in of_rank.values())
        row_bytes = _STATUS + _aligned(max(_SMALLEST_PAYLOAD, used))
        gathered = torch.empty(self._ranks, row_bytes, dtype=torch.uint8, device=self._manager.encoder.device)
        return _Share(request, assigned, spans, torch.empty_like(gathered[0]), gathered)

    def _run(self, share: _Share) -> dict[str, torch.Tensor]:
        """Encode this rank's items, gather those of all ranks, and put them in order."""
        encoder, (request, assigned, spans, row, gathered) = self._manager.encoder, share
        status, payload = row[:_STATUS].view(torch.int64), row[_STATUS:]
        status.zero_()
        error = None
        try:
            if assigned[self._rank]:
                outputs = self._manager.run(request, assigned[self._rank])
                for name, spec in encoder.outputs.items():
                    _rows(payload, spans[self._rank][name], spec).copy_(outputs[name])
        except Exception as caught:
            error = caught
            text = error_text(error)[: payload.numel()]
            payload[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            status[0] = len(text)
        self._gather(gathered, row)
        self._raise_failures(gathered, error)
        merged = {}
        for name, spec in encoder.outputs.items():
            packed = [_rows(gathered[rank, _STATUS:], spans[rank][name], spec) for rank in range(self._ranks)]
            merged[name] = _in_order(packed, spec, request.sizes, assigned)
        return merged

    def _gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        """Gather a row of each rank; wait on the host, for NCCL too, whose own wait looks only every millisecond."""
        work = _all_gather(rows.view(-1), own, group=self._group, async_op=True)
        end = time.monotonic() + self._timeout.total_seconds()
        while not work.is_completed() and time.monotonic() < end:
            time.sleep(2e-5)
        work.wait(self._timeout)

    def _raise_failures(self, gathered: torch.Tensor, error: Exception | None) -> None:
        """Raise `RuntimeError` if encoding failed on a rank, from this rank's own error."""
        sizes = gathered[:, :_STATUS].view(torch.int64)[:, 0].tolist()
        failures = {
            self._members[rank]: bytes(gathered[rank, _STATUS : _STATUS + size].tolist())
            for rank, size in enumerate(sizes)
            if size
        }
        if failures:
            raise failure(failures) from error


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
